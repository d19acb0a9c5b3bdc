"""Score a checkpoint under a method on lmms-eval's tasks. Only this file imports lmms-eval, and only when used.

Tasks, prompts and metrics are lmms-eval's; generation, storage and records are ours. Its model wrappers mix up the
images of tasks asked together, score a crashed generation as an empty answer, and delete the model after each call;
its caches return one method's answers for another. So: an adapter of our own, one `simple_evaluate` call per task,
fresh task objects, answers stored after every batch.

    settings = compose.settings({"model": "llava_1_5_7b", "method": "pyramiddrop", "tasks": ["pope"]})
    found = evaluate(settings.load(), settings.method, settings.schedule, settings.spec, Path("out"))
    found.results["pope"].scores["pope_f1_score"].value

The same adapter serves lmms-eval's own command line (see pdrop/cli/lmms_command.py):

    python -m lmms_eval --model pdrop --model_args pretrained=...,method=pyramiddrop,ratio=0.5 --tasks pope
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pdrop import thumbnails
from pdrop.evaluation import generation_arguments, grounding, official, task_index
from pdrop.evaluation.answers import Answer, AnswerStore, Question, answered_by
from pdrop.evaluation.containment import contained_import, random_state_kept, task_code
from pdrop.evaluation.documents import Documents
from pdrop.evaluation.frames import Film
from pdrop.evaluation.progress import Progress, progress_line
from pdrop.evaluation.requests import QuestionReader
from pdrop.evaluation.results import Evaluation, Rules, task_result
from pdrop.evaluation.task_checks import check_aggregations, check_target, not_utf8
from pdrop.names import check as check_name
from pdrop.pace import Pace
from pdrop.pictures import take_long_texts
from pdrop.samples import write_samples

if TYPE_CHECKING:
    from pdrop.evaluation.generation import Answered
    from pdrop.evaluation.prefetch import Preparation
    from pdrop.methods.base import Method
    from pdrop.models.checkpoint import Checkpoint
    from pdrop.record import RunSpec
    from pdrop.schedule import Schedule

__all__ = ["Evaluation", "check_tasks", "evaluate", "manifest"]

log = logging.getLogger(__name__)

Ask = Callable[[list[Question]], list[Answer]]


def check_tasks(tasks: Sequence[str], task_dirs: Sequence[str | Path] = ()) -> None:
    """Refuse unknown tasks and generation arguments, before any model is loaded.

    Raises:
        ValueError: Naming the unknown ones and close matches.
    """
    generation_arguments.check(tasks, task_dirs)
    check_aggregations(tasks, task_dirs)


class Answering(Protocol):
    """Answers questions: pdrop.evaluation.generation.Generator in this process, or several in worker processes."""

    def answer(
        self, questions: Sequence[Question], store: AnswerStore | None = None, progress: Progress | None = None
    ) -> Answered:
        """The answers, in order; those not in the store are generated and stored."""
        ...


@functools.cache
def check_data(tasks: tuple[str, ...], folders: tuple[str, ...], files: str) -> None:
    """Load the data of the user's own tasks before any model is loaded, since their files may be wrong.

    Args:
        tasks: Names; lmms-eval's tasks and ours are skipped.
        folders: Folders with the user's own tasks.
        files: Digest of their files, so that each version is checked once per process.

    Raises:
        ValueError: Naming the task.
    """
    found = task_index.find(tasks, folders)
    own = [name for name, paths in found.items() if not all(task_index.is_shipped(path.parent) for path in paths)]
    try:
        if own:
            load_tasks(own, folders)
    except RuntimeError as error:
        told = not_utf8(path.parent for name in own for path in found[name])
        raise ValueError("; ".join([str(error), *told])) from error


def evaluate(
    checkpoint: Checkpoint | None,
    method: Method | None,
    schedule: Schedule,
    spec: RunSpec,
    folder: Path,
    *,
    task_dirs: Sequence[str | Path] = (),
    progress: bool | Progress = False,
    generator: Answering | None = None,
    boxes: str | None = None,
    preparation: Preparation | None = None,
) -> Evaluation:
    """Score tasks, or resume a killed run.

    Args:
        checkpoint: From ModelSource.load or pdrop.models.checkpoint.load; None if `generator` has its own.
        method: Ranks the visual tokens; None with an empty schedule drops nothing.
        schedule: Where and how many.
        spec: What is asked and how. Its tasks are tasks, or groups whose tasks each get their own result; its limit
            never splits samples that are scored together.
        folder: The run's own folder: answers.jsonl and samples.zip (pdrop/samples.py) are written there, and small
            pictures into the store (pdrop/thumbnails.py).
        task_dirs: Folders with the user's own tasks; they shadow lmms-eval's.
        progress: True for a line on stderr, or a function of (task, answered, total), called after each batch.
        generator: Answers the questions instead of this process.
        boxes: The family whose prompt for boxes is used, if a task asks for boxes (grounding.py); None: the
            checkpoint's.
        preparation: How prompts come to this process's model; None: as conf/run.yaml has it.

    Raises:
        ValueError: For unknown tasks or wrong arguments.
        RuntimeError: If a question (task and doc_id are named) or a task's own code fails.
    """
    from pdrop.evaluation.generation import Generator

    spec.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE > 1: a run is started as one process; workers=8 answers with many")
    if generator is None:
        assert checkpoint is not None
        generator = Generator(checkpoint, method, schedule, spec, preparation)
    store = AnswerStore(folder / "answers.jsonl")
    everything: list[Question] = []

    def answer(questions: list[Question], line: Progress | None) -> Answered:
        everything.extend(questions)
        return generator.answer(questions, store, line)

    if boxes is None and checkpoint is not None:
        boxes = grounding.family_of(spec.tasks, checkpoint.model.config.model_type)
    evaluation = scored_answers(spec, answer, folder, task_dirs, progress, boxes)
    evaluation.answered_by = answered_by(store, everything)
    for task, result in evaluation.results.items():
        own = {question.doc_id: question for question in everything if question.task == task}
        thumbnails.keep(folder, task, result.data_hash, {n: _blamed(question) for n, question in own.items()})
    return evaluation


def _blamed(question: Question) -> Callable[[], Sequence[Any]]:
    """A function that returns a question's pictures, with errors that name the question. Empty for a film: runs show
    different frames of it, and the thumbnails are shared by runs."""
    from pdrop.evaluation.batching import blame

    def images() -> Sequence[Any]:
        with blame([question]):
            found = question.images()
            return [] if any(isinstance(one, Film) for one in found) else found

    return images


def scored_answers(
    spec: RunSpec,
    answer: Callable[[list[Question], Progress | None], Answered],
    folder: Path,
    task_dirs: Sequence[str | Path] = (),
    progress: bool | Progress = False,
    boxes: str | None = None,
) -> Evaluation:
    """Score the answers to a run's questions and write its samples.

    Args:
        spec: The run's.
        answer: Function that returns the answers to a task's questions; it gets a progress function.
        folder: The run's.
        task_dirs: Folders with the user's own tasks.
        progress: See `evaluate`.
        boxes: The family whose prompt for boxes was used, if a task asks for boxes.

    Raises:
        ValueError, RuntimeError: As `evaluate`.
    """
    evaluation = Evaluation()
    samples: dict[str, list[dict[str, Any]]] = {}
    tasks, pace = load_tasks(spec.tasks, task_dirs, spec.wrapper), Pace("", "questions")
    for name, task in tasks.items():
        started = time.perf_counter()
        asked: dict[tuple[int, int], Answer] = {}

        def ask(questions: list[Question], line: Progress | None) -> list[Answer]:
            questions = [grounding.asked(question, boxes) for question in questions]
            answered = answer(questions, line)
            asked.update(zip(((q.doc_id, q.idx) for q in questions), answered.answers))  # noqa: B023
            evaluation.asked += answered.asked
            evaluation.reused += answered.reused
            return answered.answers

        with task_code(name, "its documents cannot be read"):
            documents = Documents(task.eval_docs)
            rows = documents.first(spec.limit)
        with progress_line(name, progress, pace) as line:
            output = score(task, functools.partial(ask, line=line), rows=rows, seed=spec.seed, folder=folder)
        with task_code(name, "its scores cannot be read"):
            result, scored = task_result(output, name, documents, asked, rules_of(task, folder), rows, boxes)
        if spec.protocol == "official":
            result.main_metric = official.main_metric(name, result.scores) or result.main_metric
        result.wall_s = time.perf_counter() - started
        samples[name] = scored
        evaluation.results[name] = result
        evaluation.prompts += [given.size for _, given in sorted(asked.items())]
    write_samples(folder, samples)
    return evaluation


def load_tasks(
    names: Sequence[str], task_dirs: Sequence[str | Path] = (), wrapper: str | None = None
) -> dict[str, Any]:
    """Fresh lmms-eval Task objects (a used one keeps overrides of its last run), groups expanded, in order.

    Args:
        names: Tasks, groups or tags.
        task_dirs: Folders with the user's own tasks.
        wrapper: The name of the lmms-eval model for which tasks choose their prompts; None: their default prompts.

    Code that their files name (`!function`) is executed; for folders other than ours and lmms-eval's this is logged.

    Raises:
        ValueError: For unknown names, and generation arguments that are not supported.
        RuntimeError: If a task's data cannot be loaded.
    """
    found = task_index.find(names, task_dirs)
    for folder in sorted({path.parent for paths in found.values() for path in paths}):
        if not task_index.is_shipped(folder):
            warn_of_code(folder)
    evaluator = import_lmms_eval()
    managers: dict[tuple[str, ...], Any] = {}
    tasks: dict[str, Any] = {}
    for name, paths in found.items():
        folders = tuple(dict.fromkeys(str(path.parent) for path in paths))
        with task_code(name, "its data cannot be loaded"):
            if folders not in managers:
                managers[folders] = evaluator.TaskManager(
                    include_defaults=False, include_path=list(folders), model_name=wrapper
                )
            made = _flatten(evaluator.get_task_dict([name], managers[folders], "simple"))
        tasks |= made
        if not all(task_index.is_shipped(path.parent) for path in paths):
            for task in made.values():
                check_target(task)
    stops = generation_arguments.with_stops(path for paths in found.values() for path in paths)
    for name, task in tasks.items():  # the files were checked before; what their code makes of them was not
        check_name("a task", name)
        if "generate" in str(task.OUTPUT_TYPE):
            if name not in stops:
                task.config.generation_kwargs.pop("until", None)
            arguments = generation_arguments.of_task(name, task.config.generation_kwargs)
            if arguments.contradiction is not None:
                log.warning("task %s: %s", name, arguments.contradiction)
    return tasks


@functools.cache
def warn_of_code(folder: Path) -> None:
    """Log, once per process, that the tasks of a folder execute code."""
    log.warning(
        "%s: lmms-eval runs the Python code that its task files name (!function); take tasks from whom you trust",
        folder,
    )


def _flatten(tasks: dict[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, task in tasks.items():
        flat |= _flatten(task) if isinstance(task, dict) else {str(name): task}
    return flat


def score(task: Any, ask: Ask, *, rows: list[int] | None, seed: int, folder: Path) -> dict[str, Any]:
    """One `simple_evaluate` call for one task. The random state of the process is restored.

    Args:
        task: Fresh.
        ask: Answers questions.
        rows: The documents to ask, ascending; None: all. lmms-eval only takes the first documents of a task, so for
            others it gets a task that is reduced to them.
        seed: Seed of the task's own random draws.
        folder: Where tasks may put files.

    Raises:
        RuntimeError: From asking, or from the task's own scoring.
    """
    evaluator, name = import_lmms_eval(), task.config.task
    limit = None if rows is None else len(rows)
    if rows is not None and rows != list(range(len(rows))):
        split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        for dataset in {id(one): one for one in (task.dataset, task.dataset_no_image)}.values():
            dataset[split] = dataset[split].select(rows)
    options = argparse.Namespace(
        process_with_media=False, reasoning_tags=None, output_path=str(folder), agentic_trace_mode="basic"
    )
    with random_state_kept(), task_code(name, "its scoring failed"):
        output: dict[str, Any] = evaluator.simple_evaluate(
            model=adapter()(ask, rows),
            tasks=[task],
            task_manager=object(),  # the task is built already; None would index 2000 files
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            cli_args=options,
            process_docs_parallel=1,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="WARNING",
        )
        return output


def rules_of(task: Any, folder: Path) -> Rules:
    """The task's own aggregations, and MMBench's rule for an answer, from which the parts of scores are found."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    functions, mmbench = task.aggregation(), MMBench_Evaluator()
    options = argparse.Namespace(output_path=str(folder))

    def aggregate(metric: str, entries: list[Any]) -> Any:
        more = {"args": options} if "args" in inspect.signature(functions[metric]).parameters else {}
        with contextlib.redirect_stdout(io.StringIO()):  # its messages about the whole set have been printed already
            return functions[metric](entries, **more)

    def choice(entry: Mapping[str, Any]) -> bool:
        read = mmbench.prefetch_answer(entry)
        letters = sorted(mmbench.build_choices(entry))
        return bool((read or extract_mcq_answer(entry["prediction"], choices=letters)) == entry["answer"])

    return Rules(aggregate, choice)


