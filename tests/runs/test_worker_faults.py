"""A GPU without room fails the run with advice; what is timed has nothing beside it; others see what the fleet does."""

from __future__ import annotations

import io
import os
import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from pdrop.cli.compose import settings
from pdrop.environment import processor
from pdrop.evaluation.answers import AnswerStore, QuestionError
from pdrop.evaluation.generation import Generator
from pdrop.runs import cluster, fleet
from pdrop.runs.cluster import SOURCES, arrival, cluster_line, made_of, presence, refuse_other_code, started_ray
from pdrop.runs.measured import answered_on
from pdrop.runs.settings import Settings
from pdrop.runs.worker import Worker
from pdrop.runs.worker_dials import Workers
from pdrop.runs.workers import Team, TeamGenerator
from pdrop.store import holder, locked
from tests.runs.scripted_worker import Scripted, asked

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def plain() -> Settings:
    return settings({"tasks": ["embedded_counting"], "batch_size": 1, "latency": "off", "device": "cpu", "workers": 2})


@pytest.fixture(scope="module")
def scripted() -> Iterator[Team]:
    with pytest.MonkeyPatch.context() as another:
        another.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that nobody asked for: workers are on this machine
        made = Team(Workers(2), "cpu", Scripted)
    while made.starting:
        made.wait()
    yield made
    made.close()


