"""make torture: a hundred kills at random moments; nothing is lost, nothing is made up, nothing runs for ever."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from analysis.store.status import page
from pdrop.cli import compose, run
from pdrop.evaluation.answers import AnswerStore
from pdrop.evaluation.lmms import import_lmms_eval
from pdrop.record import RunRecord
from pdrop.store import holder

pytestmark = pytest.mark.torture
KILLS = int(os.environ.get("KILLS", "100"))
SWEEP = ["-m", "tasks=[embedded_chart,embedded_choice]", "limit=8", "batch_size=2", "method=none,random", "ratio=0.5"]
SWEEP += ["latency=off", "experiment=killed"]


def child(store: Path) -> int:
    """The sweep in a process of its own, which has imported everything already; its number."""
    if number := os.fork():
        return number
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        own_lock(tqdm)
        sys.argv = ["run.py", *SWEEP, f"results={store}"]
        run.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def own_lock(kind: type[tqdm]) -> None:
    """A process that is forked shares tqdm's lock with its brothers, and one that is killed may hold it for ever."""
    kind.set_lock(threading.RLock())
    for one in kind.__subclasses__():
        own_lock(one)


def stored(store: Path) -> set[tuple[str, str]]:
    """The keys of the answers that a store holds, by run. Reading refuses what is no answer."""
    return {
        (path.parent.name, key) for path in store.glob("runs/*/answers.jsonl") for key in AnswerStore(path)._answers
    }


def came(store: Path) -> dict[str, tuple[object, bytes]]:
    """What a finished sweep came to: scores and samples of each run."""
    found = {}
    for path in sorted(store.glob("runs/*/record.json")):
        record = RunRecord.read(path.parent)
        assert record.status == "done"
        found[record.run_id] = (
            {name: result.scores for name, result in record.results.items()},
            (path.parent / "samples.zip").read_bytes(),
        )
    return found


def test_a_hundred_kills_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import_lmms_eval()  # here, so that the children have everything at hand
    compose.settings({"device": "cpu", "tasks": []}).load()
    assert os.waitpid(child(tmp_path / "whole"), 0)[1] == 0
    expected = came(tmp_path / "whole")
    assert len(expected) == 2
    started = time.monotonic()
    assert os.waitpid(child(tmp_path / "timed"), 0)[1] == 0
    whole = time.monotonic() - started
    rng, kills, finished, store, before = random.Random(0), 0, 0, tmp_path / "store", set[tuple[str, str]]()
    while kills < KILLS:
        number = child(store)
        time.sleep(rng.uniform(0, 0.8 * whole))
        os.kill(number, signal.SIGKILL)
        code = os.waitpid(number, 0)[1]
        now = stored(store)
        assert before <= now, "an answer that was stored is lost"
        before = now
        for path in store.glob("runs/*/record.json"):
            assert RunRecord.read(path.parent).status in ("running", "done") and holder(path.parent) is None
        if store.exists():
            assert " running" not in page(store) and "unreadable" not in page(store)
        if os.WIFSIGNALED(code):
            kills += 1
        else:
            assert code == 0 and came(store) == expected, "what killed runs come to is what others come to"
            shutil.rmtree(store)
            finished, before = finished + 1, set()
    assert os.waitpid(child(store), 0)[1] == 0 and came(store) == expected
    assert not (store / "sweeps").exists() and finished >= 1
