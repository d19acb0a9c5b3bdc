"""Clocks for one call, and for an attachment's own hooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pdrop.engine import Attachment


@dataclass(frozen=True)
class Timed:
    """One call: its wall time, and the process's CPU time (all threads), in milliseconds."""

    wall_ms: float
    cpu_ms: float


def time_call(call: Callable[[], Any], device: torch.device) -> Timed:
    """Time one call; the device is synchronised before and after it."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        cpu = time.process_time()
        begin.record(torch.cuda.current_stream(device))
        call()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return Timed(begin.elapsed_time(end), (time.process_time() - cpu) * 1000)
    if device.type == "mps":
        torch.mps.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "mps":
        torch.mps.synchronize()
    return Timed((time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000)


def model_device(model: torch.nn.Module) -> torch.device:
    """The device of the model's first weights."""
    return next(model.parameters()).device


class ClockedAttachment(Attachment):
    """An attachment that adds up the seconds spent in its own hooks: reading the prompt, ranking, gathering, masks,
    putting rows back. The processor's time on a CPU. On a GPU the wall's, synchronised before and after each hook: an
    upper bound, by milliseconds, for the queue is empty whenever one begins."""

    spent = 0.0

    def seconds(self) -> float:
        """The clock that hooks are timed by."""
        device = model_device(self.architecture.vlm)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    def clock(self, hook: Callable[..., Any], *given: Any) -> Any:
        """Call one of the hooks."""
        begin = self.seconds()
        try:
            return hook(*given)
        finally:
            self.spent += self.seconds() - begin

    def open(self, *given: Any) -> Any:
        return self.clock(super().open, *given)

    def enter(self, *given: Any) -> Any:
        return self.clock(super().enter, *given)

    def watch(self, *given: Any) -> Any:
        return self.clock(super().watch, *given)

    def leave(self, *given: Any) -> Any:
        return self.clock(super().leave, *given)

    def take_deepstack(self, *given: Any) -> Any:
        return self.clock(super().take_deepstack, *given)

    def add_deepstack(self, *given: Any) -> Any:
        return self.clock(super().add_deepstack, *given)

    def close(self, *given: Any) -> Any:
        return self.clock(super().close, *given)
