"""make torture-workers: workers and commands killed at random moments; the record is that of one undisturbed process.

What is killed, and with how many workers the next command goes on, is drawn; KILLS=30 says how often. SEED=1 draws
others.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from pdrop.cli.compose import settings
from pdrop.evaluation.answers import AnswerStore
from pdrop.record import RunRecord
from pdrop.runs.worker_dials import Workers
from pdrop.runs.workers import Team, TeamGenerator
from pdrop.samples import read_samples
from pdrop.store import holder, noted
from tests.runs.scripted_worker import Scripted, asked
from tests.support.left_behind import left_after, marked

pytest.importorskip("ray")
pytestmark = pytest.mark.torture
ROOT = Path(__file__).resolve().parents[2]
KILLS, SEED = int(os.environ.get("KILLS", "30")), int(os.environ.get("SEED", "0"))
TASKS, LIMIT = ["embedded_counting", "embedded_chart"], 100
SWEEP = ["-m", f"tasks=[{','.join(TASKS)}]", f"limit={LIMIT}", "batch_size=3", "method=none,random", "ratio=0.5"]
SWEEP += ["latency=off", "device=cpu"]


class Command:
    """The sweep in a process of its own, and what it started."""

    def __init__(self, folder: Path, count: int) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        words = [*SWEEP, f"results={folder / 'results'}", f"workers={count}", f"hydra.sweep.dir={folder / 'multirun'}"]
        environment = os.environ | {"MARK": self.mark, "PDROP_CACHE": str(folder.parent / "cache")}
        environment |= {"RAY_worker_niceness": "0"}  # Ray's 15 stops workers where others use the machine, too
        self.said = (folder / "said.txt").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words],
            cwd=ROOT,
            env=environment,
            stdout=self.said,
            stderr=self.said,
        )

    def workers(self) -> list[int]:
        """Processes of workers: those that load a model, too."""
        return [int(line.split()[0]) for line in marked(self.mark) if "ray::Worker" in line]

    def ended(self) -> int:
        """Its exit code, once nothing of it is left but agents of Ray's, which need a minute after SIGKILL."""
        code = self.process.wait()
        self.said.close()
        left = left_after(30, self.mark, agents=code != -signal.SIGKILL)
        assert not left, f"orphans: {left}"
        return code


def came(folder: Path) -> dict[str, Any]:
    """What a finished sweep came to: scores, samples, and who answered what, for each run."""
    found = {}
    for path in sorted((folder / "results").glob("runs/*/record.json")):
        record = RunRecord.read(path.parent)
        assert record.status == "done"
        for result in record.results.values():
            result.wall_s = 0.0
        found[record.run_id] = (record.results, record.cost, [read_samples(path.parent, task) for task in TASKS])
        for task in TASKS:
            masks = [int(one["documents"].get(task, "0"), 16) for one in record.environment["answered_by"]]
            assert sum(masks) == 2**LIMIT - 1, "each document was answered by one"
        lines = (path.parent / "answers.jsonl").read_text().splitlines()
        assert len(lines) == 2 * LIMIT == len(AnswerStore(path.parent / "answers.jsonl")), "nothing lost, nothing twice"
    assert len(found) == 2
    return found


def stored(folder: Path) -> set[tuple[str, str]]:
    paths = (folder / "results").glob("runs/*/answers.jsonl")
    return {(path.parent.name, key) for path in paths for key in AnswerStore(path)._answers}


def wait(command: Command, rng: random.Random) -> None:
    """Until a random moment: while it starts, or when it has stored some more answers."""
    if rng.random() < 0.3:
        seconds, wanted = rng.uniform(1, 30), 1
    else:
        seconds, wanted = 600.0, rng.randint(1, 2 * LIMIT) + len(stored(command.folder))
    end = time.monotonic() + seconds
    while command.process.poll() is None and time.monotonic() < end and len(stored(command.folder)) < wanted:
        time.sleep(0.2)


def test_kills_of_workers_and_commands_change_nothing(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored, by children too
    (tmp_path / "whole").mkdir()
    assert Command(tmp_path / "whole", 0).ended() == 0
    expected = came(tmp_path / "whole")
    rng, tally = random.Random(SEED), {"workers": 0, "commands": 0, "interrupts": 0, "sweeps": 0}
    before: set[tuple[str, str]] = set()
    while sum(tally.values()) - tally["sweeps"] < KILLS:
        folder = tmp_path / f"sweep{tally['sweeps']}"
        folder.mkdir(exist_ok=True)
        command = Command(folder, rng.randint(1, 3))
        # at most two deaths of workers: three of one batch, or in a row while they load, fail a run, as they should
        for _ in range(rng.randint(0, 2)):
            wait(command, rng)
            if command.process.poll() is None and (there := command.workers()):
                os.kill(rng.choice(there), signal.SIGKILL)
                tally["workers"] += 1
        if rng.random() < 0.7:
            wait(command, rng)
            if command.process.poll() is None:
                how = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
                command.process.send_signal(how)
                tally["commands" if how == signal.SIGKILL else "interrupts"] += 1
        code, now = command.ended(), stored(folder)
        assert before <= now, "an answer that was stored is lost"
        before = now
        assert code in (0, -signal.SIGKILL, 130), (folder / "said.txt").read_text()[-3000:]
        for path in (folder / "results").glob("runs/*/record.json"):
            assert RunRecord.read(path.parent).status in ("running", "failed", "done")
            assert holder(path.parent) is None, noted(path.parent / ".holder")
        if code == 0:
            assert came(folder) == expected, "what killed sweeps come to is what an undisturbed one comes to"
            tally["sweeps"], before = tally["sweeps"] + 1, set()
        print(f"{time.strftime('%H:%M:%S')} killed so far: {tally}, {len(before)} answers", flush=True)
    folder = tmp_path / f"sweep{tally['sweeps']}"
    folder.mkdir(exist_ok=True)
    assert Command(folder, 2).ended() == 0 and came(folder) == expected
    tally["sweeps"] += 1
    print(f"killed at random: {tally}")


def test_many_kills_of_workers_without_a_model_lose_nothing(tmp_path: Path) -> None:
    """The handing out alone, which is quick: in each round two workers of three are killed in the middle of batches."""
    plain = settings({"tasks": TASKS, "batch_size": 3, "latency": "off", "device": "cpu", "workers": 3})
    team, rng, kills, rounds = Team(Workers(3), "cpu", Scripted), random.Random(SEED), 0, 0
    while kills < KILLS:
        moments = sorted(rng.sample(range(3, 200), 2))
        path, rounds = tmp_path / f"{rounds}.jsonl", rounds + 1

        def kill(_: str, done: int, total: int, moments: list[int] = moments) -> None:
            nonlocal kills
            if moments and done >= moments[0] and team.members:
                moments.pop(0)
                about = rng.choice(team.members).about
                assert about is not None
                os.kill(about["pid"], signal.SIGKILL)
                kills += 1

        found = TeamGenerator(plain, team).answer(asked(*["slow 0.01"] * 240), AnswerStore(path), kill)
        assert [answer.text for answer in found.answers] == [str(number) for number in range(240)]
        assert len(path.read_text().splitlines()) == 240 == len(AnswerStore(path)), "nothing lost, nothing twice"
    assert team.started >= 3 + kills - 2, "others took the places of those that were killed"
    team.close()
    print(f"{kills} workers killed in {rounds} rounds")
