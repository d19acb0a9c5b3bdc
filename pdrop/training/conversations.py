"""LLaVA's conversation data: a JSON list of records and a folder of images, checked when loaded, read lazily.

    [{"id": "7", "image": "train2017/7.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]}, ...]

`image` is one path or a list of them (relative to the image folder), and absent in a text-only record; `<image>` marks
the place of each. A `.jsonl` file has one record per line. As in LLaVA's own loader, a record's first turn is left out
if it is not the human's, and the mark of a record's only image is moved to the front of its turn.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pdrop.evaluation.prompts import PLACEHOLDER
from pdrop.pictures import check, opened

HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")
NAMED = 3  # how many of the faulty records an error names


@dataclass(frozen=True)
class Turn:
    """A question with `<image>` at the places of images, and its answer, which is None at the end of some records."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Record:
    """One conversation. `name` identifies it in error messages."""

    name: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


class Conversations:
    """The records of a file: kept as the bytes of their JSON, which loader processes share; parsed on access.

    Args:
        path: The .json or .jsonl file.
        folder: Where the images are; None: where the file is.

    Raises:
        ValueError: If the file has another format, or records are faulty: names the first of them, with the remedy.
    """

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path, self.folder = path, path.parent if folder is None else folder
        kept, self._ends, faults, number = bytearray(), array("Q"), [], 0
        self.lengths: list[int] = []  # words and images, negative for text-only records
        digest = hashlib.sha256()
        for number, data in enumerate(read(path), start=1):
            name = self._name(number - 1, data)
            try:
                record = parse(data, name, self.folder)
                for image in record.images:
                    size = _checked_size(image, name, self.folder)
                    listed = image.relative_to(self.folder) if image.is_relative_to(self.folder) else image
                    digest.update(f"{listed}:{size}\n".encode())
            except ValueError as fault:
                faults.append(str(fault))
                continue
            line = json.dumps(data).encode()
            digest.update(line)
            kept += line
            self._ends.append(len(kept))
            words = sum(len(f"{turn.question} {turn.answer or ''}".split()) for turn in record.turns)
            self.lengths.append(words + 128 * len(record.images) if record.images else -words)
        if faults:
            more = f" (and {len(faults) - NAMED} more records)" if len(faults) > NAMED else ""
            raise ValueError("; ".join(faults[:NAMED]) + more)
        if not number:
            raise ValueError(f"{path}: there is no record in it")
        self._bytes = bytes(kept)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        first = self._ends[index - 1] if index else 0
        data = json.loads(self._bytes[first : self._ends[index]])
        return parse(data, self._name(index, data), self.folder)

    def _name(self, index: int, data: Any) -> str:
        own = f" (id {data['id']})" if isinstance(data, Mapping) and "id" in data else ""
        return f"{self.path.name}, record {index}{own}"


def read(path: Path) -> Iterator[Any]:
    """The unchecked records of a .json or .jsonl file.

    Raises:
        ValueError: If the file is missing or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; train.data is a .json or .jsonl file in LLaVA's conversation format")
    if path.suffix == ".jsonl":
        with path.open(encoding="utf8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _decode(line, f"{path}, line {number}")
        return
    data = _decode(path.read_text(encoding="utf8"), str(path))
    if not isinstance(data, list):
        raise ValueError(f"{path}: a list of records is expected, not {type(data).__name__}; one record a line: .jsonl")
    yield from data


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): write it again") from error


def parse(data: Any, name: str, folder: Path) -> Record:
    """One record, checked, except that its images exist.

    Raises:
        ValueError: Naming the record, what is wrong and the remedy.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: a record is an object with `conversations`, not {type(data).__name__}")
    if "video" in data:
        raise ValueError(f"{name}: videos are not supported; leave the record out")
    listed = data.get("image", data.get("images")) or []
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list) or not all(isinstance(image, str) for image in listed):
        raise ValueError(f"{name}: `image` is a path or a list of paths, not {listed!r}")
    spoken = data.get("conversations")
    if not isinstance(spoken, list) or not spoken:
        raise ValueError(f"{name}: it has no `conversations`; give it a list of turns, human and gpt by turns")
    turns = _turns(spoken, name)
    marked = sum(turn.question.count(PLACEHOLDER) for turn in turns)
    if marked != len(listed):
        raise ValueError(
            f"{name}: its questions mark {marked} images with {PLACEHOLDER}, but `image` lists {len(listed)}; "
            "mark each image once"
        )
    if len(listed) == 1:
        turns = [Turn(_to_front(turn.question), turn.answer) for turn in turns]
    if all(turn.answer is None for turn in turns):
        raise ValueError(f"{name}: nothing is answered in it, so it teaches nothing; leave the record out")
    return Record(name, tuple(folder / image for image in listed), tuple(turns))


def _turns(spoken: list[Any], name: str) -> list[Turn]:
    said = []
    for number, turn in enumerate(spoken):
        who, value = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if who not in HUMAN + MODEL or not isinstance(value, str):
            raise ValueError(f'{name}: turn {number} is not of the form {{"from": "human" or "gpt", "value": "..."}}')
        if who in MODEL and (PLACEHOLDER in value or not value.strip()):
            what = f"marks an image with {PLACEHOLDER}" if value.strip() else "is empty"
            raise ValueError(f"{name}: turn {number}, an answer, {what}; mend it or leave the record out")
        said.append((who in HUMAN, value.strip()))
    if said and not said[0][0]:
        said = said[1:]
    for number, (human, _) in enumerate(said):
        if human != (number % 2 == 0):
            raise ValueError(f"{name}: human and gpt do not take turns (turn {number}); merge or split its turns")
    values = [value for _, value in said]
    return [Turn(q, values[2 * n + 1] if 2 * n + 1 < len(values) else None) for n, q in enumerate(values[::2])]


def _to_front(question: str) -> str:
    if PLACEHOLDER not in question:
        return question
    return f"{PLACEHOLDER}\n{question.replace(PLACEHOLDER, '').strip()}".strip()


def _checked_size(image: Path, name: str, folder: Path) -> int:
    """Bytes of the file, which begins as an image that can be shown: its header is read, its pixels are not."""
    if not image.is_file():
        raise ValueError(f"{name}: there is no image {image}; train.images is the folder of images (now {folder})")
    try:
        with opened(image, whole=False) as picture:
            check(picture)
            return image.stat().st_size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {image} cannot be read ({error}); replace it or leave the record out") from error
