"""Random: the control that every method must beat at the same schedule.

Give it the schedule of the method it is compared with (its twin), and several seeds: a single draw is an anecdote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, View

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
