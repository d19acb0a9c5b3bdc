"""make torture: a hundred wrong inputs, none accepted in silence, none answered by a traceback, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdrop.cli import run
from tests.support.command_line import called
from tests.torture.wrong_inputs import EXTRA, ON, TASK, TASKS, TOGETHER, VALUES

pytestmark = pytest.mark.torture
Call = Callable[..., tuple[int, str]]
TABLE: list[tuple[tuple[str, ...], list[str]]] = [((word,), held) for word, held in VALUES.items()]
TABLE += TOGETHER.items()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda *words: called(run.main, "run.py", words, monkeypatch, capfd)


def refused(code: int, said: str, held: list[str], store: Path) -> None:
    assert code != 0, said
    assert "Traceback" not in said and "HYDRA_FULL_ERROR" not in said, said
    lines = [line for line in said.strip().splitlines() if "lmms-eval runs the Python code" not in line]
    assert len(lines) == 1 or lines[0].split(" ")[0].isdigit(), f"one line, or a sweep's summary:\n{said}"
    for word in held:
        assert word in said, said
    assert not (store / "runs").exists(), "nothing is written"


@pytest.mark.parametrize(("words", "held"), TABLE, ids=[" ".join(words) for words, _ in TABLE])
def test_a_wrong_dial(command: Call, tmp_path: Path, words: tuple[str, ...], held: list[str]) -> None:
    given = {word.split("=")[0] for word in words}
    code, said = command(*[word for word in ON if word.split("=")[0] not in given], *words)
    refused(code, said, held, tmp_path / "results")


def write(folder: Path, **lines: str) -> None:
    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"question": "What?", "answer": "yes"}\n' * 3)
    (folder / "mine.yaml").write_text("\n".join(lines.values()) + "\n")


YAMLS = [(name, line, held) for name, (line, held) in TASKS.items()]
YAMLS += [("more", line, held) for line, held in EXTRA.items()]


@pytest.mark.parametrize(("name", "line", "held"), YAMLS, ids=[line for _, line, _ in YAMLS])
def test_a_wrong_task(command: Call, tmp_path: Path, name: str, line: str, held: list[str]) -> None:
    lines = {key: f"{key}: {value}" for key, value in TASK.items()}
    lines["dataset_kwargs"] = lines["dataset_kwargs"].replace("questions.jsonl", str(tmp_path / "own/questions.jsonl"))
    write(tmp_path / "own", **lines | {name: line})
    asked = "task_folders=[own]", "latency=off", "limit=1"
    refused(*command("tasks=mine", *asked), held, tmp_path / "results")
