"""HiPrune: tokens that middle and late layers of the vision tower attend to (arXiv 2508.00553, "HiPrune: Training-Free
Visual Token Pruning via Hierarchical Attention in Vision-Language Models"; its code, Danielement321/HiPrune at
6e83a12).

Attention is what a token receives, the mean over heads and over ALL rows of the tower, the class token's row among
them. Of a number of tokens, round(number * alpha / 5) are anchors, with the most attention in the object layer. Their
buffers are the tokens to the left and right, above and below. The rest are registers, with the most attention in the
layer whose output is projected. Text is not used, nothing is merged, the class token is not kept.

The object layer is the ninth of CLIP's 24, and the sixteenth of 32 in Qwen2.5-VL's tower, whose last layer gives the
registers and where a token's attention is the sum over its four patches. Other towers have the layer at the same share
of their depth, a choice of ours; `object_layer` sets it.

As published, buffers are neighbours in the row-by-row order of the picture: at the end of a row the token to the right
is the next row's first, and above the first or below the last row it is the picture's first or last token. A buffer may
be an anchor, or another anchor's buffer: then there is one register more. In a tiled picture every tile has its share.

Where this differs from the published code:
- for Qwen2.5-VL that code takes 1 off the registers' attention of anchors and buffers, so that they are not chosen
  again; but there it is a sum over rows, often more than 1 (the mean is 1): such a token is counted twice, and fewer
  tokens stay than the setting says. Here no token is counted twice. With LLaVA that code takes the mean, and none is;
- several pictures have a share by size and their own grid each; that Qwen code gives a wrong grid to all but the first;
- if anchors and buffers are more than the number (3 with alpha = 1), those with the most attention in the object layer
  stay; that code raises. A number at or above the number of tokens keeps everything;
- padding that was cut away is no candidate, and newlines go; the published LLaVA-NeXT code cuts nothing and has none;
- attention in float32 and of two layers; that code computes all maps of all layers in the tower's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import View
from pdrop.methods.in_front import InFront, tiles_of
from pdrop.methods.tower import layer_number
from pdrop.schedule import Schedule, Stage, check_ratio
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 5  # an anchor and its four buffers


@dataclass(frozen=True)
class HiPrune(InFront):
    """Anchors, buffers and registers. Keeps round(n * keep) tokens of a prompt.

    Attributes:
        alpha: Share of the number that is anchors and buffers, as far as they do not coincide.
        object_layer: The tower's layer that anchors are chosen by, counted from 1; None: 9 of 24 (CLIP, SigLIP) or 16
            of 32 (Qwen's towers), in other depths the same share.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    tower_layers: ClassVar[tuple[float, ...] | None] = (0.375, -2)
    merged_tower_layers: ClassVar[tuple[float, ...] | None] = (0.5, -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.alpha)
        layer = self.object_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
            raise ValueError(f"object_layer is a layer of the vision tower, counted from 1, not {layer!r}")

    def looks_at(self) -> tuple[float, ...] | None:
        """The object layer, and the one that is projected."""
        return self.layers_of(self.tower_layers)

    def looks_at_merged(self) -> tuple[float, ...] | None:
        """The object layer, and the last one."""
        return self.layers_of(self.merged_tower_layers)

    def layers_of(self, usual: tuple[float, ...] | None) -> tuple[float, ...]:
        """`usual` with the object layer that was asked for."""
        assert usual is not None
        return usual if self.object_layer is None else (self.object_layer - 1, *usual[1:])

    def count(self, stage: Stage, visual: int) -> int:
        """round(n * keep), as the published Qwen2.5-VL code has it; for LLaVA that code is given numbers."""
        return super().count(stage, visual) if stage.keep is None else round(visual * stage.keep)

    def score(self, view: View) -> Tensor:
        """Attention in the late layer; for anchors and buffers 1 + that in the object layer; 2 more for all that stay.

        [B, T].
        """
        tower = view.tower
        objects, late = self.looks_at_merged() if tower.merges > 1 else self.looks_at()  # type: ignore[misc]
        seen, scores = (tower.of(view.index, tower.received(layer).mean(1)) for layer in (objects, late))
        patches, raised = tower.at(view.index) % tower.states.shape[1] - tower.classes, scores.clone()
        widths = widths_of(view)
        for row, tile, places, each in self.chosen(view, least=1):
            count = min(each, len(places))
            own, at, width = seen[row, places], patches[row, places], widths[row, tile.number]
            anchors = own.argsort(descending=True, stable=True)[: round(count * self.alpha / NEIGHBOURS)]
            near = beside(at[anchors], width, tile.rows)
            marked = scores.new_zeros(tile.rows).index_fill_(0, near, 1)[at] > 0
            found = scores[row, places].where(~marked, 1 + own)
            raised[row, places] = found
            raised[row, places[found.argsort(descending=True, stable=True)[:count]]] += 2
        return raised

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """All rows of attention in two layers of the tower."""
        if not schedule or not prompt.visual:
            return SelectionCost()
        tower = sizes.tower
        looks = self.looks_at_merged() if tower.merge > 1 else self.looks_at()
        numbers = {layer_number(layer, tower.layers) for layer in looks or ()}
        return SelectionCost(macs=sum(tower.received_macs(n, prompt.visual, prompt.images) for n in numbers))


def beside(anchors: Tensor, width: int, patches: int) -> Tensor:
    """Anchors [n] and their neighbours, [5 n], some of them several times.

    Args:
        anchors: Numbers in the picture, row by row.
        width: Tokens in a row of the picture.
        patches: Tokens of the picture.
    """
    import torch

    found = torch.cat([anchors, anchors - 1, anchors + 1, anchors - width, anchors + width])
    return found.clamp(0, patches - 1)


def widths_of(view: View) -> dict[tuple[int, int], int]:
    """For each prompt and tile number, how many tokens a row of the tower's picture has."""
    found: dict[tuple[int, int], int] = {}
    for row in range(len(view.originals)):
        tiles = tiles_of(view, row)
        if view.tower.merges == 1:
            found |= {(row, tile.number): round(tile.rows**0.5) for tile in tiles}
            continue
        firsts = [0, *accumulate(tile.rows for tile in tiles)]
        grids = {grid.first: grid.width for grid in view.images[row]} if tiles else {}
        found |= {(row, tile.number): grids[first] for tile, first in zip(tiles, firsts)}
    return found
