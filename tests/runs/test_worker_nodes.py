"""A node that goes away costs nothing but time, and a command that ends, however it does, leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pdrop.cli.compose import settings
from pdrop.evaluation.answers import AnswerStore
from pdrop.runs.cluster import made_of
from pdrop.runs.worker_dials import Workers
from pdrop.runs.workers import Team, TeamGenerator
from tests.runs.scripted_worker import Scripted, asked
from tests.support.left_behind import left_after, marked

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).resolve().parents[2]
DIALS = {"tasks": ["embedded_counting"], "batch_size": 2, "latency": "off", "device": "cpu", "workers": 2}


def test_a_node_that_goes_away_takes_no_answer_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        team = Team(Workers(2, address=cluster.address), "cpu", Scripted)
        while team.starting:
            team.wait()
        questions, gone = asked(*["slow 0.1"] * 60), []

        def lose_a_node(_: str, done: int, total: int) -> None:
            if done >= 20 and not gone:
                gone.append(nodes[0])
                cluster.remove_node(nodes[0], allow_graceful=False)
            if done >= 40 and len(gone) == 1:
                gone.append(cluster.add_node(num_cpus=1))  # and another comes

        store = AnswerStore(tmp_path / "answers.jsonl")
        found = TeamGenerator(settings(DIALS), team).answer(questions, store, lose_a_node)
        assert [answer.text for answer in found.answers] == [str(number) for number in range(60)]
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 60, "nothing twice"
        assert "its batches are asked again" in caplog.text and len(gone) == 2
        team.close()
    finally:
        cluster.shutdown()


def test_a_cluster_of_other_code_is_refused_as_often_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    cluster, ours = Cluster(initialize_head=True, head_node_args={"num_cpus": 2}), made_of()
    try:
        monkeypatch.setattr(
            "pdrop.runs.cluster.made_of", lambda: ours | {"torch": "0.0"}
        )  # here; workers are as they are
        team = Team(Workers(2, address=cluster.address), "cpu", Scripted)
        for _ in range(3):  # the runs of a sweep
            with pytest.raises(RuntimeError, match=r"has torch .* \(here: 0\.0\): answers of one run must be made by"):
                team.one()
        monkeypatch.undo()
        assert team.one().about is not None, "they are started anew"
        team.close()
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_command_that_ends_leaves_no_process(how: signal.Signals, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored, by children too
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "tests.runs.scripted_worker"]
    environment = os.environ | {"MARK": mark, "RAY_TMPDIR": "/tmp"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        workers = driver.stdout.readline().split()
        assert len(workers) == 2 and all(any(line.startswith(f"{pid} ") for line in marked(mark)) for pid in workers)
        driver.send_signal(how)
        driver.wait(timeout=60)
    assert not left_after(30, mark, agents=how != signal.SIGKILL)
    assert not left_after(60, mark)
