"""A task's documents: what identifies their data, and which of them belong together.

Works on the stored rows (Arrow), so that an image is hashed as its file's bytes and never decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP_COLUMN = "question_id"  # documents next to each other that share it are scored together (MME's pairs)
LARGEST_GROUP = 8  # a column that repeats more often than this is not such a mark
IMAGE_COLUMNS = ("image_id", "imageId")
_SEEN: dict[str, dict[int, tuple[str, str | None]]] = {}  # by the dataset's fingerprint: hashed once per process


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

    def whole_groups(self, limit: int | None) -> int | None:
        """`limit`, raised where it would split documents that are scored together; None stays None."""
        if limit is None or limit >= len(self) or GROUP_COLUMN not in self._dataset.column_names:
            return limit
        ids = self._rows.select_columns([GROUP_COLUMN])[: limit + LARGEST_GROUP][GROUP_COLUMN].to_pylist()
        more = sum(1 for i in range(limit, len(ids)) if all(x == ids[limit - 1] for x in ids[limit : i + 1]))
        return limit + more if more < LARGEST_GROUP else limit

    def data(self, doc_id: int) -> str:
        """Hash of the whole document, pixels included."""
        return self._read(doc_id)[0]

    def image_group(self, doc_id: int) -> str | None:
        """What documents about the same picture share: its id if there is one, else a hash of its pixels' file."""
        return self._read(doc_id)[1]

    def _read(self, doc_id: int) -> tuple[str, str | None]:
        if doc_id not in self._seen:
            row = self._rows[doc_id].to_pylist()[0]
            pictures: list[str] = []
            text = json.dumps(_digest(row, pictures), sort_keys=True, default=str)
            named = [str(row[column]) for column in IMAGE_COLUMNS if row.get(column) not in (None, "")]
            group = next(iter(named + pictures), None)
            self._seen[doc_id] = hashlib.sha256(text.encode()).hexdigest()[:16], group
        return self._seen[doc_id]


def _digest(value: Any, pictures: list[str]) -> Any:
    """`value` with the files of images and the like replaced by hashes, which are also put into `pictures`."""
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
