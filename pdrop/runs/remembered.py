"""A cache of resolved command lines, so that a finished run is found without torch or lmms-eval.

    ~/.cache/pdrop/resolved/<what it was resolved with>.jsonl    PDROP_CACHE names another folder than ~/.cache/pdrop

A line has a key (a hash of the words and the working folder) and the settings that they mean: the run's spec, model and
store. A file belongs to one state of the package, its configuration, the packages that matter and the machine: an edit
starts another file. Everything else is checked each time: the model's weights, the files of tasks, the files of a
user's own method. If anything differs, or a line is damaged, the words are resolved again. Nothing here is a result,
and the folder can be deleted at any time.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import inspect
import json
import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pdrop import identity
from pdrop.environment import versions
from pdrop.evaluation import task_index
from pdrop.models.source import ModelSource
from pdrop.record import RunSpec, build
from pdrop.runs.settings import Settings
from pdrop.store import open_in_place

log = logging.getLogger("pdrop")

DRIVER = Path("/proc/driver/nvidia/version")
FILES = 20  # files of older states that are kept


@dataclass(frozen=True)
class Known:
    """What words mean, as far as needed to find a run: see `Settings`."""

    spec: RunSpec
    results: Path
    experiment: str | None

    @property
    def folder(self) -> Path:
        return self.results / "runs" / self.spec.folder


def recall(words: Sequence[str], conf: Path) -> Known | None:
    """What these words were resolved to before; None if they were not, or something has changed since.

    Args:
        words: The command line's overrides of one run.
        conf: The configuration folder.
    """
    line = _lines(_file(conf)).get(_asked(words))
    if line is None:
        return None
    try:
        spec = build(RunSpec, line["spec"] | {"tasks": tuple(line["spec"]["tasks"])})
        if not (
            ModelSource(**line["source"]).unchanged()
            and task_index.definitions(line["task_folders"]) == line["definitions"]
            and task_index.content(tuple(map(Path, line["own"]))) == spec.task_files
            and all(_digest([Path(path)]) == digest for path, digest in line["method"].items())
        ):
            return None
    except (ValueError, OSError) as error:  # such as a model that was removed: resolving again gives the remedy
        log.debug("resolved anew: %s", error)
        return None
    return Known(spec, Path(line["results"]), line["experiment"])


def remember(words: Sequence[str], settings: Settings, conf: Path) -> None:
    """Store what words were resolved to. If that cannot be written, the next start resolves them again.

    Args:
        words: The command line's overrides of the run.
        settings: What they mean.
        conf: The configuration folder.
    """
    if _reads_files(settings):
        return
    spec, path = settings.spec, _file(conf)
    line: dict[str, Any] = {
        "spec": asdict(spec),
        "source": asdict(settings.source),
        "results": str(settings.results),
        "experiment": settings.experiment,
        "task_folders": list(settings.task_folders),
        "definitions": task_index.definitions(settings.task_folders),
        "own": [str(folder) for folder in task_index.own_folders(spec.tasks, settings.task_folders)],
        "method": {str(file): _digest([file]) for file in _outside(settings)},
    }
    try:
        fresh = not path.is_file()
        with os.fdopen(open_in_place(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0) as file:
            file.write((_sealed({"asked": _asked(words)} | line) + "\n").encode())
        if fresh:
            for older in sorted(path.parent.glob("*.jsonl"), key=lambda one: one.stat().st_mtime)[:-FILES]:
                older.unlink(missing_ok=True)
    except OSError as error:
        log.info("%s cannot be written (%s): the next start resolves the same again", path, error.strerror)
    _lines.cache_clear()


def cache_folder() -> Path:
    """The folder of the cache."""
    named = os.environ.get("PDROP_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pdrop"


def _asked(words: Sequence[str]) -> str:
    if len({word.partition("=")[0] for word in words}) == len(words):  # then their order does not matter
        words = sorted(words)
    return hashlib.sha256(json.dumps([os.getcwd(), *words]).encode()).hexdigest()[:24]  # paths may be relative


@functools.cache
def _file(conf: Path) -> Path:
    """The file of this state of package, configuration, versions and machine."""
    sources = [*_below(identity.PACKAGE, (".py", ".json", ".csv")), *_below(conf, (".yaml",))]
    state: list[Any] = [_digest(sources), versions(), sys.version, socket.gethostname()]
    state += [os.environ.get("CUDA_VISIBLE_DEVICES"), sorted(glob.glob("/dev/nvidia[0-9]*"))]  # device=null looks there
    state.append(DRIVER.read_text() if DRIVER.exists() else None)  # one that is too old for torch may be renewed
    name = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    return cache_folder() / "resolved" / f"{name}.jsonl"


def _below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for place, _, names in os.walk(folder, followlinks=True):
        yield from (Path(place) / name for name in names if name.endswith(suffixes))


def _digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _outside(settings: Settings) -> list[Path]:
    """The sources of a method from outside the package."""
    parts = [] if settings.method is None else settings.method.parts
    files = [Path(file) for part in parts if (file := inspect.getsourcefile(type(part))) is not None]
    return [path for path in identity.sources(files, parts=()) if identity.PACKAGE not in path.parents]


def _reads_files(settings: Settings) -> bool:
    """Whether the method has file parameters, whose content may change."""
    parts = [] if settings.method is None else settings.method.parts
    texts = [value for part in parts for value in vars(part).values() if isinstance(value, str)]
    return any(Path(text).expanduser().exists() for text in texts)


def _sealed(line: dict[str, Any]) -> str:
    """JSON with a checksum, so that a damaged line is not taken for another run."""
    text = json.dumps(line)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}"


@functools.lru_cache(maxsize=1)
def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> its last line; damaged lines are skipped."""
    found = {}
    for sealed in path.read_bytes().split(b"\n") if path.is_file() else ():
        seal, _, text = sealed.partition(b" ")
        if hashlib.sha256(text).hexdigest()[:16].encode() == seal:
            line = json.loads(text)
            found[line["asked"]] = line
    return found
