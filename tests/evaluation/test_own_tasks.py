"""Tasks of one's own, whose code and data do what they like: exit, separate lines, sample, show lying photos.

pytest tests/evaluation/test_own_tasks.py
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from analysis.overlays import overlay
from analysis.store.load import load_experiment, samples_of
from pdrop import thumbnails
from pdrop.cli import run
from pdrop.evaluation.answers import Question, QuestionError
from pdrop.evaluation.containment import task_code
from pdrop.evaluation.generation import blame
from pdrop.evaluation.lmms import evaluate
from pdrop.methods.base import Method
from pdrop.models.checkpoint import Checkpoint, load
from pdrop.record import read_lines, read_records
from pdrop.runs import timed_prompt
from pdrop.samples import read_samples
from pdrop.schedule import Schedule
from pdrop.timing import measure
from tests.contracts.test_pictures import photo
from tests.support.command_line import called
from tests.support.saved_checkpoints import save_llava
from tests.support.specs import spec_of

SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x1csix\rseven\neight"
YAML = """
task: mine
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: !function own.text
doc_to_visual: !function own.visual
doc_to_target: !function own.target
process_results: !function own.results
metric_list:
  - {{metric: hit, aggregation: !function own.mean, higher_is_better: true}}
generation_kwargs: {arguments}
"""
CODE = """
import sys

EXIT = {exit!r}

def leave(where):
    if where == EXIT:
        sys.exit(0)

def text(doc, *_):
    leave("doc_to_text")
    return doc["question"]

def visual(doc):
    leave("doc_to_visual")
    return [doc["photo"]]

def target(doc):
    leave("doc_to_target")
    return doc["question"]

def results(doc, answers):
    leave("process_results")
    return {{"hit": 1.0}}

def mean(hits):
    leave("aggregation")
    return sum(hits) / len(hits)

