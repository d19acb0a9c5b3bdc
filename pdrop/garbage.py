"""Collections of garbage, put off while packages are imported and a model is loaded. Standard library only.

Importing torch, transformers and the like makes a million objects that stay. Python looks through all of them each time
their number has grown by a quarter, and finds nothing: 1.5 of the 11 CPU seconds of a start with the embedded model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def not_collected() -> Iterator[None]:
    """Garbage with circular references is collected only after the block. Blocks may be nested."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
