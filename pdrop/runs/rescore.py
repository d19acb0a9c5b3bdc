"""Rescore a finished run's stored answers with the task's current code, without the model.

The answers are not changed; results and samples are recomputed with the installed lmms-eval and this version. The
replaced scores are kept in the record (`rescored`), with the time and the code version. A task that now asks something
else (another prompt, other generation arguments, other data) cannot be scored from these answers, and is refused.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pdrop.environment import versions
from pdrop.evaluation import task_index
from pdrop.evaluation.answers import AnswerStore, Question
from pdrop.identity import code_digest
from pdrop.record import RunRecord, TaskResult
from pdrop.samples import digest
from pdrop.store import locked, refuse_links

if TYPE_CHECKING:
    from pdrop.evaluation.generation import Answered
    from pdrop.evaluation.progress import Progress

log = logging.getLogger("pdrop")


@dataclass(frozen=True)
class Change:
    """A score that has changed; None if there was, or is, none."""

    task: str
    metric: str
    before: float | None
    after: float | None


def rescore(folder: Path, task_dirs: Sequence[str | Path] | None = None, write: bool = True) -> list[Change]:
    """Rescore a run's stored answers.

    Args:
        folder: The run's.
        task_dirs: Folders with the user's own tasks; None: those of the command that made the run.
        write: Whether to replace results and samples; otherwise only report what would change.

    Returns:
        The scores that differ.

    Raises:
        ValueError: If the run is not done, or its answers are missing or belong to other questions.
        RuntimeError: From the tasks' own code.
    """
    refuse_links(folder)
    record = RunRecord.read(folder)
    answers = folder / "answers.jsonl"
    if record.status != "done" or not record.spec.tasks:
        raise ValueError(f"{folder.name} has no scores ({record.status}): there is nothing to score anew")
    if not answers.is_file():
        raise ValueError(f"{folder.name}: its answers are not here ({answers}): copy them to it, or make it again")
    dirs = folders_of(record) if task_dirs is None else task_dirs
    with locked(folder), tempfile.TemporaryDirectory() as aside:
        return scored_anew(record, folder, folder if write else Path(aside), dirs)


def scored_anew(record: RunRecord, folder: Path, into: Path, task_dirs: Sequence[str | Path]) -> list[Change]:
    """The rescoring after all checks; the record is written where the samples are."""
    from pdrop.evaluation.lmms import scored_answers

    store, spec = AnswerStore(folder / "answers.jsonl"), record.spec

    def stored(questions: list[Question], progress: Progress | None) -> Answered:
        from pdrop.evaluation.generation import Answered

        if missing := [question for question in questions if question not in store]:
            raise ValueError(
                f"{folder.name}: task {missing[0].task} now asks document {missing[0].doc_id} something that was not "
                f"answered ({len(missing)} of {len(questions)} in all): its prompt, generation arguments or data have "
                "changed; make the run again"
            )
        return Answered([store[question] for question in questions], 0, len(questions))

    boxes = next((result.boxes for result in record.results.values() if result.boxes is not None), None)
    results = scored_answers(spec, stored, into, task_dirs, boxes=boxes).results
    changes = differences(record.results, results)
    for task, result in results.items():
        result.wall_s = record.results[task].wall_s if task in record.results else 0.0
    record.rescored.append(
        {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "sources": code_digest(),
            "versions": versions(),
            "task_files": task_index.digest(spec.tasks, tuple(map(str, task_dirs))),
            "before": {task: {m: s.value for m, s in old.scores.items()} for task, old in record.results.items()},
        }
    )
    record.results, record.samples_digest = results, digest(into)
    record.write(into)
    return changes


def differences(before: dict[str, TaskResult], after: dict[str, TaskResult]) -> list[Change]:
    """The scores that differ, in the order of the tasks."""
    found = []
    for task in dict.fromkeys([*before, *after]):
        old, new = (results[task].scores if task in results else {} for results in (before, after))
        for metric in dict.fromkeys([*old, *new]):
            values = [scores[metric].value if metric in scores else None for scores in (old, new)]
            if values[0] != values[1]:
                found.append(Change(task, metric, *values))
    return found


def folders_of(record: RunRecord) -> list[str]:
    """The folders with the user's own tasks that the run's command named."""
    given: list[Any] = [word.partition("=")[2] for word in record.command if word.startswith("task_folders=")]
    read = yaml.safe_load(given[-1]) if given else []
    return [str(one) for one in (read if isinstance(read, list) else [read])]
