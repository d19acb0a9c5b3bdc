"""No image: every visual token goes before the decoder. The floor of a benchmark: what the text alone scores.

With "compact" positions the model computes exactly what it would for the prompt without its image tokens; whatever
surrounds them in the template (Qwen's vision marks) stays. The vision tower still runs, and is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, Positions, View

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NoImage(Method):
    """Ranks nothing; for a schedule that keeps nothing."""

    positions: Positions = field(default="compact", kw_only=True)
    ranks_by_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        """Zeros, [B, T]."""
        return view.hidden.new_zeros(view.index.shape).float()
