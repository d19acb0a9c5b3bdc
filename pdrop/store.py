"""Files of a store: written whole or appended to, never through a link; folders held by one process at a time.

    results/runs/<model>-<method>-<run_id>/           a run: record.json, answers.jsonl, samples.zip
    results/experiments/<experiment>/<run's folder>   notes that an experiment asked for the run
    results/sweeps/<id>.json                          what a running sweep still has to do

A store may come from somebody else, or be writable by others. If a run's folder has a symbolic link, a pipe or a device
under the name of a file that is to be written, nothing outside the folder is changed. New files get the permissions
that the user's umask allows. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pdrop import leases

log = logging.getLogger("pdrop")

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")  # what write_atomically writes into
LONGEST_WRITE = 3600.0  # seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # what flock says where there are none
LOCK = ".lock"
HOLDER = ".holder"  # in a run's folder while a process works on it: host, process, since when


def open_in_place(path: Path, flags: int) -> int:
    """A descriptor of a regular file of our own, created if it is not there; never truncated.

    Args:
        path: The file; its folder is created.
        flags: os.O_RDWR, os.O_APPEND, ...

    Raises:
        ValueError: If the path is a link or anything but a regular file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # without O_NONBLOCK, opening a pipe would block
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
    """Refuse a run's folder that is a link or contains a link, pipe or device: writing there would change something
    else.

    The store itself may be a link, and so may its folders that hold the runs: users put them where there is room.

    Raises:
        ValueError: Naming the link, pipe or device.
    """
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written through links: remove it")
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would block for ever
            raise ValueError(f"{path} is no file of a store but {kind_of(path)}: remove it")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file if writing fails because a disk is full: the system's error does not.

    Raises:
        OSError: The same, with the file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def refuse_unwritable(folder: Path) -> None:
    """Refuse a folder that this user cannot write to, or that could not be made, before work is done for it.

    Raises:
        OSError: Naming it.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        readonly = os.statvfs(place).f_flag & os.ST_RDONLY
        number = errno.EROFS if readonly else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def in_words(error: OSError, dial: str) -> str:
    """A system error in one line, with the remedy if a disk is full or not writable.

    Args:
        error: What was raised.
        dial: Names another folder.
    """
    if error.filename is None or error.errno not in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
    ):
        return str(error)
    room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{error.filename} cannot be written ({error.strerror}): {room}name another folder with {dial}=DIR"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is never seen half-written, creating its folder; a link is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(8)}"
    # the system applies the umask: reading it would change it for other threads
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_leftovers(folder: Path, older_s: float = 0.0) -> None:
    """Remove temporary files of killed writes from a folder, if they are older than this many seconds.

    Where others may be writing, `older_s` must be longer than any write takes.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process removed it, or finished writing
            there = path.lstat()
            ours = TEMPORARY.fullmatch(path.name) is not None and stat.S_ISREG(there.st_mode)
            if ours and time.time() - there.st_mtime >= older_s:
                path.unlink()


@functools.cache
def tidy(results: Path) -> None:
    """Remove temporary files of killed writes from a store; once per process."""
    places = [results, results / "questions", results / "pictures", results / "sweeps"]
    places += [*results.glob("experiments/*"), *results.glob("runs/*")]
    for place in places:
        if not place.is_symlink():
            remove_leftovers(place, LONGEST_WRITE)


class Held(OSError):
    """Another process holds a folder."""


class NoLocks(OSError):
    """A file system has no locks."""


class Hold(Protocol):
    """A folder that this process holds."""

    def check(self) -> None:
        """Raises `leases.Lost` if another process has taken over the folder."""