def test_a_worker_out_of_memory_fails_the_run_with_advice(plain: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a question raises in a worker is raised in the command (test_workers.py): here, what that is."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Generator, "_generate", full)
    monkeypatch.setattr(Worker, "_with_images", lambda self, settings, question: question)
    with pytest.raises(QuestionError) as raised:
        Worker(1).answer(plain, asked("how many?"))
    crossed = pickle.loads(pickle.dumps(raised.value))
    assert str(crossed).startswith("task t, doc_id 0: OutOfMemoryError: CUDA out of memory")
    assert str(crossed).endswith("; use a smaller batch_size")


def test_what_is_timed_has_nothing_beside_it(scripted: Team, plain: Settings) -> None:
    """The run before failed while another worker had much to do, which nobody waits for."""
    generator = TeamGenerator(plain, scripted)
    with pytest.raises(QuestionError, match="its picture is broken"):
        generator.answer(asked("broken", "slow 0.5", "slow 0.5", "slow 0.5"))
    timed_at: Any = generator.timed(None)  # type: ignore[arg-type]
    busy = max(ray.get([member.actor.was_busy_until.remote() for member in scripted.members]))
    assert 0 < busy <= timed_at


def test_others_see_what_each_worker_does(
    scripted: Team, plain: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capsys: Any
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(fleet, "EVERY", 0.0)
    monkeypatch.setattr(fleet, "SHOWN", 0.0)
    monkeypatch.setattr(fleet, "on_a_terminal", lambda: False)
    place = fleet.SWEEP.set(fleet.SweepPosition(3, 17, 720.0, time.monotonic()))
    with locked(tmp_path, answered=0):
        TeamGenerator(plain, scripted).answer(asked(*"abcdefgh"), AnswerStore(tmp_path / "answers.jsonl"))
        note = holder(tmp_path) or {}
    monkeypatch.setattr(fleet, "on_a_terminal", lambda: True)
    generator = TeamGenerator(plain, scripted)
    with redirect_stderr(io.StringIO()):  # as a task's code asks
        generator.answer(asked(*"abcdefgh"))
    assert "run 3 of 17, about 12 min left" in capsys.readouterr().err
    fleet.SWEEP.reset(place)
    assert note["task"] == {"name": "t", "done": 8, "total": 8} and note["pid"] == os.getpid()
    assert sum(one["answered"] for one in note["workers"]) == 8 and len(note["workers"]) == 2
    assert all(one["rate"] > 0 for one in note["workers"] if one["answered"])
    assert "workers       2 workers, " in caplog.text and "run 3 of 17, about 12 min left" in caplog.text


def test_ray_that_is_slow_to_start_is_started_again(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    tries: list[dict[str, Any]] = []

    def init(**options: Any) -> str:
        tries.append(options)
        if len(tries) != 3:
            raise Exception("The current node timed out during startup. This could happen because ...")
        return "started"

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    assert started_ray(Workers(2)) == "started" and caplog.text.count("Ray did not start") == 2
    with pytest.raises(RuntimeError, match="Ray did not start on this machine: The current node timed out"):
        started_ray(Workers(2))
    assert len(tries) == 6 and (tries[0]["address"], tries[0]["num_cpus"]) == ("local", 2)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_is_not_there_is_refused_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = address.format(free.getsockname()[1])
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray waits for it for long"))
        with pytest.raises(ConnectionError, match=rf"workers.address={address}: nobody answers there \(Connection"):
            started_ray(Workers(2, address=address))


def test_a_cluster_that_refuses_is_named_with_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at node7:6379")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match=r"workers.address=auto: Failed to connect .*; .*set RAY_AUTH_MODE=token"):
        started_ray(Workers(2, address="auto"))


def test_a_cluster_of_another_python_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.3\n")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        ConnectionError, match=r"^workers.address=auto: Version mismatch: .* Ray: 2.60.0 Python: 3.12.3$"
    ):
        started_ray(Workers(2, address="auto"))


def test_the_cluster_that_was_joined_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Context:
        address_info = {"gcs_address": "10.0.0.7:6379"}  # noqa: RUF012

    def node(host: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "NodeManagerHostname": host, "Resources": resources}

    nodes = [node(f"node{n}", CPU=16.0, GPU=8.0) for n in range(6)] + [node("gone", alive=False, CPU=16.0)]
    nodes[0]["Resources"]["accelerator_type:H100"] = 1.0
    monkeypatch.setattr(ray, "init", lambda **_: Context())
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    caplog.set_level("INFO", "pdrop")
    started_ray(Workers(2, address="auto"))
    joined = (
        "joined the Ray cluster at 10.0.0.7:6379: 6 nodes (node0, node1, node2, node3 and 2 more), 96 CPUs, 48 GPUs"
    )
    assert f"workers       {joined} (H100)" in caplog.text
    assert cluster_line("x", [node("one", CPU=2.0)]) == "joined the Ray cluster at x: 1 node (one), 2 CPUs, 0 GPUs"


def test_a_worker_with_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = made_of()
    assert {"Python", "torch", "transformers", SOURCES} <= set(ours)
    refuse_other_code("node1", ours)
    with pytest.raises(
        RuntimeError, match=r"the worker on node1 has torch 2\.0\.0 \(here: .*\): answers of one run must"
    ):
        refuse_other_code("node1", ours | {"torch": "2.0.0"})
    with pytest.raises(RuntimeError, match=rf"has lmms-eval not there .*, {SOURCES} 0123 \(here: {ours[SOURCES]}\)"):
        refuse_other_code("node1", {k: v for k, v in ours.items() if k != "lmms-eval"} | {SOURCES: "0123"})
    worker = Scripted(1)
    assert arrival(worker, "cpu", "auto")[1] == ours and arrival(worker, "cpu", None)[1] is None, (
        "one machine, one code"
    )
    monkeypatch.setattr(cluster, "made_of", lambda: ours | {"Python": "3.0"})
    with pytest.raises(RuntimeError, match=r"has Python 3\.\d+\.\d+ \(here: 3\.0\)"):
        refuse_other_code("node1", ours)


def test_on_the_cpu_a_worker_s_device_is_the_processor() -> None:
    class OnANodeWithCards:
        def about(self) -> dict[str, Any]:
            return {"pid": 7, "device": "NVIDIA H100"}

    assert presence(OnANodeWithCards(), "cpu") == {"pid": 7, "device": processor()}
    assert presence(OnANodeWithCards(), "cuda") == {"pid": 7, "device": "NVIDIA H100"}


def test_answers_of_different_devices_are_marked() -> None:
    entries = [{"device": name, "documents": {}} for name in ("NVIDIA H100", "NVIDIA A100", "NVIDIA H100", None)]
    assert answered_on(entries)["device_name"] == "NVIDIA A100 + NVIDIA H100"
    assert "device_name" not in answered_on(entries[::2]), "the environment's own stays"
