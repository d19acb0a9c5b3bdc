"""The samples of a run on disk: one JSON object per sample and task, what was asked apart from what came back.

    results/runs/<folder>/samples/<task>.jsonl.gz     what came back: answer, scores, kept tokens, ...
    results/questions/<task>-<12 hex>.jsonl.gz        what was asked, once for all runs that were asked the same

The first line of a samples file names its questions file; line i of both belong to one sample. The digits are the
beginning of the SHA-256 of the questions' lines, so equal questions share a file and an edited file is refused. A run's
folder outside of a store (not below `runs/`) holds its own `questions/`; a reader takes either, so a run that is moved
alone needs its questions copied into it. Equal samples give equal bytes: git stores a renewed run that answers as
before only once. Before, a run held `samples/<task>.jsonl` with everything in each line; that is read as well.

    python -m analysis samples RUN TASK       JSON lines with all fields
    zcat results/runs/.../samples/<task>.jsonl.gz

What the fields are: pdrop/scoring/results.py. Standard library only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pdrop.record import write_atomically

# every field that a sample may have, in the order of a whole line; those in ASKED follow from what was asked of which
# model, and are equal for most runs of a store
FIELDS = (
    "doc_id", "question", "prompt", "target", "answer", "scores", "metrics", "visual_tokens", "visual_per_layer",
    "kept", "kept_counts", "image", "layout", "attention", "losses",
)  # fmt: skip
ASKED = ("question", "prompt", "target", "visual_tokens", "image", "layout")
NAME = re.compile(r"[\w.-]+-[0-9a-f]{12}")  # of a questions file
Sample = dict[str, Any]


def write_samples(folder: Path, task: str, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write a task's samples into a run's folder, and its questions beside the runs unless they are there.

    Args:
        folder: The run's.
        task: The task's name.
        samples: One mapping per sample, with a doc_id each.

    Returns:
        The samples file.
    """
    path = _write(folder, task, samples)
    (folder / "samples" / f"{task}.jsonl").unlink(missing_ok=True)
    return path


def samples_file(folder: Path, task: str) -> Path:
    """Where a run's folder has a task's samples.

    Raises:
        ValueError: If it has none.
    """
    for path in (folder / "samples" / f"{task}.jsonl.gz", folder / "samples" / f"{task}.jsonl"):
        if path.is_file():
            return path
    raise ValueError(f"{path} is missing, and {path.name}.gz with it: make run {folder.name} again with force=true")


def samples_files(folder: Path) -> list[Path]:
    """Every samples file of a run's folder, sorted."""
    return sorted(path for path in (folder / "samples").glob("*.jsonl*") if path.suffix in (".gz", ".jsonl"))


def read_samples(folder: Path, task: str, most: int | None = None) -> list[Sample]:
    """A task's samples with all their fields, in the file's order.

    Args:
        folder: The run's.
        task: The task's name.
        most: The first so many alone.

    Raises:
        ValueError: If a file is missing or damaged, a line is not a sample, or samples and questions do not fit.
    """
    path = samples_file(folder, task)
    if path.suffix == ".jsonl":
        return _parse(path, path.read_bytes(), most)
    head, came = _split(path, _unzipped(path))
    name = head.get("questions")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{path}: its first line does not name its questions")
    places = [place / f"{name}.jsonl.gz" for place in _questions_folders(folder)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        missing = " and ".join(map(str, places))
        raise ValueError(f"{path}: its questions are missing ({missing}): copy them along with the run")
    questions = _unzipped(place)
    if not name.endswith(hashlib.sha256(questions).hexdigest()[:12]):
        raise ValueError(f"{place} does not hold what its name says: edited by hand?")
    rows, asked = _parse(path, came, most, first=2), _parse(place, questions, most)
    if [row["doc_id"] for row in rows] != [question["doc_id"] for question in asked]:
        raise ValueError(f"{path} and {place} are not of the same samples: make run {folder.name} again")
    return [_whole(question | row) for question, row in zip(asked, rows)]


def sample_lines(samples: Iterable[Mapping[str, Any]]) -> str:
    """Whole samples as JSON lines."""
    return "".join(map(_line, samples))


def condense(folder: Path) -> list[Path]:
    """Bring a run's samples of the older form into this one; nothing is lost.

    Returns:
        The files that were replaced.

    Raises:
        ValueError: If a file does not hold samples, or would come back as something else; it is left alone.
    """
    replaced = []
    for path in samples_files(folder):
        if path.suffix == ".jsonl":
            samples, task = _parse(path, path.read_bytes(), None), path.name.removesuffix(".jsonl")
            _write(folder, task, samples)
            if read_samples(folder, task) != samples:
                raise ValueError(f"{path} would come back as something else: it stays as it is")
            path.unlink()
            replaced.append(path)
    return replaced


def _write(folder: Path, task: str, samples: Iterable[Mapping[str, Any]]) -> Path:
    asked, came = [], []
    for sample in samples:
        asked.append(_line({name: sample[name] for name in ("doc_id", *ASKED) if name in sample}))
        came.append(_line({name: value for name, value in sample.items() if name not in ASKED}))
    questions = "".join(asked).encode()
    name = f"{task}-{hashlib.sha256(questions).hexdigest()[:12]}"
    place = _questions_folders(folder)[0] / f"{name}.jsonl.gz"
    if not place.is_file():
        write_atomically(place, gzip.compress(questions, mtime=0))
    path = folder / "samples" / f"{task}.jsonl.gz"
    write_atomically(path, gzip.compress("".join([_line({"questions": name}), *came]).encode(), mtime=0))
    return path


def _questions_folders(folder: Path) -> Sequence[Path]:
    """Where the questions of a run may lie; a new file goes to the first."""
    own = folder / "questions"
    return [folder.resolve().parent.parent / "questions", own] if folder.resolve().parent.name == "runs" else [own]


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, default=str) + "\n"


def _whole(sample: Sample) -> Sample:
    """The fields in their order; those that this version does not know at the end."""
    return {name: sample[name] for name in FIELDS if name in sample} | sample


def _unzipped(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again with force=true") from error


def _split(path: Path, data: bytes) -> tuple[Sample, bytes]:
    first, _, rest = data.partition(b"\n")
    try:
        head = json.loads(first)
    except ValueError as error:
        raise ValueError(f"{path}, line 1 is not JSON ({error})") from error
    return head if isinstance(head, dict) else {}, rest


def _parse(path: Path, data: bytes, most: int | None, first: int = 1) -> list[Sample]:
    """JSON lines that end at a newline alone; `first` numbers them."""
    lines = (line for line in data.split(b"\n") if line)
    found = []
    for number, line in enumerate(islice(lines, most), start=first):
        try:
            sample = json.loads(line)
            sample["doc_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no sample ({error!r})") from error
        found.append(sample)
    return found
