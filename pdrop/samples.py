"""The samples of a run on disk: questions and answers in separate files, one JSON line per sample.

    results/runs/<folder>/samples.zip             answers and scores: one member per task, <task>-<12 hex>.jsonl
    results/questions/<task>-<12 hex>.jsonl.gz    what was asked, once for all runs that were asked the same

A member and its questions file share their name, and line i of both belongs to one sample. The digits are the beginning
of the SHA-256 of the questions' lines: equal questions share a file, and a file that was edited is refused. A run's
folder outside a store (not below `runs/`) has its own `questions/`; a reader looks there too, so a run that is moved
alone takes its questions along. Equal samples give equal bytes: git stores a repeated run with the same answers only
once. Older runs have `samples/<task>.jsonl` with everything in each line; these are read as well.

    python -m analysis samples RUN TASK                  JSON lines with all fields
    unzip -p results/runs/.../samples.zip 'pope-*'

What the fields are: pdrop/evaluation/results.py. Standard library only.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pdrop.store import write_atomically

# every field that a sample may have, in the order of a whole line; those in ASKED follow from what was asked of which
# model, and are equal for most runs of a store
FIELDS = (
    "doc_id", "question", "prompt", "target", "answer", "scores", "metrics", "visual_tokens", "visual_per_layer",
    "kept", "kept_counts", "image", "layout", "attention", "losses", "parts", "read", "group",
)  # fmt: skip
ASKED = ("question", "prompt", "target", "visual_tokens", "image", "layout", "group")
FILE = "samples.zip"
Sample = dict[str, Any]


def write_samples(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write the samples of a run's tasks into its folder, and the store's questions files that do not exist yet.

    Args:
        folder: The run's.
        tasks: Task -> one mapping per sample, with a doc_id each.

    Returns:
        The samples file.
    """
    path = _write(folder, tasks)
    if (folder / "samples").is_dir():  # the older form, of a run that was repeated
        shutil.rmtree(folder / "samples")
    return path


def samples_file(folder: Path, task: str) -> Path:
    """The file of a run's folder that has a task's samples.

    Raises:
        ValueError: If there is none.
    """
    older = folder / "samples" / f"{task}.jsonl"
    for path in (folder / FILE, older):
        if path.is_file():
            return path
    raise ValueError(f"{older} is missing, and {FILE} with it: make run {folder.name} again with force=true")


def samples_files(folder: Path) -> list[Path]:
    """Every samples file of a run's folder, sorted."""
    return sorted([*folder.glob(FILE), *(folder / "samples").glob("*.jsonl")])


def digest(folder: Path) -> str:
    """SHA-256 of a run's samples.zip; "" if it has none."""
    path = folder / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def verify(folder: Path, known: str) -> None:
    """Refuse a samples file that is not the one in the run's record.

    Args:
        folder: The run's.
        known: `digest` in the record; "" in older records, whose samples are not checked.

    Raises:
        ValueError: Naming the file.
    """
    if known and digest(folder) not in ("", known):
        raise ValueError(
            f"{folder / FILE} does not hold what the run wrote, by its record's checksum: edited by hand, or damaged; "
            f"make run {folder.name} again with force=true"
        )


