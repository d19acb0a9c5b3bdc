"""Small pictures of a task's first samples, kept in a store: overlays of kept tokens need no data set.

    results/pictures/<task>-<data hash>.zip       one member <doc_id>-<n>.jpg for each picture of a document

The hash is that of the task's documents in a record (`TaskResult.data_hash`): runs that were asked the same share the
file, and other data has another. Thumbnails follow from the documents and are no part of a run's identity;
a run's folder outside of a store (not below `runs/`) holds its own `pictures/`. The embedded tasks' pictures are in the
package and are not kept again; nor are frames of videos, of which each run shows its own.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pdrop.pictures import as_shown
from pdrop.store import write_atomically

SAMPLES = 8  # pictures are kept of this many samples of each task
MOST_PICTURES = 32  # of all of them together
LARGEST = 40_000  # bytes of each
SIDE = 448  # pixels of the longer side at first
PACKAGED = "embedded_"
HASH = re.compile(r"\w{1,64}")
MEMBER = re.compile(r"(\d{1,9})-(\d{1,3})\.jpg")


def place(folder: Path, task: str, data_hash: str) -> Path:
    """The file of the pictures of a run's task.

    Args:
        folder: The run's.
        task: The task.
        data_hash: Of its documents, as the record has it.
    """
    whole = folder.resolve()
    store = whole.parent.parent if whole.parent.name == "runs" else folder
    return store / "pictures" / f"{task}-{data_hash}.zip"


def keep(folder: Path, task: str, data_hash: str, documents: Mapping[int, Callable[[], Sequence[Any]]]) -> Path | None:
    """Keep the pictures of the first documents, unless they are kept already.

    Args:
        folder: The run's.
        task: The task.
        data_hash: Of its documents.
        documents: doc_id -> function that returns the document's pictures (see pdrop.evaluation.answers.Question).

    Returns:
        The file; None if there is nothing to keep.

    Raises:
        OSError: If it cannot be written.
        Exception: Whatever giving the pictures raises.
    """
    path = place(folder, task, data_hash)
    if task.startswith(PACKAGED) or path.is_file():
        return None
    members: list[tuple[str, bytes]] = []
    for doc_id in sorted(documents)[:SAMPLES]:
        pictures = documents[doc_id]()
        if len(members) + len(pictures) > MOST_PICTURES:
            break
        members += [(f"{doc_id}-{n}.jpg", small(picture)) for n, picture in enumerate(pictures)]
    if not members:
        return None
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, content in members:
            file.writestr(zipfile.ZipInfo(name), content)  # without a date: equal pictures, equal bytes
    write_atomically(path, buffer.getvalue())
    return path


def small(picture: Image.Image) -> bytes:
    """A picture as a JPEG of at most `LARGEST` bytes, in the best quality that fits."""
    shown = as_shown(picture)
    shown.thumbnail((SIDE, SIDE))
    while True:
        for quality in (88, 75, 60):
            buffer = io.BytesIO()
            shown.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= LARGEST:
                return buffer.getvalue()
        shown = shown.resize((max(1, shown.width // 2), max(1, shown.height // 2)))


def read(folder: Path, task: str, data_hash: str) -> dict[str, list[bytes]]:
    """The pictures kept for a run's task, JPEG files by doc_id; empty if there are none for this data.

    Raises:
        ValueError: If the file is damaged, or holds something else.
    """
    path = place(folder, task, data_hash)
    if not HASH.fullmatch(data_hash) or not path.is_file():
        return {}
    found: dict[str, dict[int, bytes]] = {}
    try:
        with zipfile.ZipFile(path) as file:
            for member in file.infolist():
                name = MEMBER.fullmatch(member.filename)
                if name is None or member.file_size > LARGEST:
                    raise ValueError(f"{path} holds {member.filename[:80]!r}, which is no small picture: delete it")
                content = file.read(member)
                with Image.open(io.BytesIO(content)) as picture:
                    if picture.format != "JPEG" or max(picture.size) > SIDE:
                        raise ValueError(f"{path} holds a picture that is not as runs keep them: delete it")
                found.setdefault(name[1], {})[int(name[2])] = content
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it; a run with force=true stores it again") from error
    return {doc_id: [held[n] for n in sorted(held)] for doc_id, held in found.items()}
