"""Prepares batches while the model answers: a few ahead, in threads, returned in order.

    with closing(ahead(prepare, batches, depth=3)) as ready:
        for batch in ready:
            ...                     # meanwhile the next three are prepared

An exception from preparing a batch is raised when that batch is due, after the answers of earlier batches.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")

DEPTH = 3  # batches ahead on an accelerator


@dataclass(frozen=True)
class Preparation:
    """How inputs are prepared ahead and cached. No part of a run's identity, since it changes no number.

    Attributes:
        prefetch: Batches that are prepared ahead, each by a thread; 0: none. None: DEPTH on an accelerator, 0 on a CPU,
            where the threads would compete with the model.
        picture_cache: GiB of host memory for processed pictures; 0: no cache.
    """

    prefetch: int | None = None
    picture_cache: float = 2.0

    def check(self) -> None:
        """Refuse invalid values.

        Raises:
            ValueError: Naming the dial and the values that it takes.
        """
        if self.prefetch is not None and self.prefetch < 0:
            raise ValueError(f"prefetch is a whole number of batches from 0 on, or null, not {self.prefetch}")
        if self.picture_cache < 0:
            raise ValueError(f"picture_cache is in GiB, from 0 on, not {self.picture_cache:g}")

    def depth(self, device: str) -> int:
        """Batches ahead on a device."""
        if self.prefetch is not None:
            return self.prefetch
        return 0 if device.startswith("cpu") else DEPTH

    @property
    def cache_bytes(self) -> int:
        """The limit of the cache."""
        return int(self.picture_cache * 2**30)


def ahead(prepare: Callable[[Given], Made], items: Iterable[Given], depth: int) -> Generator[Made]:
    """Yields `prepare(item)` for each item, in order. Closing it, or an exception, waits for the threads to end.

    Args:
        prepare: Called in `depth` threads at once.
        items: Taken as they are needed, never more than `depth` ahead.
        depth: Items that are prepared in advance; 0: each is prepared when it is due, in the caller's thread.

    Raises:
        BaseException: What `prepare` raised, at its item.
    """
    source = iter(items)
    if depth == 0:
        yield from map(prepare, source)
        return
    pool = ThreadPoolExecutor(depth, thread_name_prefix="pdrop-prefetch")
    waiting: deque[Future[Made]] = deque()
    try:
        waiting.extend(pool.submit(prepare, item) for item in itertools.islice(source, depth))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(prepare, item) for item in itertools.islice(source, 1))
            yield made
            del made  # free the answered batch before the next one is taken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
