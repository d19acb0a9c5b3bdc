"""python -m analysis status: what runs, what failed and why, what waits; an unreadable record hides nothing."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.__main__ import main
from pdrop.announcements import announced
from pdrop.record import RunRecord
from pdrop.store import locked, mark, tell
from tests.support.records import make_record


def put(results: Path, record: RunRecord) -> Path:
    folder = results / "runs" / record.spec.folder
    record.write(folder)
    return folder


def test_each_run_stands_as_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, make_record("none", 1.0))
    broken = replace(make_record("fastv", 0.5), status="failed", error="Traceback\n  File\nValueError: no picture\n")
    put(tmp_path, broken)
    older = make_record("none", 1.0, code="0")
    put(tmp_path, replace(older, status="failed", error="ValueError: of old"))
    killed = put(tmp_path, replace(make_record("random", 0.5, limit=20), status="running"))
    (killed / "answers.jsonl").write_text("{}\n" * 7)
    working = put(tmp_path, replace(make_record("pyramiddrop", 0.5), status="running"))
    damaged = put(tmp_path, make_record("pyramiddrop", 0.3))
    (damaged / "record.json").write_text('{"run_id": ')
    mark(tmp_path, "demo", "toy-fastv-0123456789ab", [])
    note = {"runs": {"toy-random-ba9876543210": ["method=random", "ratio=0.7"]}}
    with locked(working, answered=0), announced(tmp_path / "sweeps" / "1.json", note) as sweep:
        sweep.tell(run=3, whole=17, left=700.0, at=time.time())
        each = {"host": "node7", "pid": 12, "device": "NVIDIA H100 80GB HBM3", "answered": 20}
        workers = [{"number": 0, "rate": 4.25} | each, {"number": 1, "rate": 0.0} | each | {"device": None}]
        task = {"name": "pope", "done": 1000, "total": 9000}
        tell(working, workers=workers, starting=1, dashboard="127.0.0.1:8265", task=task)
        tell(killed, workers=workers)  # which this process does not hold
        (working / "answers.jsonl").write_text("{}\n" * 40)
        assert main(["status", "--results", str(tmp_path)]) == 0
        said = capsys.readouterr().out
    assert "7 runs: 1 done, 1 running, 1 failed, 1 stopped, 2 waiting, 1 unreadable" in said
    for words in (
        "40 questions",
        ": run 3 of 17, about 12 min left",
        "2 workers, 4.2 per s, 1 more start\n",
        " pope: 1000 of 9000 questions, about 31 min left",
        "Ray's dashboard: http://127.0.0.1:8265",
        "worker 0: 4.2 per s; NVIDIA H100 80GB HBM3 on node7, process 12",
        "worker 1: nothing answered yet; CPU on node7, process 12",
        "ValueError: no picture",
        "killed or interrupted after 7 of at most 60 questions",
        "asked for by experiment demo",
        "method=random ratio=0.7",
        damaged.name,
        "record.json is not a record that this version reads",
        f"retry=failed results={tmp_path}",
    ):
        assert words in said, said
    assert "of old" not in said, "made again since"
    assert all(len(line) <= 80 for line in said.splitlines() if str(tmp_path) not in line and "record" not in line), (
        said
    )
    assert not (tmp_path / "sweeps").exists(), "a sweep that has ended waits for nothing"


def test_a_sweep_that_was_killed_is_said_to_have_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweeps").mkdir()
    note = {"host": "node7", "pid": 1, "since": 0, "runs": {"toy-random-ba9876543210": ["ratio=0.7"]}}
    (tmp_path / "sweeps/1.json").write_text(json.dumps(note))
    for odd in ("", "[]", '{"runs": 3}', '{"runs": {"a": 3}}'):
        (tmp_path / f"sweeps/odd{len(odd)}.json").write_text(odd)
    assert main(["status", "--results", str(tmp_path)]) == 0
    assert "the sweep on node7 (stopped" in (said := capsys.readouterr().out) and "1 waiting" in said
    assert main(["status", "--results", str(tmp_path / "nowhere")]) == 1
    assert "there is no store" in capsys.readouterr().err


def test_the_list_calls_a_killed_run_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, replace(make_record("fastv", 0.5), status="running"))
    assert main(["list", "--results", str(tmp_path)]) == 0
    assert "stopped" in capsys.readouterr().out