class Flock:
    """A folder held by the system's lock, which cannot be taken over while the process lives."""

    def check(self) -> None:
        return None


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True, kind: str = "auto", **note: Any) -> Iterator[Hold]:
    """Hold a folder, so that only one of the jobs that share a store works on a run at a time.

    On a disk of this machine by the system's lock, which is released however the process ends; elsewhere by a lease
    (pdrop/leases.py).

    Args:
        folder: A run's.
        wait: Whether to wait if another process holds it.
        kind: One of pdrop.leases.KINDS.
        note: What `holder` tells others, in addition to host, process and time.

    Yields:
        The hold, whose `check` says whether it is still ours.

    Raises:
        Held: If another process holds it and `wait` is false, or has taken it over.
        ValueError: If `kind` is flock, and the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context((leased if leases.wanted(folder, kind) else flocked)(folder, wait))
        except NoLocks as error:
            if kind == "flock":
                raise ValueError(f"{error}: use locks=lease") from error
            held = stack.enter_context(leased(folder, wait))
        write_atomically(folder / HOLDER, json.dumps(own_note() | note) + "\n")
        try:
            yield held
        finally:
            held.check()  # else the note is another process's
            (folder / HOLDER).unlink(missing_ok=True)


@contextlib.contextmanager
def flocked(folder: Path, wait: bool) -> Iterator[Hold]:
    """`locked` by the system.

    Raises:
        Held: If another process holds it and `wait` is false.
        NoLocks: If the file system has none.
    """
    with os.fdopen(open_in_place(folder / LOCK, os.O_RDWR), "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            by = where(noted(folder / HOLDER))
            if not wait:
                raise Held(f"{folder} is held by another process{by}") from error
            log.info("waiting       another process%s does %s", by, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise NoLocks(f"{folder} cannot be locked by flock ({error.strerror})") from error
            raise
        yield Flock()


@contextlib.contextmanager
def leased(folder: Path, wait: bool) -> Iterator[Hold]:
    """`locked` by a lease."""
    lease = leases.take(folder)
    if lease is None:
        by = where(noted(folder / HOLDER))
        if not wait:
            raise Held(f"{folder} is held by another process{by}")
        log.info("waiting       another process%s does %s", by, folder)
    while lease is None:
        time.sleep(min(1.0, leases.LEASE / 10))
        lease = leases.take(folder)
    try:
        yield lease
    except leases.Lost as error:
        raise Held(str(error)) from error
    finally:
        lease.release()


def tell(folder: Path, **note: Any) -> None:
    """Add to what `holder` tells others about a folder that this process holds; does nothing if it holds none."""
    there, own = noted(folder / HOLDER), own_note()
    if (there.get("host"), there.get("pid")) == (own["host"], own["pid"]):
        write_atomically(folder / HOLDER, json.dumps(there | note) + "\n")


def state(folder: Path, status: str, error: str | None) -> str:
    """The state of a run: done, running, failed, or stopped (by a kill or by hand, and can be resumed).

    Args:
        folder: The run's.
        status: Its record's.
        error: Its record's.
    """
    if status == "running":
        return "running" if holder(folder) is not None else "stopped"
    return "stopped" if status == "failed" and reason(error) == "KeyboardInterrupt" else status


def reason(error: str | None) -> str:
    """A traceback's last line: what went wrong."""
    return next((line.strip() for line in reversed((error or "").splitlines()) if line.strip()), "")


def stored_answers(folder: Path) -> int:
    """How many answers a run's folder holds; an answer that was given twice counts twice."""
    path = folder / "answers.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def own_note() -> dict[str, Any]:
    """Host, process and time, as noted next to a lock."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}


def holder(folder: Path) -> dict[str, Any] | None:
    """What the process that holds a folder noted (see `locked`); None if no process does, also after a kill."""
    return noted(folder / HOLDER) if leases.held(folder) or flock_held(folder / LOCK) else None


def flock_held(path: Path) -> bool:
    """Whether a process has the system's lock of a file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no file, hence no lock; or a link, which is not a lock
        return False
    with os.fdopen(handle, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS  # where there are none, nobody has one
    return False


def noted(path: Path) -> dict[str, Any]:
    """What a holder's file says; {} if there is none, or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def where(note: Mapping[str, Any]) -> str:
    """A holder in words, " (node7, process 123)"; "" if it is not known."""
    return f" ({note['host']}, process {note['pid']})" if {"host", "pid"} <= set(note) else ""


def mark(results: Path, experiment: str, folder: str, overrides: Sequence[str]) -> None:
    """Note that an experiment asked for a run, and with which overrides: an experiment is the list of such notes."""
    path = results / "experiments" / experiment / folder
    refuse_links(path.parent)
    write_atomically(path, json.dumps(list(overrides)) + "\n")


def kind_of(path: Path) -> str:
    """What kind of file a path is, in words."""
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISREG, "a file"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")