@functools.cache
def import_lmms_eval() -> Any:
    """lmms-eval's evaluator module, imported without side effects on the process.

    Takes 10 s the first time.

    Raises:
        ValueError: If torchvision was built for another torch.
    """
    take_long_texts()
    with contained_import():
        from lmms_eval import evaluator
    return evaluator


@functools.cache
def adapter() -> type:
    """The model class for lmms-eval; made on first use because its base class is lmms-eval's."""
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    class PdropModel(lmms):  # type: ignore[misc]
        """Turns lmms-eval's requests into questions and answers back into what it expects."""

        is_simple = True  # requests carry the task's text and images; the chat kind cannot ask for likelihoods
        accelerator = None  # one process: none is needed

        def __init__(self, ask: Ask, rows: Sequence[int] | None = None) -> None:
            super().__init__()
            self._ask = ask
            self._reader = QuestionReader(rows)

        def clean(self) -> None:
            """Keep the model: the base class would delete it after every call."""

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """One generated text per request."""
            return [
                GenerationResult(a.text, TokenCounts(a.text_tokens + a.visual_tokens, a.answer_tokens))
                for a in self._answers(requests)
            ]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            """(loss, whether greedy) of given answers; wrapped, since lmms-eval 0.7.3 turns a bare pair into text."""
            return [GenerationResult(text=(a.loss, a.greedy)) for a in self._answers(requests)]

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            """Always raises: several rounds are not supported."""
            raise ValueError(f"task {requests[0].task_name} asks in several rounds, which is not supported yet")

        def _answers(self, requests: list[Any]) -> list[Answer]:
            return self._ask(self._reader.questions(requests, self.task_dict))

    return PdropModel


def manifest() -> Any:
    """Entry point of lmms-eval's group `lmms_eval.models`: makes `--model pdrop` known."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="pdrop", simple_class_path="pdrop.cli.lmms_command.PdropModel")
