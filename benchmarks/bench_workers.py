"""What many workers cost compared with one, on this machine: how evenly questions spread, what the command uses.

    make bench-workers                                  about 10 minutes on two cores that nobody else uses
    python -m benchmarks.bench_workers --only limit     one part of it

    spread   the demo's questions by one worker and by two, interleaved, without loading: wall time two / one. Two
             workers need two free cores; on a busy machine use the ratio of the busier worker's CPU time to that of the
             single worker, which is the wall ratio if each has a core. Also the command's CPU time next to the workers'
    sweep    20 small runs over two workers: how often each loads the model
    limit    workers that sleep for as long as an H100 would take (benchmarks/table_time.py), on POPE, GQA and MME in
             batches of 8: the share of their time in which they have work, and the most that it can be (a task's last
             batches are too few for all workers); the CPU time per batch of the command, of the workers and of Ray's
             own processes; and the batches per second that one command hands out, by its CPU time. --slower 4: batches
             take four times as long, which shows how much this machine's cores limit

The record is written to results/bench/workers-*.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil

from benchmarks.records import Session
from benchmarks.table_time import Assumptions
from pdrop.cli.compose import settings
from pdrop.evaluation.answers import Answer, AnswerStore, Question
from pdrop.evaluation.generation import Answered
from pdrop.evaluation.prefetch import Preparation
from pdrop.evaluation.progress import Progress
from pdrop.runs import workers
from pdrop.runs.run import run
from pdrop.runs.settings import Settings
from pdrop.runs.worker import Worker
from pdrop.runs.worker_dials import Workers
from pdrop.runs.workers import Team, TeamGenerator
from pdrop.schedule import Schedule

DEMO = {"tasks": "embedded", "batch_size": 16, "latency": "off", "device": "cpu", "method": "none"}
ASKED = {"pope": 9000, "gqa": 12578, "mme": 2374}
SIMULATED = (1, 2, 4, 8, 16, 32, 64)


class CountingWorker(Worker):
    """A worker that counts how often it has loaded a model."""

    def loads(self) -> int:
        from pdrop.models import source

        return source._loaded.cache_info().misses


class Sleeper:
    """A worker without a model, which takes as long as one with a model.

    Args:
        threads: As for any worker.
    """

    def __init__(self, threads: int) -> None:
        self.busy, self.first, self.last = 0.0, 0.0, 0.0

    def about(self) -> dict[str, Any]:
        """Its host and process."""
        return {"host": platform.node(), "pid": os.getpid(), "device": None}

    def answer(self, settings: Any, questions: Sequence[Question]) -> list[Answer]:
        """Answers as long as real ones, after the same time."""
        started = time.monotonic()
        self.first = self.first or started
        time.sleep(settings.seconds)
        kept = ["f" * 36, "f" * 18, "f" * 9]
        found = [Answer(f"USER: {one.text} ASSISTANT:", "yes", 60, 576, 2, [576] * 32, kept) for one in questions]
        self.last = time.monotonic()
        self.busy += self.last - started
        return found

    def rest(self) -> None:
        """Nothing to wait for: calls are made one after another."""

    def span(self) -> tuple[float, float, float]:
        """Seconds of work, when the first began, and when the last ended."""
        return self.busy, self.first, self.last


class Handing(TeamGenerator):
    """Distributes batches in the order of the questions, which are all equally long: their tokens are not counted."""

    def planned(self, questions: Sequence[Question]) -> list[list[Question]]:
        size = self.spec.batch_size
        return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


class InTurns:
    """Has every team answer each task's questions in turn, timed; the answers that count are the last team's."""

    def __init__(self, plain: Settings, teams: dict[int, Team], rounds: int) -> None:
        self.generators = {count: TeamGenerator(plain, one) for count, one in teams.items()}
        self.rounds, self.found = rounds, defaultdict[int, list[dict[str, float]]](list)

    def answer(
        self, questions: Sequence[Question], store: AnswerStore | None = None, progress: Progress | None = None
    ) -> Answered:
        """Answers as pdrop.evaluation.generation.Generator does."""
        for _ in range(self.rounds):
            for count, generator in self.generators.items():
                self.found[count].append(taken(generator.team, lambda one=generator: one.answer(questions)))  # type: ignore[misc]
        return generator.answer(questions, store)


def taken(team: Team, call: Callable[[], object]) -> dict[str, float]:
    """Wall seconds of a call; CPU seconds of this process and of each worker of the team, the busier first."""
    processes = [psutil.Process(member.about["pid"]) for member in team.members if member.about]
    before, own, started = [cpu(one) for one in processes], time.process_time(), time.perf_counter()
    call()
    wall, own = time.perf_counter() - started, time.process_time() - own
    each = sorted((cpu(one) - was for one, was in zip(processes, before)), reverse=True)
    return {"wall": wall, "command": own, "busiest": each[0], "workers": sum(each)}


def cpu(process: psutil.Process) -> float:
    """CPU seconds that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def full(count: int, kind: type) -> Team:
    """A team, once all its workers are there."""
    team = Team(Workers(count), "cpu", kind)
    while team.starting:
        team.wait()
    return team


