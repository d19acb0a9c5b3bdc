"""Who called this forward, read from Python's call stack because a forward's arguments do not say it.

`generate` gives a model the same arguments for the prompt itself and for the prompt that classifier-free guidance
compares it with, and for a whole prompt and a chunk of it. Whether a thread is between two forwards of `generate` or
has finished also shows only in its stack.

transformers 5.23 and 5.24 have no public way to find out. Module hooks only see a forward's arguments, and the guidance
processor calls the model with ids, mask and a cache of its own, like any text prompt; a first chunk comes with a mask
as long as itself. The arguments of `generate` (guidance_scale, prefill_chunk_size) are in a copy of the
GenerationConfig in its frame. Logits processors, stopping criteria and streamers are passed by the caller, per call; an
attachment cannot add its own. `prepare_inputs_for_generation` runs for the prompt and for each chunk and not for the
guidance prompt, but it does not run for a forward outside `generate` either; to tell these apart `generate` would have
to be replaced on the instance too, and that would not help with threads. So this looks for three functions by their
code: if one is renamed the import fails, if one works differently tests/engine/test_prefills.py fails.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor


def code_of(function: Callable[..., Any]) -> CodeType:
    """The code object of a function under its decorators."""
    code: CodeType = inspect.unwrap(function).__code__
    return code


GENERATE = code_of(GenerationMixin.generate)
PREFILL = code_of(GenerationMixin._prefill)
UNCONDITIONAL = code_of(UnbatchedClassifierFreeGuidanceLogitsProcessor.get_unconditional_logits)
FORWARD = code_of(nn.Module._call_impl)


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def unconditional() -> bool:
    """Whether this thread's forward is of classifier-free guidance's unconditional prompt."""
    return any(frame.f_code is UNCONDITIONAL for frame in frames(sys._getframe()))


def chunked() -> bool:
    """Whether this thread's forward is of a chunk of a prompt (`prefill_chunk_size` of `generate`)."""
    calls = (frame.f_locals for frame in frames(sys._getframe()) if frame.f_code is PREFILL)
    return any(len(call.get("input_chunks", ())) > 1 for call in calls)


def running(code: CodeType, module: nn.Module | None = None) -> dict[int, int]:
    """Threads that are in a call of this code (of this module), each with the number of its outermost such call."""
    calls: dict[int, int] = {}
    for thread, top in sys._current_frames().items():
        for frame in frames(top):
            if frame.f_code is code and (module is None or frame.f_locals.get("self") is module):
                calls[thread] = id(frame)
    return calls
