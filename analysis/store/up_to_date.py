"""Which experiments' figures are up to date, by a digest of what they were made from.

Drawing takes seconds per figure, hashing a store much less. results/figures/.made.json holds, for each experiment, the
digest of its records, samples and markers, of this package and of matplotlib's version, and the files that were drawn.
A file that is missing or was changed later is drawn again.
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
    """SHA-256 over everything that an experiment's figures depend on."""
    told = [experiment.name, experiment.superseded, experiment.missing, options]
    told += [sorted(run.overrides.items()) for run in experiment.runs]
    samples = [path for run in experiment.runs for path in samples_files(run.path)]
    return of([*(run.path / "record.json" for run in experiment.runs), *sorted(samples)], told)


def of_report(results: Path, figures: Sequence[Path], images: Path | None, samples: int) -> str:
    """SHA-256 over everything that the report depends on; of a user's pictures the names, sizes and dates."""
    paths = [*results.glob("runs/*/*"), *results.glob("runs/*/samples/*"), *results.glob("questions/*")]
    paths += results.glob("pictures/*")
    paths += [path for folder in figures for path in folder.glob("*.png")]
    own = images if images is not None and images.is_dir() else None
    shown = sorted(own.iterdir()) if own is not None else [images] if images is not None else []
    dated = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in shown if path.exists()]
    told = [samples, list(map(str, figures)), str(images), dated]
    return of([*paths, *results.glob("experiments/*/*")], told)


def of_trainings(results: Path, options: Sequence[object]) -> str:
    """SHA-256 over everything that the page and figures of trainings depend on."""
    paths = [*results.glob("trainings/*/training.json"), *results.glob("trainings/*/curve.csv")]
    paths += results.glob("experiments/training/*")
    asked = {path.name for path in results.glob("experiments/training/*")}
    for folder in results.glob("runs/*"):
        if folder.name in asked:
            paths += [folder / "record.json", *samples_files(folder)]
    return of(paths, options)


def of(paths: Iterable[Path], told: Sequence[object]) -> str:
    """SHA-256 over files, other given text, this package's sources and matplotlib's version."""
    found = hashlib.sha256(repr(told).encode())
    package, pdrop = Path(__file__).parent.parent, Path(str(files("pdrop")))
    sources = [path for kind in ("py", "js", "css", "html", "csv") for path in package.rglob(f"*.{kind}")]
    sources += pdrop.glob("embedded/data/*.json")
    for path in [*sorted(sources), *sorted(paths)]:
        if path.is_file():
            found.update(f"{path.parent.name}/{path.name}".encode() + hashlib.sha256(path.read_bytes()).digest())
    found.update(version("matplotlib").encode())
    return found.hexdigest()


def unchanged(folder: Path, name: str, made_from: str) -> list[Path]:
    """The experiment's files, if they were made from this and have not changed since; otherwise none."""
    entry = read(folder).get(name)
    if entry is None or entry["from"] != made_from:
        return []
    files: Mapping[str, str] = entry["files"]
    paths = [folder / file for file in files]
    same = all(path.is_file() and hashed(path.read_bytes()) == held for path, held in zip(paths, files.values()))
    return paths if same else []


def remember(folder: Path, name: str, made_from: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Store the digest of what an experiment's files were made from."""
    held = {file: hashed(content) for file, content in files}
    notes = read(folder) | {name: {"from": made_from, "files": held}}
    publish(folder / NAME, (json.dumps(notes, indent=1, sort_keys=True) + "\n").encode())


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The digests of a folder; none if another program wrote them."""
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        notes = json.loads(path.read_text(encoding="utf8"))
        return {name: entry for name, entry in notes.items() if {"from", "files"} <= set(entry)}
    except (ValueError, AttributeError, TypeError):  # only digests are lost: everything is made again
        return {}


def hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
