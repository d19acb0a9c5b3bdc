"""lmms-eval's requests, turned into questions that know where their images are.

Each request is taken with its own task and split: lmms-eval pools the requests of all tasks that are run together.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdrop.evaluation.answers import Question
from pdrop.evaluation.documents import Documents
from pdrop.evaluation.frames import Film
from pdrop.pictures import read, scaled

REPEATS = 1000  # a repeated request is a question of its own; more than so many requests has no document


class QuestionReader:
    """Turns requests into questions; remembers what it has hashed.

    Args:
        rows: The numbers in the whole task of the documents that are asked; None: as lmms-eval numbers them.
    """

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        self._rows = rows
        self._documents: dict[tuple[str, str], Documents] = {}

    def questions(self, requests: Sequence[Any], datasets: Mapping[str, Mapping[str, Any]]) -> list[Question]:
        """One question per request.

        Args:
            requests: lmms-eval Instances of the simple kind, all generations or all likelihoods.
            datasets: Task, split -> dataset.
        """
        asked: Counter[tuple[str, int, int]] = Counter()
        questions = []
        for request in requests:
            text, second, visual, doc_id, task, split = request.args
            dataset, place = datasets[task][split], (task, doc_id, request.idx)
            document = functools.partial(dataset.__getitem__, doc_id)
            if callable(second):
                second = second(document())
            generate = isinstance(second, dict)
            question = Question(
                task=task,
                doc_id=doc_id if self._rows is None else self._rows[doc_id],
                idx=request.idx + REPEATS * asked[place],
                text=text,
                images=functools.partial(_images, visual, document),
                arguments=second if generate else {},
                continuation=None if generate else str(second),
                data=self._data(task, split, dataset).data(doc_id),
            )
            questions.append(question)
            asked[place] += 1
        return questions

    def _data(self, task: str, split: str, dataset: Any) -> Documents:
        if (task, split) not in self._documents:
            self._documents[task, split] = Documents(dataset)
        return self._documents[task, split]


def images_of(task: Any, doc_id: int) -> list[Any]:
    """The pictures and films of a document of a task (lmms-eval's), as a question about it has them."""
    return _images(task.doc_to_visual, functools.partial(task.eval_docs.__getitem__, doc_id))


def _images(visual: Callable[[Any], Any] | None, document: Callable[[], Any]) -> list[Any]:
    """The document's pictures; what a task names by its file is a picture, or a film."""
    found: list[Any] = []
    for given in (visual(scaled(document())) if visual else None) or []:
        if isinstance(given, (str, Path)):
            if not (path := Path(given)).exists():
                raise ValueError(f"no picture or video {path}: the task's data is not all here")
            picture = None if path.is_dir() else read(path)
            found.append(Film(path) if picture is None else picture)
        elif given is not None:
            found.append(given)
    return found
