"""Batches are handed out to workers that die, fail and come late: every question is answered once, by the same company.

Most of it is shown with workers without a model, which cost no more than a process each.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdrop.cli.compose import settings
from pdrop.environment import processor
from pdrop.evaluation.answers import Answer, AnswerStore, Question, QuestionError
from pdrop.record import RunRecord
from pdrop.runs import workers
from pdrop.runs.run import run
from pdrop.runs.settings import Settings
from pdrop.runs.worker_dials import Workers
from pdrop.runs.workers import Team, TeamGenerator
from pdrop.samples import read_samples

ray = pytest.importorskip("ray")


class Echo:
    """A worker without a model: answers with the company that a question was asked in. Some texts kill it, or raise."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def about(self) -> dict[str, Any]:
        return {"host": platform.node(), "pid": os.getpid(), "device": None}

    def answer(self, settings: Settings, questions: list[Question]) -> list[Answer]:
        for question in questions:
            how, _, file = question.text.partition(":")
            if how == "always":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "once" and not Path(file).exists():
                Path(file).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "slow":
                time.sleep(1)
            if how == "broken":
                raise QuestionError(f"task {question.task}, doc_id {question.doc_id}: its picture is broken")
        company = ",".join(str(question.doc_id) for question in questions)
        return [Answer("", f"{q.doc_id} with {company}", 1, 1, 1, [1], ["1"]) for q in questions]


