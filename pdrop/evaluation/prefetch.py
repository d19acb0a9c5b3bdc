"""Batches are prepared while the model answers: a few ahead, in threads, handed over in their order.

    with closing(ahead(prepare, batches, depth=3)) as ready:
        for batch in ready:
            ...                     # meanwhile the next three are prepared

What preparing a batch raises comes where that batch would have come, after the answers of those before it.
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

DEPTH = 3  # batches ahead where a device computes


@dataclass(frozen=True)
class Preparation:
    """How prompts come to the model. No part of a run's identity, for it changes no number.

    Attributes:
        prefetch: Batches that are prepared ahead, each by a thread; 0: none. None: DEPTH on an accelerator, none on a
            CPU, where the threads would take what the model computes with.
        picture_cache: GiB that processed pictures may take in the host's memory; 0: none is kept.
    """

    prefetch: int | None = None
    picture_cache: float = 2.0

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: Naming the dial and what it takes.
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
    """What `prepare` makes of each item, in order. Closing it, or an exception, waits for the threads to end.

    Args:
        prepare: Called in `depth` threads at once.
        items: Taken as they are needed, never more than `depth` ahead.
        depth: Items that are prepared before they are asked for; 0: each when it is asked for, by the caller.

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
            del made  # the batch that was answered makes room before the next one is taken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
