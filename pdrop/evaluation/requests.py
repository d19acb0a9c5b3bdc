"""lmms-eval's requests, turned into questions that know where their images are.

Each request is taken with its own task and split: lmms-eval pools the requests of all tasks that are run together.
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

REPEATS = 1000  # a repeated request is a question of its own; more than so many requests has no document


@dataclass(frozen=True)
class Glance:
    """What can be told of a question's pictures without decoding them.

    Attributes:
        sizes: (width, height) of each, in the order of the question's.
        named: Whether a document only names their files, whose content may change.
        films: Those of them that are none, but videos.
    """

    sizes: tuple[tuple[int, int], ...]
    named: bool = False
    films: tuple[Film, ...] = ()

    @classmethod
    def of(cls, visuals: Sequence[Any], named: bool = False) -> Glance:
        """Of pictures that are decoded, and films."""
        films = tuple(one for one in visuals if isinstance(one, Film))
        return cls(tuple(size_shown(one) for one in visuals if not isinstance(one, Film)), named or bool(films), films)


@dataclass(frozen=True)
class DocumentPictures:
    """The pictures of a document, as a question about it has them: what Question.images is, where a task asks it.

    Attributes:
        visual: The task's code that takes them out of a document; None: there are none.
        document: Gives the document, its pictures decoded.
        blank: Gives it with blank pictures of the same sizes.
        identity: Task and data: equal ones have equal pictures, as long as the task's files do not change.
    """

    visual: Callable[[Any], Any] | None
    document: Callable[[], Any]
    blank: Callable[[], Any]
    identity: str

    @classmethod
    def of(cls, task: Any, doc_id: int, name: str, data: str) -> DocumentPictures:
        """Those of a document of a task (lmms-eval's).

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
        """Decode them; what a task names by its file is a picture, or a film, which is not decoded yet."""
        found: list[Any] = []
        for given in self._given(self.document):
            if isinstance(given, Path):
                picture = None if given.is_dir() else read(given)
                found.append(Film(given) if picture is None else picture)
            else:
                found.append(given)
        return found

    def glance(self) -> Glance:
        """Their sizes, by their files' headers. The task's code is run on blank pictures; where it does not take them,
        they are decoded."""
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
        except Exception:  # whatever code makes of a picture that is none; the real ones raise what is wrong with them
            return Glance.of(self(), named=True)
        return Glance(tuple(sizes), named, tuple(films))

    def _given(self, document: Callable[[], Any]) -> Iterator[Any]:
        """What the task's code takes out of a document: pictures, and paths of files that are there."""
        for given in (self.visual(scaled(document())) if self.visual else None) or []:
            if isinstance(given, (str, Path)):
                if not (path := Path(given)).exists():
                    raise ValueError(f"no picture or video {path}: the task's data is not all here")
                yield path
            elif given is not None:
                yield given


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
