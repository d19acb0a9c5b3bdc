"""Random: the control that every method must beat at the same schedule.

Give it the schedule of the method it is compared with (its twin), and several seeds: a single draw is an anecdote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View
from pdrop.schedule import Schedule, pyramid

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomDrop(Method):
    """Uniform scores, seeded per prompt: the same prompt loses the same tokens whatever the batch."""

    seed: int = 0
    ranks_by_attention: ClassVar[bool] = False

    def score(self, view: View) -> Tensor:
        """Uniform numbers, [B, T]."""
        return view.draw(self.seed)

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """PyramidDrop's: the twin of another method is given that one's dial."""
        return pyramid(num_layers, ratio=ratio, layers=layers)
