"""Write a result file only when its content changed, and never half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def publish(path: Path, content: bytes) -> bool:
    """Put `content` at `path` unless it is there already.

    Returns:
        Whether the file was written; an unchanged file keeps its date, so that make and git see no change.
    """
    if path.is_file() and path.read_bytes() == content:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; results are shared
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return True
