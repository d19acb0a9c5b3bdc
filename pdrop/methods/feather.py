"""FEATHER: attention without positions, and a coarse grid in addition (arXiv 2412.13180, "Feather the Throttle:
Revisiting Visual Token Pruning for Vision-Language Model Acceleration"; its code, markendo/FEATHER at c2a09b2).

The last token's attention in the layer before the boundary, its queries and keys without rotary positions, with softmax
over the visual keys only, mean over heads. At the first boundary every `stride`-th row and column of the picture stays
as well; later boundaries only rank. The layers keep their positions, only the ranking has none.

A schedule's numbers include the grid's tokens: of 270, the grid's 81 of 27 x 27 stay and the best 189 of the others,
as in the published union of 270. Adaptive stages follow the published rule: the best int(n * (1 - reduction))
and the grid, their overlap counted once, then int(left * (1 - reduction) ** 2) of what is left; without a grid every
boundary keeps int(left * (1 - reduction)).

rotated=True, stride=0 is that repository's own "FastV" baseline, which is not FastV: softmax over the visual keys only
weighs heads differently. Where this differs from the published code: pictures of any shape, several of them, batches;
that code knows one square picture after the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, Ranking, View
from pdrop.methods.transfer import on_device, read_back
from pdrop.schedule import Schedule, Stage, check_ratio
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FEATHER(Method):
    """Attention of the query token over the visual tokens, without positions; and at the first boundary a grid.

    Attributes:
        stride: Every `stride`-th row and column stays at the first boundary; 0: none.
        reduction: At adaptive stages, the share that the ranking drops.
        rotated: Whether the ranking has the rotary positions.
        observe: -1: the layer before the boundary, 0: the layer at it.
    """

    stride: int = 3
    reduction: float = 0.7
    rotated: bool = False
    observe: int = field(default=-1, kw_only=True)  # type: ignore[misc]
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 0:
            raise ValueError(f"stride is a number of rows and columns from 0 (no grid) on, not {self.stride!r}")
        if not 0 <= self.reduction <= 1:
            raise ValueError(f"reduction is a share between 0 and 1, not {self.reduction!r}")

    def score(self, view: View) -> Tensor | Ranking:
        """Attention among the visual tokens, [B, T]; 1 more for the grid. At adaptive stages with how many stay."""
        import torch

        rows = view.attention_rows(rotated=self.rotated)
        among = rows.probabilities * (view.visual & view.valid)[:, None, None]
        among = among / among.sum(-1, keepdim=True).clamp(min=torch.finfo(among.dtype).tiny)
        weight = rows.asks[..., None].float()
        scores = (among.mean(1) * weight).sum(1) / weight.sum(1).clamp(min=1)
        assert view.stage is not None
        stays, gridded, best = [], {}, []
        for row, (now, original) in enumerate(zip(view.visual_counts, view.originals)):
            first, share = now == original, 1 - self.reduction
            count = int(now * (share if first or not self.stride else share * share))
            if first and self.stride and now:
                at = view.visual_places(row)
                grid = [token for token in self.grid(view, row) if token < len(at)]  # a pinned token is the last one
                best.append(scores[row, at].argsort(descending=True, stable=True)[:count])
                scores[row, at[on_device(grid, at.device)]] += 1
                gridded[row] = grid
            stays.append(count)
        if not view.stage.adaptive:
            return scores
        for (row, grid), others in zip(gridded.items(), read_back(best)):
            stays[row] = len({*grid, *others.tolist()})
        return Ranking(scores, torch.tensor(stays))

    def grid(self, view: View, row: int) -> list[int]:
        """Numbers of the visual tokens in every `stride`-th row and column."""
        return [
            grid.token(down, across)
            for grid in view.images[row]
            for down in range(0, grid.height, self.stride)
            for across in range(0, grid.width, self.stride)
        ]

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """One row at each boundary; without rotary positions the keys are computed again."""
        return SelectionCost(boundaries=schedule.layers, keys_cached=self.observe < 0 and self.rotated)

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        return feather(num_layers, ratio, layers)


def feather(
    num_layers: int, ratio: float = 0.377, layers: Sequence[int] | None = None, adaptive: bool = False
) -> Schedule:
    """Boundaries 8 and 16 of 32 layers (in proportion for other depths), which keep `ratio` and 9 % of that.

    Args:
        num_layers: Layers of the decoder.
        ratio: Share that stays at the first boundary, the grid included. The published setting, reduction=0.7 with
            stride=3, has 0.377 on average.
        layers: Other boundaries.
        adaptive: The published rule, which counts the overlap of grid and ranking once: `ratio` is ignored.

    Raises:
        ValueError: If the ratio is not a fraction, or the boundaries do not fit the layers.
    """
    check_ratio(ratio)
    at = layers or [max(1, round(num_layers / 4)), max(2, round(num_layers / 2))]
    if adaptive:
        return Schedule(tuple(Stage(layer, adaptive=True) for layer in at)).check(num_layers)
    return Schedule(tuple(Stage(layer, ratio * 0.09**number) for number, layer in enumerate(at))).check(num_layers)
