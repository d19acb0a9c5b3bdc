"""The same sweep started several times shares its runs: one that another process does is looked at again at the end."""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import pytest

from pdrop.cli import run as command
from pdrop.cli.compose import settings
from pdrop.record import RunRecord
from pdrop.runs.run import RunHeld, run
from pdrop.store import locked

DIALS = {"model": "llava_1_5_7b", "tasks": [], "latency": "off", "device": "cpu"}


def test_a_run_that_another_process_does_is_left_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("PDROP_CACHE", str(tmp_path / "cache"))
    results = tmp_path / "results"
    first, second = (settings({**DIALS, "ratio": ratio, "results": str(results)}) for ratio in (0.4, 0.6))
    taken, seen = threading.Event(), []

    def other() -> None:
        """Another process's part: it has the first run until the second one is done."""
        with locked(first.folder):
            taken.set()
            while not (second.folder / "record.json").exists() or RunRecord.read(second.folder).status != "done":
                time.sleep(0.01)
            seen.append((first.folder / "record.json").exists())

    thread = threading.Thread(target=other)
    thread.start()
    assert taken.wait(10)
    words = [
        "-m",
        "model=llava_1_5_7b",
        "tasks=none",
        "latency=off",
        "device=cpu",
        "ratio=0.4,0.6",
        f"results={results}",
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *words, f"hydra.sweep.dir={tmp_path / 'multirun'}"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    thread.join()
    assert ended.value.code == 0 and seen == [False], "the other one was done first"
    assert RunRecord.read(first.folder).status == RunRecord.read(second.folder).status == "done"


def test_who_does_not_wait_is_told(tmp_path: Path) -> None:
    held = settings({**DIALS, "results": str(tmp_path)})
    with locked(held.folder), pytest.raises(RunHeld, match=held.spec.run_id):
        run(held, wait=False)
    assert run(held, wait=False).status == "done"
