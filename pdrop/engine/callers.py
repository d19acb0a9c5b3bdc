"""Who called this forward: read off Python's own stack, where nothing that a model is given would tell.

`generate` hands a model the same arguments whether its forward is the prompt that was asked about or the one that
classifier-free guidance compares it with, a whole prompt or a chunk of it; and whether a thread is between two forwards
of `generate` or done with it, only its stack knows.

There is no public way to be told, in transformers 5.23 and 5.24. Hooks of modules see a forward's arguments alone, and
the guiding processor calls the model with ids, mask and a cache of its own, as any prompt of text is; a first chunk
comes with a mask as long as itself. What `generate` was asked for (guidance_scale, prefill_chunk_size) is in a copy of
the GenerationConfig that lives in its frame. Logits processors, stopping criteria and streamers are the caller's, one
call at a time: an attachment is not asked for them. `prepare_inputs_for_generation` runs for the prompt and for each
chunk, not for the guiding one, but neither does it for a forward outside of `generate`; to tell these apart `generate`
would have to be replaced on the instance, too, and that says nothing of threads. So this looks for three functions by
their code: one that is renamed fails on import, one that works otherwise in tests/engine/test_prefills.py.
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
    """The code that runs when a (decorated) function is called."""
    code: CodeType = inspect.unwrap(function).__code__
    return code


GENERATE = code_of(GenerationMixin.generate)
PREFILL = code_of(GenerationMixin._prefill)
UNCONDITIONAL = code_of(UnbatchedClassifierFreeGuidanceLogitsProcessor.get_unconditional_logits)
FORWARD = code_of(nn.Module._call_impl)


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def unconditional() -> bool:
    """Whether this thread's forward is of the prompt that classifier-free guidance compares with."""
    return any(frame.f_code is UNCONDITIONAL for frame in frames(sys._getframe()))


def chunked() -> bool:
    """Whether `generate` hands this thread's forward a chunk of its prompt (prefill_chunk_size)."""
    calls = (frame.f_locals for frame in frames(sys._getframe()) if frame.f_code is PREFILL)
    return any(len(call.get("input_chunks", ())) > 1 for call in calls)


def running(code: CodeType, module: nn.Module | None = None) -> dict[int, int]:
    """The threads that are in a call of this code, of this module, each with the number of its outermost such call."""
    calls: dict[int, int] = {}
    for thread, top in sys._current_frames().items():
        for frame in frames(top):
            if frame.f_code is code and (module is None or frame.f_locals.get("self") is module):
                calls[thread] = id(frame)
    return calls