class Stillborn(Echo):
    def __init__(self, threads: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def asked(count: int, **texts: str) -> list[Question]:
    return [Question("t", n, 0, texts.get(f"q{n}", f"question {n}"), lambda: []) for n in range(count)]


@pytest.fixture(scope="module")
def plain() -> Settings:
    return settings({"tasks": ["embedded_counting"], "batch_size": 3, "latency": "off", "device": "cpu", "workers": 2})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def echoes(cluster: None) -> Iterator[Team]:
    made = Team(Workers(2), "cpu", Echo)
    yield made
    made.close()


def expected(questions: list[Question]) -> list[str]:
    return [answer.text for answer in Echo(1).answer(None, questions)]  # type: ignore[arg-type]


def by_batches(generator: TeamGenerator, questions: list[Question]) -> dict[int, str]:
    return {q.doc_id: text for batch in generator.planned(questions) for q, text in zip(batch, expected(batch))}


def test_every_question_is_answered_once_in_its_own_company(echoes: Team, plain: Settings, tmp_path: Path) -> None:
    questions, steps = asked(20), []
    store = AnswerStore(tmp_path / "answers.jsonl")
    found = TeamGenerator(plain, echoes).answer(questions, store, lambda *step: steps.append(step))
    assert {q.doc_id: a.text for q, a in zip(questions, found.answers)} == by_batches(
        TeamGenerator(plain, echoes), questions
    )
    assert (found.asked, found.reused) == (20, 0) and steps[-1] == ("t", 20, 20)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 20
    assert {line["by"]["pid"] for line in lines} <= {member.about["pid"] for member in echoes.members if member.about}
    again = TeamGenerator(plain, echoes).answer(questions, AnswerStore(tmp_path / "answers.jsonl"))
    assert (again.asked, again.reused) == (0, 20) and again.answers == found.answers


def test_what_a_killed_driver_left_is_not_asked_again(echoes: Team, plain: Settings, tmp_path: Path) -> None:
    questions, store = asked(12), AnswerStore(tmp_path / "answers.jsonl")
    first, second, *_ = TeamGenerator(plain, echoes).planned(questions)
    store.add(zip(first, Echo(1).answer(plain, first)))
    store.add(zip(second[:1], Echo(1).answer(plain, second)[:1]))  # a kill inside a write: a part of a batch
    found = TeamGenerator(plain, echoes).answer(questions, AnswerStore(tmp_path / "answers.jsonl"))
    assert {q.doc_id: a.text for q, a in zip(questions, found.answers)} == by_batches(
        TeamGenerator(plain, echoes), questions
    )
    assert (found.asked, found.reused) == (8, 4)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12, "nothing twice"


def test_a_worker_that_dies_is_replaced_and_its_batches_are_asked_again(
    echoes: Team, plain: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = asked(14, q3=f"once:{tmp_path}/a", q9=f"once:{tmp_path}/b")
    found = TeamGenerator(plain, echoes).answer(questions, AnswerStore(tmp_path / "answers.jsonl"))
    assert {q.doc_id: a.text for q, a in zip(questions, found.answers)} == by_batches(
        TeamGenerator(plain, echoes), questions
    )
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 14
    assert caplog.text.count("its batches are asked again") == 2 and echoes.started == 4


def test_a_batch_that_three_workers_die_of_fails_with_its_documents(echoes: Team, plain: Settings) -> None:
    questions = asked(9, q4="always")
    with pytest.raises(QuestionError, match=r"task t, doc_id [\d, ]*\b4\b.*3 workers died.*smaller batch_size"):
        TeamGenerator(plain, echoes).answer(questions)
    assert TeamGenerator(plain, echoes).answer(asked(5)).asked == 5, "the next run goes on with the same team"


def test_a_batch_that_kills_while_another_is_answered_is_the_one_that_is_blamed(cluster: None, plain: Settings) -> None:
    made = Team(Workers(1), "cpu", Echo, depth=1)
    slow = "slow:" + " s" * 40
    questions = asked(6, q0=slow, q1=slow, q2=slow, q4="always:")
    try:
        first, _ = TeamGenerator(plain, made).planned(questions)
        assert [question.doc_id for question in first] == [0, 1, 2]
        with pytest.raises(QuestionError, match=r"task t, doc_id [345, ]+: 3 workers died"):
            TeamGenerator(plain, made).answer(questions)
    finally:
        made.close()


def test_what_a_question_raises_is_raised_here(echoes: Team, plain: Settings, tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match="doc_id 7: its picture is broken"):
        TeamGenerator(plain, echoes).answer(asked(9, q7="broken"), AnswerStore(tmp_path / "answers.jsonl"))
    assert TeamGenerator(plain, echoes).answer(asked(4)).asked == 4, "nothing of the failed run is answered into this"


def test_workers_that_die_before_they_are_ready_end_the_run(cluster: None, plain: Settings) -> None:
    made = Team(Workers(1), "cpu", Stillborn)
    with pytest.raises(RuntimeError, match="3 workers in a row died before they were ready"):
        TeamGenerator(plain, made).answer(asked(2))
    made.close()


@pytest.mark.parametrize(
    ("dials", "told"),
    [
        ({"workers": -1}, "workers is a whole number from 0 on, not -1"),
        ({"workers": 1, "workers.threads": 0}, "workers.threads is a whole number from 1 on"),
        ({"workers": 1, "workers.gpus": -0.5}, "workers.gpus is a share of a GPU"),
        ({"workers": 1, "workers.gpus": 1.5}, "workers.gpus is a whole number or a share below 1"),
        ({"workers.address": "auto"}, "without workers: say how many"),
        ({"workers": 2, "workers.gpus": 0.5, "latency": "quick"}, "a card of its own"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(dials: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings({"tasks": ["embedded_counting"], "latency": "off", "device": "cpu", **dials})


def test_a_worker_on_a_gpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"workers.gpus=0 hides every card"):
        Workers(2, gpus=0).check_device("cuda", timed=False)
    Workers(2, gpus=0).check_device("cpu", timed=True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    Workers(2, gpus=0.5).check_device("cuda", timed=False)
    with pytest.raises(ValueError, match=r"workers=2 take 2 GPUs, and this machine has 1: fewer workers"):
        Workers(2).check_device("cuda", timed=True)
    Workers(2, address="auto").check_device("cuda", timed=True)


def test_who_answers_is_no_part_of_the_identity(plain: Settings) -> None:
    alone = settings({"tasks": ["embedded_counting"], "batch_size": 3, "latency": "off", "device": "cpu"})
    assert alone.spec == plain.spec and (alone.workers.count, plain.workers.count) == (0, 2)


def made_with(count: int, folder: Path, name: str = "") -> tuple[RunRecord, list[dict[str, Any]]]:
    dials = {"tasks": ["embedded_counting"], "limit": 24, "batch_size": 4, "latency": "off", "device": "cpu"}
    made = settings({**dials, "workers": count, "results": str(folder / (name or str(count)))})
    record = run(made)
    for result in record.results.values():
        result.wall_s = 0.0
    return record, read_samples(made.folder, "embedded_counting")


@pytest.mark.parametrize(
    "count", [2, pytest.param(1, marks=pytest.mark.exhaustive), pytest.param(3, marks=pytest.mark.exhaustive)]
)
def test_the_record_is_the_same_to_the_bit(count: int, tmp_path: Path) -> None:
    alone, samples = made_with(0, tmp_path)
    many, theirs = made_with(count, tmp_path)
    workers.dismiss()
    assert (many.spec, many.results, many.cost, theirs) == (alone.spec, alone.results, alone.cost, samples)
    documents = [int(entry["documents"]["embedded_counting"], 16) for entry in many.environment["answered_by"]]
    assert sum(documents) == 2**24 - 1, "each document was answered by one of them"
    devices = {one["device"] for record in (alone, many) for one in record.environment["answered_by"]}
    assert devices == {processor()} == {alone.environment["device_name"], many.environment["device_name"]}
    elsewhere = next((tmp_path / str(count)).glob("runs/*/answers.jsonl"))  # half of it was answered on another machine
    first, second = (lines := elsewhere.read_text().splitlines(True))[:12], lines[12:]
    first = [json.dumps(json.loads(line) | {"sum": None, "by": {"device": "Other CPU"}}) + "\n" for line in first]
    elsewhere.write_text("".join([*first, *second]))
    (elsewhere.parent / "record.json").unlink()
    assert made_with(0, tmp_path, str(count))[0].environment["device_name"] == " + ".join(
        sorted(["Other CPU", processor()])
    )
