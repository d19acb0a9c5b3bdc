"""Sweeps as a user sees them: what is planned, where they are, what came of them; what was resolved is remembered."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdrop import FastV
from pdrop.cli import compose, run, sweep
from pdrop.evaluation import task_index
from pdrop.methods.view import View
from pdrop.record import read_records
from pdrop.runs import remembered
from tests.cli.test_run import QUICK, Breaks
from tests.support.command_line import called

Call = Callable[..., tuple[int, str, Path]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Call:
    """Call run.py in an empty folder, with nothing remembered: (exit code, what it printed, the store)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDROP_CACHE", str(tmp_path / "cache"))
    remembered._lines.cache_clear()
    remembered._file.cache_clear()
    yield lambda *words: (*called(run.main, "run.py", words, monkeypatch, capfd), tmp_path / "results")
    remembered._lines.cache_clear()
    remembered._file.cache_clear()


def test_a_sweep_is_planned_run_summed_up_and_found_done(command: Call, tmp_path: Path) -> None:
    words = ("-m", *QUICK, "method=none,fastv", "ratio=0.5,1.5", "experiment=first")
    code, said, store = command(*words, "plan=true")
    assert code == 0 and not store.exists() and "2 runs of 3 jobs" not in said
    assert "3 runs of 4 jobs: 0 done, 1 refused, 2 to do" in said, said
    assert "GFLOP x0.7" in said and "fastv 2:0.5" in said and "method=fastv ratio=1.5: ratio is the fraction" in said
    code, said, store = command(*words)
    records = {record.spec.method: record for record in read_records(store / "runs")}
    assert code == 1 and sorted(records) == ["fastv", "none"], "one is refused, the others are done"
    assert "run 1 of 2: method=none" in said and "run 2 of 2" in said and "left: method=fastv ratio=0.5" in said
    assert said.count("ratio is the fraction that is kept") == 1, said
    assert "3 runs: 2 done in" in said and "1 refused" in said and "python -m analysis tables first" in said
    assert "Launching" not in said and "questions/s" not in said, said
    assert not (store / "sweeps").exists()
    code, said, _ = command(*words, "plan=true")
    assert all(record.run_id in said for record in records.values()) and "2 done, 1 refused, 0 to do" in said

    # a finished sweep, in a fresh process: nothing heavy is imported
    asked = ["run.py", "-m", *QUICK, "method=none,fastv", "ratio=0.5", "experiment=first"]
    heavy = "('torch', 'transformers', 'lmms_eval', 'datasets', 'numpy') if name in sys.modules"
    program = f"import sys\nfrom pdrop.cli.run import main\nsys.argv = {asked!r}\ntry:\n    main()\n"
    program += f"except SystemExit as stop:\n    print('code', stop.code, [name for name in {heavy}])\n"
    root = Path(run.__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert again.stdout.count("done already") == 2 and "code 0 []" in again.stdout, again.stdout + again.stderr


def test_what_failed_is_done_again_alone(command: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = f"method._target_={Breaks.__module__}.Breaks"
    code, said, store = command("-m", *QUICK, "method=fastv", f"{broken},pdrop.methods.fastv.FastV")
    assert code == 1 and "1 done in" in said and "1 failed" in said and "retry=failed" in said
    before = {record.run_id: record.started_at for record in read_records(store / "runs") if record.status == "done"}
    monkeypatch.setattr(Breaks, "score", lambda self, view: view.index.float())
    code, said, _ = command("retry=failed", "plan=true")
    assert code == 0 and "failed" in said and "1 run: 0 done, 1 to do" in said, said
    code, said, _ = command("retry=failed")
    records = {record.run_id: record for record in read_records(store / "runs")}
    assert code == 0 and {record.status for record in records.values()} == {"done"}, said
    assert all(records[run_id].started_at == at for run_id, at in before.items())
    code, said, _ = command("retry=failed")
    assert code == 0 and "no run has failed or stopped" in said
    code, said, _ = command(*QUICK, "retry=fialed")
    assert code == 1 and said.strip() == "error: retry is failed, or null, not 'fialed'"


@dataclass(frozen=True)
class FailsHolding(Breaks):
    """Fails while the forward's tensors are there, as a GPU that is out of memory does."""

    def score(self, view: View) -> Any:
        HELD.append(weakref.ref(view.hidden))
        return super().score(view)


@dataclass(frozen=True)
class LooksBack(FastV):
    """Notes how many of those tensors are still there."""

    def score(self, view: View) -> Any:
        gc.collect()
        HELD.append(sum(one() is not None for one in HELD if isinstance(one, weakref.ref)))
        return super().score(view)


HELD: list[Any] = []


def test_a_run_that_failed_holds_no_memory_in_the_next_one(command: Call) -> None:
    """Its error has a traceback, and that the tensors of the forward: on a GPU the next run would have no room."""
    HELD.clear()
    kinds = ",".join(f"{kind.__module__}.{kind.__name__}" for kind in (FailsHolding, LooksBack))
    code, said, _ = command("-m", *QUICK, "method=fastv", f"method._target_={kinds}")
    assert code == 1 and "1 done in" in said and "1 failed" in said, said
    assert isinstance(HELD[0], weakref.ref) and HELD[-1] == 0 and len(HELD) > 2


def settings(*words: str) -> Any:
    return compose.settings(dict(word.split("=") for word in words) | {"tasks": ["embedded_chart"], "device": "cpu"})


def test_what_is_remembered_is_held_against_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PDROP_CACHE", str(tmp_path / "cache"))
    remembered._file.cache_clear()
    conf, words = compose.CONF, ["method=fastv", "ratio=0.5"]
    found = settings(*words)
    remembered.remember(words, found, conf)
    known = remembered.recall(words, conf)
    assert known is not None and known.spec == found.spec and known.folder == found.folder
    assert remembered.recall(["method=fastv", "ratio=0.6"], conf) is None
    monkeypatch.chdir(tmp_path)
    assert remembered.recall(words, conf) is None, "paths are relative to where the words are said"
    remembered.remember(words, found, conf)
    assert remembered.recall(words, conf) is not None
    with monkeypatch.context() as patch:
        patch.setattr(task_index, "content", lambda own: "another")
        assert remembered.recall(words, conf) is None, "the files of the tasks have changed"
    with monkeypatch.context() as patch:
        patch.setattr(task_index, "definitions", lambda folders: "another")
        assert remembered.recall(words, conf) is None, "a task of this name may lie elsewhere now"
    with monkeypatch.context() as patch:
        patch.setattr("pdrop.models.source._fingerprint", lambda *of: "another")
        assert remembered.recall(words, conf) is None, "the weights have changed"
    (path,) = (tmp_path / "cache/resolved").glob("*.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"schedule": "2:0.5"', b'"schedule": "2:0.6"'))
    remembered._lines.cache_clear()
    assert remembered.recall(words, conf) is None, "a damaged line is no other run"
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    caplog.set_level(logging.INFO)
    remembered.remember(words, found, conf)
    assert "cannot be written" in caplog.text
    remembered._file.cache_clear()


def test_a_method_of_ones_own_is_looked_at_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDROP_CACHE", str(tmp_path / "cache"))
    remembered._file.cache_clear()
    source = "from dataclasses import dataclass\nfrom pdrop.methods.fastv import FastV\n\n\n@dataclass(frozen=True)\n"
    (tmp_path / "ours_to_keep.py").write_text(source + "class Ours(FastV):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg, name = compose.compose({"method": "fastv", "tasks": ["embedded_chart"], "device": "cpu"})
    cfg.method._target_ = "ours_to_keep.Ours"
    found = compose.settings_of(cfg, name)
    assert sweep.follows(cfg, found)
    remembered.remember(["ours"], found, compose.CONF)
    assert remembered.recall(["ours"], compose.CONF) is not None
    (tmp_path / "ours_to_keep.py").write_text(source + "class Ours(FastV):\n    more = 1\n")
    assert remembered.recall(["ours"], compose.CONF) is None
    cfg.method._target_ = "elsewhere.made_by_code_that_nobody_knows"
    assert not sweep.follows(cfg, found)
    cfg.budget = "prefill_ms:20"
    assert not sweep.follows(cfg, found), "found by measuring"
    remembered._file.cache_clear()
