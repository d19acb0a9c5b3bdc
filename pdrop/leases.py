"""Leases: who holds a folder on file systems whose locks may not hold between machines (NFS, Lustre, FUSE, ...).

A folder's holders are numbered: `.lease-1`, `.lease-2`, ... The process that creates the next number holds the folder:
if several create a file that must not exist yet, every file system lets exactly one succeed. The holder renews its
file's time every BEAT seconds, and writes `free` into it when it is done. A process that wants the folder reads the
highest number. If that lease is free, it creates the next number. If not, it remembers the file's time and looks again:
a lease whose time has not changed for LEASE seconds is stale, and the next number is created. A file's time is compared
with its own earlier value alone, and the seconds are counted by the watcher: the clocks of the machines and of the file
server may differ. A holder on this machine whose process has ended is not waited for.

A holder that was stopped for that long (a suspended machine, a server that did not answer) finds a higher number when
it continues, and gives up. Until then two processes may write: what they write must be the same, or be checked when it
is read, as answers and records are. The highest number is never removed, so that a process that looked long ago cannot
create it a second time.

filelock's SoftFileLease has a heartbeat too, but takes over by exchanging two names, which NFS refuses. Standard
library only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("pdrop")

LEASE = 120.0  # s without a sign of life, after which a folder is taken over
BEAT = 15.0  # s between two signs of life
NAME = ".lease-"
FREE = b"free"
KINDS = ("auto", "flock", "lease")
# of one machine alone: there flock holds for everybody who can see the file
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "apfs", "ntfs3", "vfat"}
LOCAL |= {"exfat", "tmpfs", "ramfs", "overlay", "aufs", "squashfs", "iso9660", "rootfs", "devtmpfs", "fuseblk"}

Stamp = tuple[int, int, int]  # number of a lease, its file's time and number

_seen: dict[Path, tuple[Stamp, float]] = {}  # folder -> what its highest lease looked like, and since when


class Lost(OSError):
    """Another process has taken over the folder."""


def wanted(folder: Path, kind: str = "auto") -> bool:
    """Whether a lease, not the system's lock, is to hold a folder: by `kind`, by its present holder, by its disk.

    Args:
        folder: It must be there.
        kind: One of KINDS.
    """
    if kind == "flock":
        return False
    return kind == "lease" or bool(newest(folder)) or not local(folder)


def local(folder: Path) -> bool:
    """Whether a folder is on a disk of this machine; an unknown file system is taken to be local."""
    return _file_system(os.stat(folder).st_dev) in {*LOCAL, ""}


@functools.cache
def _file_system(device: int) -> str:
    """The type of a device's file system, such as nfs4; "" if it is not known."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf8").split("\n"):
            mount, _, source = line.partition(" - ")
            if mount and mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return source.split()[0]
    return ""


class Lease:
    """A folder that this process holds; made by `take`.

    Attributes:
        folder: Which one.
        number: Of the lease.
        lost: Whether another process has taken over the folder.
    """

    def __init__(self, folder: Path, number: int, handle: int) -> None:
        self.folder, self.number, self.lost = folder, number, False
        self._handle, self._ended, self._guard = handle, threading.Event(), threading.Lock()
        # the main thread is interrupted whatever it does; any other learns of it from `check`
        self._main = threading.main_thread().ident if threading.current_thread() is threading.main_thread() else None
        self._pulse = threading.Thread(target=self._beat, name=f"lease of {folder.name}", daemon=True)
        self._pulse.start()

    def check(self) -> None:
        """Refuse to continue if another process has taken over the folder.

        Raises:
            Lost: If so.
        """
        self.lost = self.lost or newest(self.folder) != self.number
        if self.lost:
            raise Lost(
                f"{self.folder} was taken over by another process: this one gave no sign of life for {LEASE:g} s"
            )

    def release(self) -> None:
        """Mark the lease as free."""
        with self._guard:
            self._ended.set()
        try:
            if not self.lost:
                os.pwrite(self._handle, FREE, 0)
                os.ftruncate(self._handle, len(FREE))
                os.fsync(self._handle)
        except OSError as error:  # what was done is done; the lease ends by itself
            log.warning("%s: others wait %g s for its lease, which cannot be freed (%s)", self.folder, LEASE, error)
        finally:
            os.close(self._handle)

    def _beat(self) -> None:
        seen = time.monotonic()
        while not self._ended.wait(BEAT):
            try:
                with self._guard:
                    if self._ended.is_set():
                        return
                    self.check()
                    os.utime(self._handle)  # to the file server's time
                seen = time.monotonic()
            except Lost as error:
                log.warning("%s", error)
            except OSError as error:  # a server that does not answer may recover before others take over
                log.warning("%s: no sign of life could be given (%s)", self.folder, error.strerror)
                self.lost = time.monotonic() - seen > LEASE - BEAT
            with self._guard:
                if self.lost and self._main is not None and not self._ended.is_set():
                    signal.pthread_kill(self._main, signal.SIGINT)  # also of a call that waits
            if self.lost:
                return


