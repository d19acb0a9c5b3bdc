"""A task's documents: hashes of their data, which of them are scored together, the sizes of their pictures.

Works on the stored rows (Arrow), so that an image is hashed as its file's bytes and never decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Hashable, Mapping
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from pdrop.pictures import size_shown

GROUP_COLUMN = "question_id"  # documents next to each other that share it are scored together (MME's pairs)
LARGEST_GROUP = 8  # a column whose values repeat more often does not mark groups
CIRCLE_COLUMN, CIRCLE = "index", 1_000_000  # MMBench: rotation r of question i has index i + r * CIRCLE
SET_COLUMNS = ("category", "subcategory", "set_id")  # HallusionBench: figures and questions of one set
PAIR_COLUMN = "Index"  # MMVP: rows 1 and 2, 3 and 4, ...
FOUR_COLUMNS = ("Index", "Question_Type")  # NaturalBench: two questions about each of two pictures
IMAGE_COLUMNS = ("image_id", "imageId")
_SEEN: dict[str, dict[int, tuple[str, str | None]]] = {}  # by fingerprint: hashed once per process


class Documents:
    """The documents that a task evaluates, in its order.

    Args:
        dataset: A `datasets.Dataset`.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._rows = dataset.with_format("arrow")
        self._seen = _SEEN.setdefault(dataset._fingerprint, {})

    def __len__(self) -> int:
        return len(self._dataset)

    def first(self, limit: int | None) -> list[int] | None:
        """The first documents, in whole groups, until there are at least `limit`.

        Returns:
            Their numbers, ascending; None: all documents.
        """
        if limit is None or limit >= len(self):
            return None
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for doc_id, group in enumerate(self.groups or range(len(self))):
            groups[doc_id if group is None else group].append(doc_id)
        chosen: list[int] = []
        for members in groups.values():
            if len(chosen) >= limit:
                break
            chosen += members
        return sorted(chosen) if len(chosen) < len(self) else None

    @cached_property
    def groups(self) -> list[str | None] | None:
        """A group name for each document, shared by those that are scored together; None if there are no groups."""
        columns = self._dataset.column_names
        if CIRCLE_COLUMN in columns:
            index = self._column(CIRCLE_COLUMN)
            if any(isinstance(number, int) and number >= CIRCLE for number in index):
                return [str(number % CIRCLE) for number in index]
        if set(SET_COLUMNS) <= set(columns):
            return [" ".join(map(str, row)) for row in zip(*map(self._column, SET_COLUMNS))]
        if set(FOUR_COLUMNS) <= set(columns):
            return [str(int(number) // 4) for number in self._column(FOUR_COLUMNS[0])]
        if {PAIR_COLUMN, "Correct Answer"} <= set(columns):
            return [str(place // 2) for place in range(len(self))]
        if GROUP_COLUMN in columns:
            return runs_of(self._column(GROUP_COLUMN))
        return None

    def group(self, doc_id: int) -> str | None:
        """The name of the group that this document is scored with; None if it is scored alone."""
        return None if self.groups is None else self.groups[doc_id]

    def data(self, doc_id: int) -> str:
        """Hash of the whole document, pixels included."""
        return self._read(doc_id)[0]

    def image_group(self, doc_id: int) -> str | None:
        """A key shared by documents about the same picture: its id if there is one, else a hash of its file."""
        return self._read(doc_id)[1]

    def blank(self, doc_id: int) -> Any:
        """The document as a task's code gets it, but with blank pictures of the same sizes, so none is decoded."""
        return blanked(self._rows[doc_id].to_pylist()[0], self._dataset.features)

    def _column(self, name: str) -> list[Any]:
        found: list[Any] = self._rows.select_columns([name])[:][name].to_pylist()
        return found

    def _read(self, doc_id: int) -> tuple[str, str | None]:
        if doc_id not in self._seen:
            row = self._rows[doc_id].to_pylist()[0]
            pictures: list[str] = []
            text = json.dumps(_digest(row, pictures), sort_keys=True, default=str)
            named = [str(row[column]) for column in IMAGE_COLUMNS if row.get(column) not in (None, "")]
            group = next(iter(named + pictures), None)
            self._seen[doc_id] = hashlib.sha256(text.encode()).hexdigest()[:16], group
        return self._seen[doc_id]


def runs_of(values: list[Any]) -> list[str | None] | None:
    """A name for each run of 2 to LARGEST_GROUP equal neighbours; None for a value without equal neighbours."""
    found: list[str | None] = []
    for value, same in groupby(values):
        length = len(list(same))
        found += [f"{value} {len(found)}" if 1 < length <= LARGEST_GROUP else None] * length
    return found if any(name is not None for name in found) else None


def blanked(value: Any, feature: Any) -> Any:
    """A stored value with each picture in it replaced by a blank one of its displayed size.

    Args:
        value: As stored: a picture is the bytes or the path of its file.
        feature: Its feature type in `datasets`.
    """
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.Image):
        source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
        with Image.open(source) as image:
            return Image.new("RGB", size_shown(image))
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: blanked(item, feature[name]) for name, item in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [blanked(item, inner) for item in value]
    return value


def _digest(value: Any, pictures: list[str]) -> Any:
    """`value` with image and other files replaced by hashes, which are also added to `pictures`."""
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            content = value["bytes"]
            if content is None and value["path"] is not None and Path(value["path"]).is_file():
                content = Path(value["path"]).read_bytes()
            if content is not None:
                pictures.append(hashlib.sha256(content).hexdigest()[:16])
                return pictures[-1]
        return {key: _digest(item, pictures) for key, item in value.items()}
    if isinstance(value, list):
        return [_digest(item, pictures) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    return value
