"""FasterVLM: keep what the tower's class token attends to most (arXiv 2412.01818v1, "[CLS] Attention is All You Need
for Training-Free Visual Token Pruning"; its code, Theia-4869/FasterVLM at f5d5f12).

The mean over heads of the class token's row in the tower's last layer but one, the one whose output LLaVA projects.

Where this differs from the published code:
- only this row is computed, in float32; that code runs the whole tower with full attention maps, and in half
  precision it has dozens of ties;
- a budget above the number of tokens keeps everything; that code raises;
- tiled pictures are seen as the model packs them: padding has been cut away, newlines go. That code forces pictures of
  2 x 2 tiles that are neither cut nor have newlines, and the numbers published for LLaVA-NeXT are of such pictures.
Without a class token (SigLIP) it is the mean over all query rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import View
from pdrop.methods.in_front import InFront
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FasterVLM(InFront):
    """Attention of the tower's class token, nothing else."""

    tower_layers: ClassVar[tuple[int, ...] | None] = (-2,)

    def score(self, view: View) -> Tensor:
        """Mean over heads of the class token's attention, [B, T]; 1 more for the best of each of several tiles."""
        attention = view.tower.rows(-2).mean(1)
        return self.by_tile(view, view.tower.of(view.index, attention))

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """One row of one layer of the tower."""
        return SelectionCost(tower_rows=self.rows_of(schedule, prompt, sizes))
