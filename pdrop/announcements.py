"""Files that say what a process is doing, which others can show while it lives: those of sweeps, in results/sweeps.

On a disk of this machine such a file is locked, and the lock ends with its process. On other file systems other
machines may not see the lock: there the file's time is renewed like a lease's (pdrop/leases.py), and a file that has
not been renewed for LEASE seconds belongs to a dead process. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pdrop import leases
from pdrop.store import flock_held, open_in_place, own_note, write_atomically

log = logging.getLogger("pdrop")


class Announcement:
    """What this process is doing; made by `announced`.

    Args:
        path: The file; written whole, also when it is renewed.
        note: What it says, in addition to host, process and time.
    """

    def __init__(self, path: Path, note: Mapping[str, Any]) -> None:
        self.path, self.note, self._handle = path, own_note() | dict(note), -1
        self._ended = threading.Event()
        self.tell()
        if not leases.local(path.parent):
            threading.Thread(target=self._beat, name=f"announcement {path.name}", daemon=True).start()

    def tell(self, **more: Any) -> None:
        """Add to the note, or replace parts of it."""
        self.note |= more
        temporary = self.path.parent / f".{self.path.name[:64]}.{secrets.token_hex(8)}"
        write_atomically(temporary, json.dumps(self.note) + "\n")
        handle = open_in_place(temporary, os.O_RDWR)
        try:
            with contextlib.suppress(OSError):  # there are no locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before it is visible
            os.replace(temporary, self.path)
        except BaseException:
            os.close(handle)
            raise
        self._release()
        self._handle = handle

    def close(self) -> None:
        """Stop renewing the file, and release its lock."""
        self._ended.set()
        self._release()

    def _release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _beat(self) -> None:
        while not self._ended.wait(leases.BEAT):
            try:
                os.utime(self.path)  # to the file server's time
            except OSError as error:  # the work itself does not need the note
                log.debug("%s was not renewed: %s", self.path, error)


@contextlib.contextmanager
def announced(path: Path, note: Mapping[str, Any]) -> Iterator[Announcement]:
    """An `Announcement` during a block; after a kill its file stays, but it is neither locked nor renewed."""
    made = Announcement(path, note)
    try:
        yield made
    finally:
        path.unlink(missing_ok=True)
        made.close()
        with contextlib.suppress(OSError):  # other sweeps have notes there
            path.parent.rmdir()


def alive(path: Path) -> bool:
    """Whether the process that announced something in a file still does."""
    try:
        there = path.lstat()
        return flock_held(path) if leases.local(path.parent) else leases.recent(path.parent, there.st_mtime_ns)
    except FileNotFoundError:
        return False