leave("import")
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the task; returns its folder."""

    def call(exit: str = "", arguments: str = "{max_new_tokens: 4}", name: str = "tasks") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        path = str(photo(tmp_path / "photo.jpg", 6))
        rows = [{"question": f"{number} {SEPARATORS}?", "photo": path} for number in range(2)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
        (folder / "mine.yaml").write_text(YAML.format(data=tmp_path / "data.parquet", arguments=arguments))
        (folder / "own.py").write_text(CODE.format(exit=exit))
        return folder

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    datasets.disable_progress_bars()
    return load(str(save_llava(tmp_path_factory.mktemp("own") / "llava")), name="tiny")


@pytest.fixture
def command(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Any]:
    """run.py on the tiny checkpoint and the task: (exit code, what was printed, the records)."""
    monkeypatch.chdir(tmp_path)
    quick = ["model=folder", "model.name=tiny", f"model.path={checkpoint.path}", "device=cpu", "layers=[1,2]"]

    def call(*words: str) -> tuple[int, str, list[Any]]:
        given = {word.split("=")[0] for word in words}
        defaults = ["latency=off", "tasks=mine", f"task_folders=[{tmp_path / 'tasks'}]"]
        words = (*(word for word in defaults if word.split("=")[0] not in given), *words)
        code, said = called(run.main, "run.py", (*quick, *words), monkeypatch, capfd)
        return code, said, list(read_records(tmp_path / "results" / "runs"))

    return call


# ------------------------------------------------------------------------------------------------ code that exits

WHERE = ["import", "doc_to_text", "doc_to_visual", "doc_to_target", "process_results", "aggregation"]


@pytest.mark.parametrize("where", WHERE)
def test_a_task_that_exits_fails_by_name(where: str, checkpoint: Checkpoint, write: Write, tmp_path: Path) -> None:
    folder = write(exit=where)
    with pytest.raises(RuntimeError, match=r"^task mine[,:].*it called sys\.exit\(0\)"):
        evaluate(checkpoint, None, Schedule(), spec_of(tasks=("mine",)), tmp_path / "run", task_dirs=[folder])
    torch.testing.assert_close(checkpoint.model.get_decoder().norm.weight, torch.ones(32))  # nothing stays attached


def test_an_exit_ends_no_run_as_if_it_were_done(command: Any, write: Write) -> None:
    write(exit="process_results")
    code, said, (record,) = command()
    assert code != 0 and record.status == "failed", said
    assert "task mine: its scoring failed: it called sys.exit(0)" in said.splitlines()[-1], said


@dataclass(frozen=True)
class Leaves(Method):
    """A method whose code ends the program."""

    observe: int = 0  # type: ignore[misc]  # a dial of the method whose place it takes

    def score(self, view: Any) -> Any:
        raise SystemExit(0)


def test_other_code_that_exits(command: Any, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    target = "method._target_=tests.evaluation.test_own_tasks.Leaves"
    code, said, (record,) = command("method=fastv", "layers=[1]", target, "+method.positions=original")
    assert code != 0 and record.status == "failed" and "sys.exit(0)" in said.splitlines()[-1], said
    for package in ("leaving_method", "leaving_tasks"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, said, records = command("method._target_=leaving_method.Method")
    assert code != 0 and len(records) == 1 and "leaving_method.Method: its code called sys.exit(0)" in said, said
    code, said, records = command("task_folders=['package://leaving_tasks/tasks']")
    assert code != 0 and len(records) == 1 and "package://leaving_tasks/tasks: it called sys.exit(0)" in said, said
    code, said, records = command("task_folders=['package://no_such_package/tasks']")
    assert code != 0 and len(records) == 1 and "no_such_package" in said and "Traceback" not in said, said


def test_what_a_user_stops_is_no_fault_of_the_task() -> None:
    for stop in (KeyboardInterrupt, GeneratorExit):
        with pytest.raises(stop), task_code("mine", "its scoring failed"):
            raise stop
        with pytest.raises(stop), blame([]):
            raise stop
    with pytest.raises(QuestionError), task_code("mine", "its scoring failed"):
        raise QuestionError("named already")


def test_an_iterator_that_is_closed_early_is_no_fault_of_a_question() -> None:
    questions = [Question("mine", n, 0, "What?", lambda: [], {"max_new_tokens": 1}) for n in range(2)]

    def asked() -> Iterator[int]:
        with blame(questions):
            yield 1

    opened = asked()
    next(opened)
    opened.close()


# ------------------------------------------------------------------------------------------------ data and arguments


def test_separators_of_lines_in_data_are_text(command: Any, write: Write, tmp_path: Path) -> None:
    write()
    code, said, (record,) = command()
    assert code == 0 and record.status == "done", said
    (one,) = load_experiment(tmp_path / "results", "all").runs
    assert one.samples("mine").doc_ids == ("0", "1")
    found = samples_of(one, "mine")
    assert [sample.question for sample in found.values()] == [sample.target for sample in found.values()]
    assert found["1"].target == f"1 {SEPARATORS}?"
    assert [row["target"] for row in read_samples(one.path, "mine", 5)] == [s.target for s in found.values()]
    path = tmp_path / "lines.jsonl"
    path.write_bytes("a\u2028b\r\n\nc".encode())
    assert read_lines(path) == ["a\u2028b\r", "", "c"]
    path.write_bytes(b"")
    assert read_lines(path) == []


def test_a_photo_is_scored_as_it_is_turned(command: Any, write: Write, tmp_path: Path) -> None:
    write()
    command()
    (one,) = load_experiment(tmp_path / "results", "all").runs
    (sample, _) = samples_of(one, "mine").values()
    assert sample.layout == [[[4, 4, 0, 0.0, 0.15, 1.0, 0.85]]], "the middle of 28 x 40 pixels, which stood as 40 x 28"
    kept = thumbnails.read(one.path, "mine", one.record.results["mine"].data_hash)
    assert list(kept) == ["0", "1"] and sample.image is None
    assert Image.open(io.BytesIO(kept["0"][0])).size == (28, 40), "kept as it is shown"
    (figure,) = [figure for _, figure in overlay.files([one], [], None)]
    assert f"all {sample.visual_tokens}" in [axes.get_title() for axes in figure.axes], "without a name of its picture"


def test_a_seed_is_a_run_of_its_own_where_answers_are_sampled(command: Any, write: Write, tmp_path: Path) -> None:
    write(arguments="{max_new_tokens: 6, temperature: 5.0}")
    for seed in (0, 1, 1):
        code, said, records = command("method=none", f"seed={seed}")
        assert code == 0, said
    assert sorted(record.spec.seed for record in records) == [0, 1]
    answers = {(tmp_path / "results/runs" / r.spec.folder / "answers.jsonl").read_text() for r in records}
    assert len(answers) == 2
    greedy = write(arguments="{max_new_tokens: 6, do_sample: true}", name="greedy")
    for seed in (0, 1):
        code, said, records = command("method=none", f"seed={seed}", f"task_folders=[{greedy}]")
    assert len(records) == 3 and "done already" in said, "nothing is drawn: one run"


def test_arguments_are_refused_before_the_model_is_looked_at(command: Any, write: Write) -> None:
    write(arguments="{max_gen_toks: 6}")
    code, said, records = command("model.path=/no/where")
    assert code != 0 and not records
    assert said.strip().startswith("error: task mine: generation_kwargs: max_gen_toks is not known"), said


# ------------------------------------------------------------------------------------------------ what is timed


def test_what_is_timed_is_bounded(command: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    timed: list[int] = []
    measured = measure.measure_prefill

    def noted(model: Any, inputs: Any, *given: Any) -> Any:
        timed.append(len(inputs["input_ids"]))
        return measured(model, inputs, *given)

    monkeypatch.setattr(measure, "measure_prefill", noted)
    quick = ["latency=quick", "latency.warmup=0", "latency.pairs=1", "latency.min_seconds=0"]
    code, said, (record,) = command("batch_size=1000000000", *quick)
    assert code == 0 and timed == [64], said
    assert record.spec.batch_size == 10**9 and record.spec.latency == "quick 0/1/0 batch 64"
    assert "what is timed is a batch of 64" in said
    code, said, records = command("batch_size=2", *quick)
    assert code == 0 and timed == [64, 2], said
    assert {record.spec.latency for record in records} == {"quick 0/1/0 batch 64", "quick 0/1/0"}


def test_nothing_is_built_where_nothing_is_timed(command: Any, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    built: list[int | None] = []
    build = timed_prompt.inputs

    def noted(*given: Any, batch: int | None = None) -> Any:
        built.append(batch)
        return build(*given, batch=batch)

    monkeypatch.setattr(timed_prompt, "inputs", noted)
    code, said, _ = command("batch_size=2000")
    assert code == 0 and built == [], said
    code, said, _ = command("batch_size=2000", "method=none", "latency=quick")
    assert code == 0 and built == [], "nothing is dropped: nothing is compared"
    code, said, records = command("batch_size=1000000000", "tasks=none")
    assert code == 0 and built == [], "the model's prompt is known: it is counted, not built"
    (counted,) = [record for record in records if not record.spec.tasks]
    assert counted.cost.samples == 1 and counted.cost.visual_tokens_per_layer == [16, 8, 4, 4]
    code, said, _ = command(
        "batch_size=2", "latency=quick", "latency.warmup=0", "latency.pairs=1", "latency.min_seconds=0"
    )
    assert code == 0 and built == [1, None], "one prompt to tell its size, and the batch that is timed"
