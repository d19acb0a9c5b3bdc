"""Files of a store: written whole or appended to, never through a link.

A store may come from somebody else, or lie where others write. Whatever stands in a run's folder under the name of a
file that is written there, be it a symbolic link, a pipe or a device, nothing outside the folder is changed. New files
get the rights that the user's umask leaves. Standard library only.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path


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
            raise ValueError(f"{path} is no file of a store but {kind_of(path)}: remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no file of a store but {kind_of(path)}: remove it")
    return handle


def refuse_links(folder: Path) -> None:
    """Refuse a run's folder that is a link or holds one: what is written there would lie elsewhere.

    The store itself may be a link, and so may the folders of it that hold the runs: a user puts them where there is
    room.

    Raises:
        ValueError: Naming the link.
    """
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written through links: remove it")


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


def kind_of(path: Path) -> str:
    """What stands at a path, in words."""
    mode = path.lstat().st_mode
    kinds = ((stat.S_ISLNK, "a link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISREG, "a file"))
    return next((name for test, name in kinds if test(mode)), "a device or a socket")