def take(folder: Path) -> Lease | None:
    """Try once to take a folder; None if another process holds it, as far as is known so far.

    Args:
        folder: It must be there.
    """
    number = newest(folder)
    if number and not _gone(folder, number):
        return None
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    path = folder / f"{NAME}{number + 1}"
    try:
        handle = os.open(path, flags, 0o666)
    except FileExistsError:  # somebody else was faster
        return None
    try:
        os.write(handle, (json.dumps({"host": socket.gethostname(), **_process(os.getpid())}) + "\n").encode())
        os.fsync(handle)
    except OSError as error:  # a full disk: nobody is to wait for a lease that nobody has
        os.close(handle)
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    if newest(folder) != number + 1:  # what was seen was long ago, and the number had been used and removed since
        os.close(handle)
        path.unlink(missing_ok=True)
        return None
    for older in _numbers(folder):
        if older <= number:
            (folder / f"{NAME}{older}").unlink(missing_ok=True)
    _seen.pop(folder, None)
    return Lease(folder, number + 1, handle)


def held(folder: Path) -> bool:
    """Whether a folder seems to be held, for display: by the file server's clock where that can be read."""
    number = newest(folder)
    if not number:
        return False
    there = _look(folder, number)
    if there is None:
        return held(folder)
    note, (_, changed, _) = there
    return note != FREE and not _died(note) and recent(folder, changed)


def recent(folder: Path, changed: int) -> bool:
    """Whether a file in a folder was renewed less than LEASE seconds ago, by the file server's clock.

    Args:
        folder: Where it is.
        changed: The time of its last change (ns).
    """
    return _now(folder) - changed / 1e9 < LEASE


def newest(folder: Path) -> int:
    """The highest number of a folder's leases; 0 if it has none."""
    return max(_numbers(folder), default=0)


def _numbers(folder: Path) -> Iterator[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return (int(name[len(NAME) :]) for name in names if name.startswith(NAME) and name[len(NAME) :].isdecimal())


def _gone(folder: Path, number: int) -> bool:
    """Whether a lease is free or stale; for a lease that is held, remembers when its file last changed."""
    there = _look(folder, number)
    if there is None:  # a higher one has been taken meanwhile
        return False
    note, stamp = there
    if note == FREE or _died(note):
        return True
    now, (before, since) = time.monotonic(), _seen.get(folder, (None, 0.0))
    if stamp != before:
        _seen[folder] = stamp, now
        return False
    return now - since >= LEASE


def _look(folder: Path, number: int) -> tuple[bytes, Stamp] | None:
    """A lease's content and stamp; None if it has been removed. The file is opened because attributes of an unopened
    one may be cached (NFS)."""
    try:
        handle = os.open(folder / f"{NAME}{number}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            there = os.fstat(handle)
            return file.read(4096), (number, there.st_mtime_ns, there.st_ino)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the second: another machine removed it after it was opened
            return None
        raise


def _process(pid: int) -> dict[str, Any]:
    """What identifies a process: its machine's boot, its namespace of process ids, its id and start."""
    found: dict[str, Any] = {"boot": None, "namespace": None, "pid": pid, "started": _started(pid)}
    with contextlib.suppress(OSError):  # hidden in some containers: then nothing is known about other processes
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf8").strip()
        found["namespace"] = os.stat("/proc/self/ns/pid").st_ino
    return found


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None if that is not visible."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _died(note: bytes) -> bool:
    """Whether the process that took a lease ran on this machine and has ended."""
    try:
        taken = json.loads(note)
        boot, namespace, pid, started = (taken[name] for name in ("boot", "namespace", "pid", "started"))
        here = _process(os.getpid())
        if None in (boot, namespace) or (boot, namespace) != (here["boot"], here["namespace"]):
            return False
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError):  # not written yet, of another version, or not ours to see
        return False
    return _started(pid) not in (started, None)


def _now(folder: Path) -> float:
    """The file server's time, read from a new file there; this machine's time if no file can be made."""
    probe = folder / f".now.{secrets.token_hex(8)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except OSError:
        return time.time()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()