def read_samples(folder: Path, task: str, most: int | None = None) -> list[Sample]:
    """A task's samples with all their fields, in the file's order.

    Args:
        folder: The run's.
        task: The task's name.
        most: Read only this many, from the first on.

    Raises:
        ValueError: If a file is missing or damaged, a line is not a sample, or samples and questions do not fit.
    """
    path = samples_file(folder, task)
    if path.suffix == ".jsonl":
        return _parse(path, path.read_bytes(), most)
    name, came = _member(path, task)
    places = [place / f"{name}.jsonl.gz" for place in _questions_folders(folder)]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        missing = " and ".join(map(str, places))
        raise ValueError(f"{path}: its questions are missing ({missing}): copy them along with the run")
    try:
        questions = gzip.decompress(place.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{place} is damaged ({error}): delete it and make the run again with force=true") from error
    if not name.endswith(_digest(questions)):
        raise ValueError(f"{place} does not hold what its name says: edited by hand?")
    rows, asked = _parse(path, came, most), _parsed(place, questions)[:most]
    if [row["doc_id"] for row in rows] != [question["doc_id"] for question in asked]:
        raise ValueError(f"{path}, {name}, and {place} are not of the same samples: make run {folder.name} again")
    return [_whole(question | row) for question, row in zip(asked, rows)]


def sample_lines(samples: Iterable[Mapping[str, Any]]) -> str:
    """Whole samples as JSON lines."""
    return "".join(map(_line, samples))


def condense(folder: Path) -> list[Path]:
    """Convert a run's samples from the older form to this one; nothing is lost.

    Returns:
        The files that were replaced.

    Raises:
        ValueError: If a file does not hold samples, or would not be read back equal; then no file is changed.
    """
    older = sorted((folder / "samples").glob("*.jsonl"))
    if not older or (folder / FILE).exists():
        return []
    tasks = {path.name.removesuffix(".jsonl"): _parse(path, path.read_bytes(), None) for path in older}
    written = _write(folder, tasks)
    for path, (task, samples) in zip(older, tasks.items()):
        if read_samples(folder, task) != samples:
            written.unlink()
            raise ValueError(f"{path} would come back as something else: it stays as it is")
    for path in older:
        path.unlink()
    (folder / "samples").rmdir()
    return older


def _write(folder: Path, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for task, samples in tasks.items():
            asked = [{name: sample[name] for name in ("doc_id", *ASKED) if name in sample} for sample in samples]
            came = [{name: value for name, value in sample.items() if name not in ASKED} for sample in samples]
            questions = sample_lines(asked).encode()
            name = f"{task}-{_digest(questions)}"
            place = _questions_folders(folder)[0] / f"{name}.jsonl.gz"
            if not place.is_file():
                write_atomically(place, gzip.compress(questions, mtime=0))
            member = zipfile.ZipInfo(f"{name}.jsonl")  # without a date: equal samples, equal bytes
            member.compress_type, member.create_system, member.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            file.writestr(member, sample_lines(came), compresslevel=9)
    write_atomically(folder / FILE, buffer.getvalue())
    return folder / FILE


def _member(path: Path, task: str) -> tuple[str, bytes]:
    """Name and content of a task's part of a samples file."""
    try:
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if re.fullmatch(re.escape(task) + r"-[0-9a-f]{12}\.jsonl", name)]
            if len(names) != 1:
                raise ValueError(f"{path} has no samples of {task}: make the run again with force=true")
            return names[0].removesuffix(".jsonl"), file.read(names[0])
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): make the run again with force=true") from error


def _questions_folders(folder: Path) -> Sequence[Path]:
    """Folders that may hold the questions of a run; a new file goes to the first."""
    own, place = folder / "questions", folder.resolve()
    return [place.parent.parent / "questions", own] if place.parent.name == "runs" else [own]


@functools.lru_cache(maxsize=16)
def _parsed(place: Path, questions: bytes) -> list[Sample]:
    """A task's questions, which many runs share: they are read once."""
    return _parse(place, questions, None)


def _digest(questions: bytes) -> str:
    return hashlib.sha256(questions).hexdigest()[:12]


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, default=str) + "\n"


def _whole(sample: Sample) -> Sample:
    """The fields in their order, unknown ones at the end."""
    return {name: sample[name] for name in FIELDS if name in sample} | sample


def _parse(path: Path, data: bytes, most: int | None) -> list[Sample]:
    """JSON lines, which end at a newline alone."""
    lines = list(islice((line for line in data.split(b"\n") if line), most))
    if (whole := _at_once(lines)) is not None:
        return whole
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            sample["doc_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a sample ({error!r})") from error
        found.append(sample)
    return found


def _at_once(lines: Sequence[bytes]) -> list[Sample] | None:
    """The samples, read as one list, which is quicker by a quarter; None if a line is not a sample."""
    try:
        found: list[Sample] = json.loads(b"[%s]" % b",".join(lines))
    except ValueError:
        return None
    sound = len(found) == len(lines) and all(isinstance(one, dict) and "doc_id" in one for one in found)
    return found if sound else None
