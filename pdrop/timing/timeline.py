"""The time of each token of an answer: one generation of fixed length gives TTFT, TPOT and all shorter answers.

`generate` is watched by a logits processor, which is called once per step, when its logits are ready. On a GPU it
records a CUDA event and does not wait; on a CPU it reads the clock. The answer's length is fixed, because otherwise a
method that makes answers shorter or longer would be timed by their length.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Timeline:
    """Milliseconds from the call to each token, and the process's CPU time until the last."""

    ms: tuple[float, ...]
    cpu_ms: float

    @property
    def wall_ms(self) -> float:
        """Milliseconds from the call to the last token."""
        return self.ms[-1]

    @property
    def ttft_ms(self) -> float:
        """Milliseconds from the call to the first token."""
        return self.ms[0]

    @property
    def tpot_ms(self) -> float | None:
        """Per token after the first, on average; None for an answer of one token."""
        return None if len(self.ms) < 2 else (self.ms[-1] - self.ms[0]) / (len(self.ms) - 1)


class Clock(LogitsProcessor):
    """Records when it is called; changes nothing."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks = [self.mark()]

    def mark(self) -> Any:
        """The present moment: seconds of the clock, or a recorded CUDA event."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.marks.append(self.mark())
        return scores

    def milliseconds(self) -> tuple[float, ...]:
        """From the first mark to each other one; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return tuple(self.marks[0].elapsed_time(mark) for mark in self.marks[1:])
        return tuple((mark - self.marks[0]) * 1000 for mark in self.marks[1:])


def answer(model: Any, inputs: Mapping[str, Any], tokens: int, device: torch.device) -> Timeline:
    """Generate exactly `tokens` tokens greedily, and record when each is ready.

    Args:
        model: An image-text-to-text model, in eval mode, with or without an attachment.
        inputs: Arguments of `model.generate`: one batch of prompts.
        tokens: New tokens of every prompt.
        device: The model's.

    Raises:
        RuntimeError: If another number of tokens was generated.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, clock = time.process_time(), Clock(device)
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True,
            logits_processor=[clock], pad_token_id=0,
        )  # fmt: skip
    found = Timeline(clock.milliseconds(), (time.process_time() - cpu) * 1000)
    if len(found.ms) != tokens:
        raise RuntimeError(f"{len(found.ms)} tokens were generated instead of {tokens}: times cannot be compared")
    return found
