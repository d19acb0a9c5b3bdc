"""Downsample: the picture is made smaller before the processor sees it, no token is dropped (Liao et al., VTC-Bench).

Each side shrinks by the square root of `pixels`, bicubic: 0.25 is VTC-Bench's D = 2. Towers that take pictures of any
size (Qwen) then make fewer visual tokens; for towers of a fixed size the processor scales the picture up
again, so tokens and cost stay as they are and only detail is lost. Either way it is the control for "did this question
need the detail?" (python -m analysis hard NAME --control downsample). Keep, FLOPs and KV in tables are ratios to the
smaller picture's own tokens; their absolute numbers are what was computed. Nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Downsample(Method):
    """Ranks nothing; for a schedule that keeps everything.

    Attributes:
        pixels: Share of the picture's pixels that are left.
    """

    pixels: float = 0.25  # type: ignore[misc]
    ranks_by_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pixels <= 1:
            raise ValueError(
                f"pixels is the share of the picture that is left, above 0, at most 1, not {self.pixels!r}"
            )

    def score(self, view: View) -> Tensor:
        """Zeros, [B, T]."""
        return view.hidden.new_zeros(view.index.shape).float()
