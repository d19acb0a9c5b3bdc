"""Writes result files in one step, and only if their content changed."""

from __future__ import annotations

from pathlib import Path

from pdrop.store import LONGEST_WRITE, remove_leftovers, write_atomically


def publish(path: Path, content: bytes) -> bool:
    """Write `content` to `path` unless it is already there.

    Returns:
        Whether the file was written; an unchanged file keeps its date, so that make and git see no change.

    Raises:
        ValueError: If it cannot be written; the message says what to do.
    """
    if path.is_file() and path.read_bytes() == content:
        return False
    try:
        remove_leftovers(path.parent, LONGEST_WRITE)
        write_atomically(path, content)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another folder with --out DIR") from error
    return True
