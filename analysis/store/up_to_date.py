"""Which experiments' figures are up to date: a digest of what they were made from, kept beside them.

Drawing takes seconds per figure, hashing a store takes none. results/figures/.made.json holds, for each experiment, the
digest of its records, samples and markers, of this package and of matplotlib's version, and the files that were drawn.
Nothing is taken on trust: a file that is missing or was changed since is drawn again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from pdrop.samples import samples_files

from .load import Experiment
from .publish import publish

NAME = ".made.json"


def digest(experiment: Experiment, options: Sequence[object]) -> str:
    """SHA-256 over everything that an experiment's figures follow from."""
    found = hashlib.sha256(repr((experiment.name, experiment.superseded, experiment.missing, options)).encode())
    package, pdrop = Path(__file__).parent.parent, Path(str(files("pdrop")))
    sources = [*package.rglob("*.py"), *pdrop.glob("embedded/data/*.json")]
    samples = [path for run in experiment.runs for path in samples_files(run.path)]
    for path in [*sorted(sources), *(run.path / "record.json" for run in experiment.runs), *sorted(samples)]:
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for run in experiment.runs:
        found.update(repr(sorted(run.overrides.items())).encode())
    found.update(version("matplotlib").encode())
    return found.hexdigest()


def unchanged(folder: Path, name: str, made_from: str) -> list[Path]:
    """The experiment's files, if they were made from this and still are what was made; else nothing."""
    entry = read(folder).get(name)
    if entry is None or entry["from"] != made_from:
        return []
    files: Mapping[str, str] = entry["files"]
    paths = [folder / file for file in files]
    same = all(path.is_file() and hashed(path.read_bytes()) == files[path.name] for path in paths)
    return paths if same else []


def remember(folder: Path, name: str, made_from: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Note what an experiment's files were made from."""
    held = {file: hashed(content) for file, content in files}
    notes = read(folder) | {name: {"from": made_from, "files": held}}
    publish(folder / NAME, (json.dumps(notes, indent=1, sort_keys=True) + "\n").encode())


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The notes of a folder; none where they were made by another program."""
    path = folder / NAME
    if not path.is_file():
        return {}
    notes = json.loads(path.read_text(encoding="utf8"))
    return {name: entry for name, entry in notes.items() if {"from", "files"} <= set(entry)}


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
