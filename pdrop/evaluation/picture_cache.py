"""Processed pictures, cached by content: questions about the same picture, and the runs of a sweep, share them.

    cache = of_process(2 << 30)              # one per process, for all its runs, of at most this many bytes
    cache.get(("pixels and settings",))      # None, until something was put there

A key has everything that the value depends on: the pixels, the processor's settings, how the picture was prepared.
A picture that is hidden, blurred or replaced has other pixels, hence another key. Tower features are not cached.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 512  # bytes that a short entry is counted as, its key included


@dataclass(frozen=True)
class Content:
    """Identifies the pixels of a picture as it is shown.

    Attributes:
        digest: 32 hex digits over them; "" if nothing is cached.
        size: (width, height).
    """

    digest: str
    size: tuple[int, int]

    @classmethod
    def of(cls, image: Image, hashed: bool = True) -> Content:
        """The content of a picture in RGB."""
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() if hashed else ""
        return cls(digest, image.size)


class PictureCache:
    """Values by key; above the limit the least recently used are dropped. Thread-safe.

    Args:
        limit: Bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.hits, self.misses = limit, 0, 0, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """The value of a key; None if it is not in the cache."""
        with self._lock:
            if key not in self._kept:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: Any, size: int = SMALL) -> None:
        """Cache a value, which must not be changed afterwards.

        Args:
            size: Its bytes; a value larger than the whole cache is not kept.
        """
        size = max(size, SMALL)
        with self._lock:
            if key in self._kept:
                self.used -= self._kept.pop(key)[1]
            if size <= self.limit:
                self._kept[key] = (value, size)
                self.used += size
            self._shrink()

    def resize(self, limit: int) -> None:
        """Set another limit, in bytes."""
        with self._lock:
            self.limit = limit
            self._shrink()

    def _shrink(self) -> None:
        while self.used > self.limit:
            _, (_, size) = self._kept.popitem(last=False)
            self.used -= size


_OF_PROCESS = PictureCache(0)


def of_process(limit: int) -> PictureCache:
    """The cache of this process, with this limit in bytes."""
    _OF_PROCESS.resize(limit)
    return _OF_PROCESS
