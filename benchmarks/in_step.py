"""Measuring on a machine that is not quiet: several prefills at once, a layer at a time in turns; and memory kept.

Two things disturb a comparison of prefills more than what is compared. The machine's speed drifts within a second, so
calls that follow each other do not see the same machine: here all sides go through their decoders together, each one
layer and then the next side's, some milliseconds apart. And the allocator gives large tensors back to the system, which
must clear their pages anew each time: `keep_memory` stops that. Together they take the noise of a ratio from 4 % of a
prefill to 1 %.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from pdrop.pace import Pace
from pdrop.timing.clock import Timed

# mallopt's options, of glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MAPPED_AT_MOST, ARENAS_AT_MOST = -1, -2, -4, -8


def keep_memory() -> bool:
    """From now on, what tensors free stays in the process for the next ones. False if the allocator cannot do it."""
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)
    if allocator is None:
        return False
    wanted = {MAPPED_AT_MOST: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28, ARENAS_AT_MOST: 1}
    return all(allocator(what, value) == 1 for what, value in wanted.items())


@dataclass(frozen=True)
class Side:
    """One of the calls that are compared. Sides must not share a model; models may share weights."""

    model: Any
    call: Callable[[], object]


class Turns:
    """Whose turn it is: one side computes, the others wait."""

    def __init__(self, names: list[str]) -> None:
        self.change, self.waiting, self.now = threading.Condition(), names, names[0]

    def take(self, name: str) -> None:
        """Wait for one's turn."""
        with self.change:
            self.change.wait_for(lambda: self.now == name)

    def pass_on(self, name: str, ends: bool = False) -> None:
        """The next side's turn; a side that ends gets none any more."""
        with self.change:
            after = self.waiting[(self.waiting.index(name) + 1) % len(self.waiting)]
            if ends:
                self.waiting.remove(name)
            self.now = after
            self.change.notify_all()


class Player:
    """A side in a round: hands over in front of every decoder layer, and times its own turns alone."""

    def __init__(self, name: str, side: Side) -> None:
        self.name, self.side = name, side
        self.turns: Turns | None = None
        self.wall = self.began = 0.0

    def hand_over(self, layer: nn.Module, given: Any) -> None:
        """A decoder layer begins: the others first."""
        if self.turns is not None:
            self.wall += time.perf_counter() - self.began
            self.turns.pass_on(self.name)
            self.turns.take(self.name)
            self.began = time.perf_counter()

    def play(self, turns: Turns) -> Timed:
        """The call, in this thread; the processor's time is the thread's, which takes none while it waits."""
        turns.take(self.name)
        self.turns, self.wall, self.began, cpu = turns, 0.0, time.perf_counter(), time.thread_time()
        try:
            self.side.call()
            cpu, wall = time.thread_time() - cpu, self.wall + time.perf_counter() - self.began
        finally:
            self.turns = None
            turns.pass_on(self.name, ends=True)
        return Timed(wall * 1000, cpu * 1000)


def in_step(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Timed]]:
    """Call all sides together, layer by layer in turns, on a CPU with one thread each.

    Args:
        sides: By name. Their models have decoders (`get_decoder().layers`) of any lengths.
        rounds: How often, after one round to warm up. Each begins with another side, every other one in reverse.

    Returns:
        By name, one sample per round: samples at the same index were taken together. CPU and wall times are those of
        the side's own turns.

    Raises:
        ValueError: If two sides share a model or there is no round. What a side raises is raised after the round.
    """
    if rounds < 1 or len({id(side.model) for side in sides.values()}) < len(sides):
        raise ValueError("sides in step need a model each, and at least one round")
    players = {name: Player(name, side) for name, side in sides.items()}
    samples: dict[str, list[Timed]] = {name: [] for name in sides}
    pace = Pace("timing", "rounds")
    with ExitStack() as ends, ThreadPoolExecutor(len(sides)) as threads:
        for name, side in sides.items():
            for layer in side.model.get_decoder().layers:
                handle = layer.register_forward_pre_hook(players[name].hand_over)
                ends.callback(handle.remove)
        for number in range(rounds + 1):
            first = number % len(sides)
            order = [*sides][first:] + [*sides][:first]
            turns = Turns(order[:: 1 if number % 2 else -1])
            running = {name: threads.submit(players[name].play, turns) for name in sides}
            timed = {name: future.result() for name, future in running.items()}
            if number:
                for name, sample in timed.items():
                    samples[name].append(sample)
                pace.at(number)
    return samples
