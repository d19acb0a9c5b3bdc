"""Write a result file only when its content changed, and never half."""

from __future__ import annotations

from pathlib import Path

from pdrop.store import write_atomically


def publish(path: Path, content: bytes) -> bool:
    """Put `content` at `path` unless it is there already.

    Returns:
        Whether the file was written; an unchanged file keeps its date, so that make and git see no change.
    """
    if path.is_file() and path.read_bytes() == content:
        return False
    write_atomically(path, content)
    return True
