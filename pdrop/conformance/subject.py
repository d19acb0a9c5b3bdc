"""The subject of the checks, and the small functions that the checks use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pdrop.conformance.batches import RAGGED, TOLERANCE
from pdrop.conformance.families import FAMILIES, LAYERS, MROPE_FAMILIES
from pdrop.conformance.prompts import sample
from pdrop.engine import attach
from pdrop.methods.base import Method
from pdrop.schedule import Schedule

VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava")


class NotApplicable(Exception):
    """Raised if a check does not apply to the method; says why."""


class Unmet(AssertionError):
    """Raised if a check fails; says which promise is broken."""


@dataclass(frozen=True)
class Subject:
    """A method with its schedule, on an engine.

    Attributes:
        name: Its name in reports.
        method: The method.
        schedule_for: Its schedule for a decoder of that many layers.
        attach: The engine: attach(model, method, schedule).
    """

    name: str
    method: Method
    schedule_for: Callable[[int], Schedule]
    attach: Callable[[Any, Method, Schedule], Any] = attach

    @property
    def schedule(self) -> Schedule:
        """The schedule for the tiny models' decoder."""
        return self.schedule_for(LAYERS)

    def on(self, family: str) -> Subject:
        """The subject with positions that the family's rotary embeddings allow."""
        if family in MROPE_FAMILIES and self.method.positions == "compact":
            return replace(self, method=replace(self.method, positions="original"))
        return self

    def attached(self, model: Any, schedule: Schedule | None = None) -> Any:
        """The method attached to `model` by the subject's engine; a context manager."""
        return self.attach(model, self.method, self.schedule if schedule is None else schedule)


def must(promise: bool, words: str) -> None:
    """Check a promise.

    Raises:
        Unmet: If it is not kept.
    """
    if not promise:
        raise Unmet(words)


def equal(got: Tensor, want: Tensor, atol: float, words: str) -> None:
    """Check that two tensors are equal within a tolerance.

    Raises:
        Unmet: If they differ by more than `atol` anywhere, in shape, or in being finite.
    """
    must(got.shape == want.shape, f"{words}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    off = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    must(off <= atol, f"{words}: off by {off:.3g}")


def tolerance(backend: str) -> float:
    """The tolerance of logits: of float64 with float32 norms, or of float32."""
    return TOLERANCE[backend]


def samples_of(family: str, model: Any, subject: Subject) -> list[dict[str, Tensor]]:
    """Prompts with one image, two, none and one; where the family takes videos, the second of two is a video.

    Not for methods that look at the vision tower, which sees the frames of a video before they are pooled.
    """
    assert family in FAMILIES
    video = family in VIDEOS and subject.method.looks_at() is None
    return [sample(family, model, texts, n, video=video and n == 1) for n, texts in enumerate(RAGGED)]


def real(batch: dict[str, Tensor], row: int) -> Tensor:
    """Which places of a row are tokens and not padding, [L] bool."""
    return batch["attention_mask"][row].bool()


def order_of(trace: Any) -> list[list[list[int]]]:
    """The trace's order as plain lists: by boundary, by prompt."""
    return [[row.tolist() for row in boundary] for boundary in trace.order]


def merges(trace: Any) -> bool:
    """Whether anything was merged in the last prefill."""
    return any(made for boundary in trace.merged for made in boundary)


def no_grad(check: Callable[..., None]) -> Callable[..., None]:
    """`torch.no_grad` as a decorator that keeps the function's type."""
    wrapped: Callable[..., None] = torch.no_grad()(check)
    return wrapped
