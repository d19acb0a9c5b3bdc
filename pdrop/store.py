"""Files of a store: written whole or appended to, never through a link; folders held by one process at a time.

    results/runs/<model>-<method>-<run_id>/           a run: record.json, answers.jsonl, samples.zip
    results/experiments/<experiment>/<run's folder>   notes that an experiment asked for the run

A store may come from somebody else, or lie where others write. Whatever stands in a run's folder under the name of a
file that is written there, be it a symbolic link, a pipe or a device, nothing outside the folder is changed. New files
get the rights that the user's umask leaves. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger("pdrop")


def open_in_place(path: Path, flags: int) -> int:
    """A descriptor of a regular file of our own, created if it is not there; never truncated.

    Args:
        path: The file; its folder is created.
        flags: os.O_RDWR, os.O_APPEND, ...

    Raises:
        ValueError: If a link or something else than a file stands there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # without O_NONBLOCK a pipe would be waited for
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise ValueError(f"{path} is not a file of a store but {kind_of(path)}: remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a file of a store but {kind_of(path)}: remove it")
    return handle


def refuse_links(folder: Path) -> None:
    """Refuse a run's folder that is a link or holds one, or a pipe: what is written there would lie elsewhere.

    The store itself may be a link, and so may the folders of it that hold the runs: a user puts them where there is
    room.

    Raises:
        ValueError: Naming the link, pipe or device.
    """
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written through links: remove it")
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait for ever
            raise ValueError(f"{path} is no file of a store but {kind_of(path)}: remove it")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen half-written, creating its folder; a link is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(8)}"
    # the system takes the umask off: asking for it would change it for other threads
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: jobs that share a store take turns at the same run. The system frees it however a process ends."""
    with os.fdopen(open_in_place(folder / ".lock", os.O_RDWR), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting       another process does %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mark(results: Path, experiment: str, folder: str, overrides: Sequence[str]) -> None:
    """Note that an experiment asked for a run, and with which overrides: an experiment is the list of such notes."""
    path = results / "experiments" / experiment / folder
    refuse_links(path.parent)
    write_atomically(path, json.dumps(list(overrides)) + "\n")


def kind_of(path: Path) -> str:
    """What stands at a path, in words."""
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISREG, "a file"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")
