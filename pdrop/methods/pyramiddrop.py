"""PyramidDrop: rank by the attention of the last instruction token (arXiv 2410.17247, "PyramidDrop: Accelerating
Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", section 3.2).

The paper's Eq. 2 takes query and keys of the stage's last layer; its published code takes those of the layer after
the boundary, on the boundary's input. The paper's numbers were made with that code, and this follows it.
After each drop that code renumbers the positions, hence "compact" as default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdrop.methods.base import Method, Positions, View
from pdrop.schedule import Schedule, pyramid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Attention from the query tokens, observed and cut at the boundary layer; keeps int(n * keep) tokens."""

    positions: Positions = field(default="compact", kw_only=True)
    observe: int = field(default=0, kw_only=True)  # type: ignore[misc]

    def score(self, view: View) -> Tensor:
        """Mean over heads (and query tokens) of the attention probabilities, [B, T]."""
        return view.attention()

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """Four stages, each with `ratio` of the visual tokens of the previous one."""
        return pyramid(num_layers, ratio=ratio, layers=layers)
