"""train.py as tests call it: fixtures for tests of the training command.

pytest loads this with tests/conftest.py, also in a process that only hands tests out: it imports torch when it is used.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import called


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from tests.support.saved_checkpoints import save_llava

    return save_llava(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    from tests.support.conversations import write_conversations

    folder = tmp_path_factory.mktemp("data")
    return [f"train.data={write_conversations(folder)}", f"train.images={folder / 'pictures'}"]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Call the command line; returns (exit code, what it printed, the folders of its trainings, newest last)."""
    from pdrop.cli import train

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, list[Path]]:
        code, said = called(train.main, "train.py", arguments, monkeypatch, capfd)
        folders = sorted((tmp_path / "results/trainings").glob("*-*"), key=lambda path: path.stat().st_mtime)
        return code, said, folders

    return call
