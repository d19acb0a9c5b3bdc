"""The samples of the report: questions, each run's answers and kept tokens, and the pictures, within a budget.

The first questions of each task are taken, as many as the budget of answers allows over all runs; the page says so.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pdrop import thumbnails
from pdrop.pictures import as_shown

from ..overlays.pictures import EMBEDDED
from ..store.load import Run
from ..store.samples import Sample, read

LARGEST = 448  # pixels of a picture's longer side on the page
PLAIN = 40_000  # bytes of a file that is put into the page unchanged
LONGEST = 2000  # characters of a question or an answer
Entry = list[Any]  # answer, score, kept masks, attention maps or nothing


def sample_data(
    runs: Sequence[Run], images: Path | None, budget: int, unreadable: list[str] | None = None
) -> dict[str, Any]:
    """Questions, answers by run and task, pictures, and a note on what was left out.

    Raises:
        ValueError: If a samples file cannot be read, and there is no list `unreadable` for the message.
    """
    done = [run for run in runs if run.done and run.record.results]
    lines = sum(len(run.record.results) for run in done)
    each = max(1, budget // lines) if lines else 0
    numbers: dict[str, int] = {}
    docs: list[dict[str, Any]] = []
    answers: dict[str, dict[str, dict[int, Entry]]] = {}
    wanted: dict[str, str | None] = {}
    kept: dict[str, bytes] = {}
    shown = there = 0
    for run in done:
        run_id = run.record.run_id
        for task, result in run.record.results.items():
            there += result.n
            try:
                found = read(run.path, run.record, task, each)
                small = {} if images is not None else named_pictures(run, task)
            except ValueError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
                continue
            for sample in found:
                own = small.get(sample.doc_id, {})
                kept |= own
                doc = document(sample, list(own))
                key = json.dumps([task, doc])
                if key not in numbers:
                    numbers[key] = len(docs)
                    docs.append(doc)
                    wanted |= dict.fromkeys(doc["images"], sample.image)
                held = answers.setdefault(run_id, {}).setdefault(task, {})
                held[numbers[key]] = entry(sample)
                shown += 1
    note = f"{shown:,} of {there:,} answers: the first {each} questions of each task." if shown < there else ""
    found_pictures = pictures(wanted, images) | {name: uri(file) for name, file in kept.items()}
    return {"docs": docs, "answers": answers, "images": found_pictures, "note": note}


def named_pictures(run: Run, task: str) -> dict[str, dict[str, bytes]]:
    """The pictures that the store keeps of a task's first samples, by doc_id, with a name for each of them.

    Raises:
        ValueError: If they cannot be read.
    """
    data = run.record.results[task].data_hash
    return {
        doc_id: {f"{task}/{data}/{doc_id}-{n}": file for n, file in enumerate(files)}
        for doc_id, files in thumbnails.read(run.path, task, data).items()
    }


def document(sample: Sample, kept: Sequence[str] = ()) -> dict[str, Any]:
    """The question with the places of its visual tokens; `kept` names the store's own pictures of it."""
    number = len(sample.layout) if sample.layout else 1
    names = [f"{sample.image}-{n}" for n in range(number)] if number > 1 else [sample.image]
    return {
        "id": sample.doc_id,
        "question": sample.question[:LONGEST],
        "target": sample.target[:LONGEST],
        "images": list(kept) or (names if sample.image else []),
        "layout": sample.layout,
        "tokens": sample.visual_tokens,
    }


def entry(sample: Sample) -> Entry:
    """An answer as the page reads it; attention maps are bytes, in proportion to the root of the weight."""
    shown: Entry = [sample.answer[:LONGEST], sample.score, list(sample.masks)]
    if sample.attention is not None:
        levels = np.sqrt(np.clip(sample.attention.maps, 0, 1)) * 255
        shown[2] = []
        shown.append([base64.b64encode(row.round().astype(np.uint8).tobytes()).decode() for row in levels])
    return shown


def pictures(wanted: dict[str, str | None], source: Path | None) -> dict[str, str]:
    """Data URIs of the pictures that are available, by the name that a document gives them.

    Raises:
        ValueError: If the source is neither a parquet file nor a folder.
    """
    path = source or EMBEDDED
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.is_file()}
        return {name: uri(files[name].read_bytes()) for name in wanted if name in files}
    if not path.is_file():
        raise ValueError(f"{path} is neither a parquet file nor a folder of images: give --images")
    frame = pd.read_parquet(path, columns=["image_id", "image"]).drop_duplicates("image_id")
    rows = {str(name): image["bytes"] for name, image in zip(frame["image_id"], frame["image"])}
    # the embedded clips show one picture in every frame; of other several pictures a parquet row holds one at most
    return {
        name: uri(rows[image])
        for name, image in wanted.items()
        if image in rows and (name == image or path == EMBEDDED)
    }


def uri(content: bytes) -> str:
    """A picture's file as a data URI, resized if it is large."""
    with Image.open(io.BytesIO(content)) as image:
        kind = image.format or ""
        if len(content) > PLAIN or kind not in ("PNG", "JPEG", "WEBP"):
            small, buffer = as_shown(image), io.BytesIO()
            small.thumbnail((LARGEST, LARGEST))
            small.save(buffer, "JPEG", quality=85)
            kind, content = "JPEG", buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
