"""Forwards of several threads on one attached model: each has its own state, and none outlives the `with` block.

At its end the block waits for running forwards. A thread in the middle of `generate` would then continue without
dropping, on a cache from which keys were dropped: its next forward is refused instead.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from pdrop.engine.callers import FORWARD, GENERATE, running
from pdrop.engine.prefill import Prefill
from pdrop.engine.state import Forward


class Running(threading.local):
    """The forward that runs in this thread.

    Attributes:
        owner: The outermost hooked module whose call is running.
        entered: Whether it has called the hooked module inside it.
        run: The forward's state, if it has anything to drop or follows a forward that had.
        prefill: The forward's record, if it brought prompts.
    """

    owner: nn.Module | None = None
    entered = False
    run: Forward | None = None
    prefill: Prefill | None = None

    def opens(self, module: nn.Module, outermost: bool) -> bool:
        """Whether a call of this module is a new forward, not a part of the running one.

        An interrupted forward (Ctrl-C) never ends: a call that cannot be part of it is a new forward.
        """
        if self.owner is None or outermost or self.owner is module or self.entered:
            return True
        self.entered = True
        return False

    def clear(self) -> None:
        """Forget the forward, which has ended."""
        self.owner, self.entered, self.run, self.prefill = None, False, None, None


class Threads:
    """Which threads use an attachment."""

    def __init__(self, words: str):
        self.words = words  # the message for a forward that comes too late
        self.change = threading.Condition()
        self.busy: set[int] = set()  # threads that are in a forward
        self.ended = False

    def enter(self) -> None:
        """A forward begins.

        Raises:
            RuntimeError: If the block is ending.
        """
        with self.change:
            if self.ended:
                raise RuntimeError(self.words)
            self.busy.add(threading.get_ident())

    def leave(self) -> None:
        """A forward of this thread has ended."""
        with self.change:
            self.busy.discard(threading.get_ident())
            if self.ended:
                self.change.notify_all()

    def end(self) -> None:
        """End the block: no forward may begin any more, and running forwards of other threads are waited for."""
        with self.change:
            self.ended = True
            self.busy.discard(threading.get_ident())
            while (
                self.busy and self.busy & running(FORWARD).keys()
            ):  # a thread that died in its forward is not waited for
                self.change.wait(0.05)


class Ended:
    """Refuses the next forward of threads whose `generate` has outlived its block, then removes itself."""

    def __init__(self, modules: list[nn.Module], generating: dict[int, int], words: str):
        self.model, self.generating, self.words = modules[0], generating, words
        self.handles: list[Any] = []  # of `refuse`, registered by pdrop/engine/hooks.py

    def refuse(self, module: nn.Module, args: Any) -> None:
        """Before a forward of any thread.

        Raises:
            RuntimeError: If the thread is one of these.
        """
        now, own = running(GENERATE, self.model), threading.get_ident()
        self.generating = {thread: call for thread, call in self.generating.items() if now.get(thread) == call}
        late = self.generating.pop(own, None) is not None
        if not self.generating:
            for handle in self.handles:
                handle.remove()
        if late:
            raise RuntimeError(self.words)
