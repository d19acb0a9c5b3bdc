"""train.py as tests call it: fixtures (a module asks for them by `pytest_plugins = ["train_command"]`)."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from conversations import write_conversations
from saved_checkpoints import save_llava

import train

QUICK = ["model=folder", "model.name=tiny", "layers=[1,2]", "train.batch_size=4", "train.micro_batch=2"]
QUICK += ["train.bf16=false", "train.tf32=false", "train.workers=0", "device=cpu", "train.learning_rate=0.01"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [f"train.data={write_conversations(folder)}", f"train.images={folder / 'pictures'}"]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Call the command line; returns (exit code, what it printed, the folders of its trainings, newest last)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, list[Path]]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        out = capfd.readouterr()
        folders = sorted((tmp_path / "results/trainings").glob("*-*"), key=lambda path: path.stat().st_mtime)
        return code, out.out + out.err, folders

    return call


def curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))
