"""Turns lmms-eval's requests into questions that know their images.

Each request is matched with its own task and split: lmms-eval pools the requests of all tasks that run together.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from pdrop.evaluation.answers import Question
from pdrop.evaluation.documents import Documents
from pdrop.evaluation.frames import Film
from pdrop.pictures import FILMS, opened, read, scaled, size_shown

REPEATS = 1000  # each repeat of a request is a separate question; no document has more requests than this


@dataclass(frozen=True)
class Glance:
    """What is known about a question's pictures without decoding them.

    Attributes:
        sizes: (width, height) of each, in the question's order.
        named: Whether a document only names their files, whose content may change.
        films: Those that are videos instead.
    """

    sizes: tuple[tuple[int, int], ...]
    named: bool = False
    films: tuple[Film, ...] = ()

    @classmethod
    def of(cls, visuals: Sequence[Any], named: bool = False) -> Glance:
        """The glance at decoded pictures and films."""
        films = tuple(one for one in visuals if isinstance(one, Film))
        return cls(tuple(size_shown(one) for one in visuals if not isinstance(one, Film)), named or bool(films), films)


@dataclass(frozen=True)
class DocumentPictures:
    """The pictures of a document, for `Question.images` of a task's question.

    Attributes:
        visual: The task's code that extracts them from a document; None: there are none.
        document: Function that returns the document with decoded pictures.
        blank: Function that returns it with blank pictures of the same sizes.
        identity: Task and data: equal ones have equal pictures, as long as the task's files do not change.
    """

    visual: Callable[[Any], Any] | None
    document: Callable[[], Any]
    blank: Callable[[], Any]
    identity: str

    @classmethod
    def of(cls, task: Any, doc_id: int, name: str, data: str) -> DocumentPictures:
        """The pictures of a document of an lmms-eval task.

        Args:
            task: Loaded.
            doc_id: The document's number in it.
            name: The task's.
            data: Hash of the document.
        """
        found = task.eval_docs
        blank = functools.partial(_blank, found, doc_id)
        return cls(task.doc_to_visual, functools.partial(found.__getitem__, doc_id), blank, f"{name} {data}")

    def __call__(self) -> list[Any]:
        """Decode them; a file that the task names is a picture, or a film, which is not decoded yet."""
        found: list[Any] = []
        for given in self._given(self.document):
            if isinstance(given, Path):
                picture = None if given.is_dir() else read(given)
                found.append(Film(given) if picture is None else picture)
            else:
                found.append(given)
        return found

    def glance(self) -> Glance:
        """Their sizes, from their files' headers. The task's code is run on blank pictures; if it fails on these, the
        real pictures are decoded."""
        sizes: list[tuple[int, int]] = []
        films: list[Film] = []
        named = False
        try:
            for given in self._given(self.blank):
                named |= isinstance(given, Path)
                size = _size(given) if isinstance(given, Path) else given.size
                if size is None:
                    films.append(Film(given))
                else:
                    sizes.append(size)
        except Exception:  # the task's code may fail on a blank picture; if the real ones are wrong, they raise below
            return Glance.of(self(), named=True)
        return Glance(tuple(sizes), named, tuple(films))

    def _given(self, document: Callable[[], Any]) -> Iterator[Any]:
        """What the task's code extracts from a document: pictures, and paths of existing files."""
        for given in (self.visual(scaled(document())) if self.visual else None) or []:
            if isinstance(given, (str, Path)):
                if not (path := Path(given)).exists():
                    raise ValueError(f"no picture or video {path}: the task's data is not all here")
                yield path
            elif given is not None:
                yield given


class QuestionReader:
    """Turns requests into questions; caches the documents' hashes.

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
            documents, document = self._data(task, split, dataset), functools.partial(dataset.__getitem__, doc_id)
            if callable(second):
                second = second(document())
            generate, data = isinstance(second, dict), documents.data(doc_id)
            blank = functools.partial(documents.blank, doc_id)
            question = Question(
                task=task,
                doc_id=doc_id if self._rows is None else self._rows[doc_id],
                idx=request.idx + REPEATS * asked[place],
                text=text,
                images=DocumentPictures(visual, document, blank, f"{task} {data}"),
                arguments=second if generate else {},
                continuation=None if generate else str(second),
                data=data,
            )
            questions.append(question)
            asked[place] += 1
        return questions

    def _data(self, task: str, split: str, dataset: Any) -> Documents:
        if (task, split) not in self._documents:
            self._documents[task, split] = Documents(dataset)
        return self._documents[task, split]


def _blank(dataset: Any, doc_id: int) -> Any:
    return Documents(dataset).blank(doc_id)


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) of the picture in a file; None: it is a film."""
    if path.is_dir():
        return None
    try:
        with opened(path, whole=False) as image:
            return None if image.format in FILMS else size_shown(image)
    except UnidentifiedImageError:
        return None
