"""A task's progress: a bar on a terminal, otherwise a plain line every half a minute."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from pdrop.pace import Pace, on_a_terminal

Progress = Callable[[str, int, int], None]  # task, questions answered, questions in all


@contextlib.contextmanager
def progress_line(task: str, progress: bool | Progress, pace: Pace) -> Iterator[Progress | None]:
    """A function to call after each batch: the caller's own, a bar or lines, or None.

    Args:
        task: What is asked now.
        progress: The caller's own, or whether there is one.
        pace: Of the lines; the same for all tasks of a run, since each may take less than the time between two lines.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    elif on_a_terminal():
        with _bar(task) as update:
            yield update
    else:
        pace.turn_to(task)
        yield lambda _, done, total: pace.at(done, total)


@contextlib.contextmanager
def _bar(task: str) -> Iterator[Progress]:
    from tqdm import tqdm

    bar: Any = None
    terminal = sys.stderr  # while the task's code asks, it is redirected

    def update(_: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None:  # the total is not known before the first batch
            bar = tqdm(desc=task, unit=" questions", total=total, leave=False, dynamic_ncols=True, file=terminal)
        bar.update(done - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()
