"""Answers without a model: scoring of tasks in a second, with answers that are right, wrong and unreadable.

evaluation = scored(tmp_path / "run", ["mme", "pope"], tasks, [" Yes", "no.", "I cannot see it"])
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pdrop.evaluation.answers import Answer, AnswerStore, Question
from pdrop.evaluation.frames import Film, Sampling
from pdrop.evaluation.generation import Answered
from pdrop.evaluation.lmms import scored_answers
from pdrop.evaluation.progress import Progress
from pdrop.evaluation.results import Evaluation
from pdrop.record import ProtocolName, RunSpec
from tests.support.specs import spec_of

MESSY = ("Yes", "no", "No, there is none", "A", "B.", "(C)", "The answer is D.", "12", "red.", "choice B", "", "hm",
         "[0.1, 0.1, 0.4, 0.6]")  # fmt: skip


def scored(
    folder: Path,
    tasks: Sequence[str],
    task_dirs: Path,
    texts: Sequence[str] = MESSY,
    limit: int | None = None,
    boxes: str | None = None,
    protocol: ProtocolName = "checkpoint",
) -> Evaluation:
    """Tasks scored on these answers, spread over the questions by their numbers."""
    store = AnswerStore(folder / "answers.jsonl")

    def answer(questions: list[Question], progress: Progress | None) -> Answered:
        answers = [made_up(question, texts) for question in questions]
        store.add(zip(questions, answers))
        return Answered(answers, len(answers), 0)

    return scored_answers(spec(tasks, limit, protocol), answer, folder, [task_dirs], boxes=boxes)


def spec(tasks: Sequence[str], limit: int | None = None, protocol: ProtocolName = "checkpoint") -> RunSpec:
    asked = {"tasks": tuple(tasks), "limit": limit, "protocol": protocol}
    return spec_of(**asked, method="none", method_args="{}", schedule="")


def made_up(question: Question, texts: Sequence[str]) -> Answer:
    """One of the texts, or a likelihood; of 16 visual tokens of the whole picture 8 stay."""
    for image in question.images():
        assert image.show(Sampling()).frames if isinstance(image, Film) else image.width, "it is there"
    drawn = int(hashlib.sha256(f"{question.task} {question.doc_id} {question.idx}".encode()).hexdigest()[:8], 16)
    text = texts[drawn % len(texts)] if question.continuation is None else ""
    loss = None if question.continuation is None else drawn % 97 / 10
    seen = {"images": 1, "layout": [[[4, 4, 0, 0, 0, 1, 1]]]}
    return Answer(f"<image>{question.text}", text, 12, 16, 2, [16, 8], ["ff"], loss=loss, greedy=False, **seen)