def spread(rounds: int, limit: int | None) -> dict[str, Any]:
    """One worker against two."""
    from pdrop.evaluation.lmms import evaluate

    plain = settings({**DEMO, "limit": limit, "workers": 2})
    teams = {count: full(count, CountingWorker) for count in (1, 2)}
    import ray

    everybody = [member.actor for team in teams.values() for member in team.members]
    ray.get([actor.loaded.remote(plain) for actor in everybody])  # so that loading is not timed
    turns = InTurns(plain, teams, 1)
    with tempfile.TemporaryDirectory() as aside:  # once to warm up, and to read the tasks
        first = replace(plain.spec, limit=16)
        evaluate(None, None, Schedule(), first, Path(aside), generator=turns, boxes="llava")
    turns = InTurns(plain, teams, rounds)
    with tempfile.TemporaryDirectory() as aside:
        evaluate(None, None, Schedule(), plain.spec, Path(aside), generator=turns, boxes="llava")
    for team in teams.values():
        team.close()
    one, two = (
        {name: sum(each[name] for each in turns.found[count]) for name in turns.found[count][0]} for count in (1, 2)
    )
    ratios = sorted(b["wall"] / a["wall"] for a, b in zip(turns.found[1], turns.found[2]))
    return {
        "seconds": {"one": one, "two": two},
        "wall_two_to_one": two["wall"] / one["wall"],
        "wall_two_to_one_of_each_turn": ratios,
        "median_of_turns": median(ratios),
        "busiest_of_two_to_one": two["busiest"] / one["busiest"],
        "command_to_workers": {"one": one["command"] / one["workers"], "two": two["command"] / two["workers"]},
        "load_average": os.getloadavg(),
    }


def sweep(runs: int) -> dict[str, Any]:
    """Many small runs by two workers."""
    import ray

    asked = Workers(2)
    team = full(2, CountingWorker)
    workers._TEAM[:] = [team]  # the one that runs with workers=2 find
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as results:
        for number in range(runs):
            dials = {
                **DEMO,
                "tasks": ["embedded_counting"],
                "limit": 24,
                "batch_size": 3,
                "method": "random",
                "seed": number,
            }
            made = settings({**dials, "workers": asked.count, "results": results})
            assert made.workers == asked
            assert run(made).status == "done"
        seconds = time.perf_counter() - started
    loads = ray.get([member.actor.loads.remote() for member in team.members])
    workers.dismiss()
    return {"runs": runs, "workers": 2, "loads": loads, "seconds": seconds}


def ray_processes(team: Team) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """The workers of a team, and Ray's own processes on this machine."""
    pids = {member.about["pid"] for member in team.members if member.about}
    everything = psutil.Process().children(recursive=True)
    return [one for one in everything if one.pid in pids], [one for one in everything if one.pid not in pids]


def limit(counts: Sequence[int], batch: int, slower: float = 1.0) -> dict[str, Any]:
    """Workers that sleep for as long as a GPU would take, and how busy they are."""
    import ray

    seconds = slower * sum(Assumptions(batch=batch).batch_seconds("llava_1_5_7b", None, Schedule()).values())
    found: dict[str, Any] = {"seconds_per_batch": seconds, "batch": batch, "workers": {}}
    spec = settings({"tasks": ["embedded_counting"], "batch_size": batch, "latency": "off", "device": "cpu"}).spec
    most = max(counts)
    for count in counts:
        team = full(count, Sleeper)
        plain: Any = SimpleNamespace(spec=spec, seconds=seconds, device="cpu", preparation=Preparation(prefetch=0))
        groups = ray_processes(team)
        before = [sum(map(cpu, group)) for group in groups]
        generator, commands, wall = Handing(plain, team), time.process_time(), time.perf_counter()
        batches = rounds = 0
        with tempfile.TemporaryDirectory() as aside:
            store = AnswerStore(Path(aside) / "answers.jsonl")
            for task, number in ASKED.items():  # the same number of batches per worker, however many workers there are
                questions = simulated(task, number * count // most)
                generator.answer(questions, store)
                number = -(-len(questions) // batch)
                batches, rounds = batches + number, rounds + -(-number // count)
        wall, commands = time.perf_counter() - wall, time.process_time() - commands
        theirs, rays = (sum(map(cpu, group)) - was for group, was in zip(groups, before))
        spans = ray.get([member.actor.span.remote() for member in team.members])
        team.close()
        busy = sum(span[0] for span in spans)
        found["workers"][count] = {
            "batches": batches,
            "wall": wall,
            "busy": busy / (count * wall),
            "busy_while_at_work": busy / (count * (max(span[2] for span in spans) - min(span[1] for span in spans))),
            "busy_at_most": batches / (count * rounds),
            "command_ms_per_batch": 1e3 * commands / batches,
            "workers_ms_per_batch": 1e3 * theirs / batches,
            "ray_ms_per_batch": 1e3 * rays / batches,
            "load_average": os.getloadavg()[0],
        }
        logging.info("%d workers: %s", count, found["workers"][count])
    least = found["workers"][most]["command_ms_per_batch"]
    found["batches_per_second_of_the_command"] = 1e3 / least
    found["workers_that_it_can_keep_busy"] = 1e3 / least * seconds
    return found


def simulated(task: str, count: int) -> list[Question]:
    """Questions as long as real ones."""
    text = "Is there a {} in the image?\nAnswer the question using a single word or phrase."
    return [
        Question(task, n, 0, text.format(n % 97), list, {"max_new_tokens": 16, "until": ["\n\n"]}) for n in range(count)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "spread": lambda given: spread(given.rounds, given.limit),
        "sweep": lambda given: sweep(given.runs),
        "limit": lambda given: limit(given.workers, given.batch, given.slower),
    }
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=2, help="of both teams over each task")
    parser.add_argument("--limit", type=int, help="questions of each task; default: all")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=SIMULATED, help="that sleep")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--slower", type=float, default=1.0, help="how much longer than an H100 they sleep")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the record")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    room = max(4, *given.workers) if "limit" in given.only else 4
    ray.init("local", num_cpus=room, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    session, found = Session(), dict[str, Any]()
    for name in given.only:
        found[name] = parts[name](given)
        sys.stdout.write(f"{name}: {json.dumps(found[name], indent=2)}\n")
    ray.shutdown()
    sys.stdout.write(f"{session.said(session.publish(given.output, 'workers', found))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
