"""A results folder on disk: files written whole, folders held by one process at a time, notes of experiments.

    results/runs/<model>-<method>-<run_id>/           a run: record.json, answers.jsonl, samples/
    results/experiments/<experiment>/<run's folder>   notes that an experiment asked for the run

Several jobs may share one. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger("pdrop")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen half-written, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a store is shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: jobs that share a store take turns at the same run. The system frees it however a process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting       another process does %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mark(results: Path, experiment: str, folder: str, overrides: Sequence[str]) -> None:
    """Note that an experiment asked for a run, and with which overrides: an experiment is the list of such notes."""
    write_atomically(results / "experiments" / experiment / folder, json.dumps(list(overrides)) + "\n")
