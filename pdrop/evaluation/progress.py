"""One line on the terminal that says how far a task is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]  # task, questions answered, questions in all


@contextlib.contextmanager
def progress_line(task: str, progress: bool | Progress) -> Iterator[Progress | None]:
    """A function to call after each batch: the caller's own, a line on stderr, or None."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress or (os.environ.get("CI") and not sys.stderr.isatty()):
        yield None
    else:
        from tqdm import tqdm

        every = 0.1 if sys.stderr.isatty() else 20.0
        with tqdm(desc=task, unit=" questions", file=sys.stderr, mininterval=every, leave=False) as bar:

            def update(_: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield update
