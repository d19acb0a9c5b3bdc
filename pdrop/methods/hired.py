"""HiRED: the class token's attention, with a budget for every tile (arXiv 2408.10945, "HiRED: Attention-Guided Token
Dropping for Efficient Inference of High-Resolution Vision-Language Models"; its code, hasanar1f/HiRED at 502d6dd).

In a tiled picture the small picture gets int(number * alpha). The rest is shared among the tiles by what the small
picture's class token attends to in the FIRST layer of the tower: by how many of its int(n (1 - alpha)) most attended
patches belong to each tile. In every tile, and in the small picture, the patches with the most attention in the last
layer but one (sum over heads) stay. A picture of one tile is pruned by that attention alone.

As published, a tile's patches are a contiguous run of the small picture's FLATTENED patches: for 2 x 2 tiles the first
tile is given the share of the top quarter of the picture, six full rows, not of the top left quadrant.
shares="quadrants" is what was meant.

Where this differs from the published code:
- tiles have their true places; that code takes rows for columns and so transposes every grid that is not square;
- padding that was cut away is not a candidate; that code chooses first and then loses what it chose in the padding;
- shares are rounded down and the remainder is lost, as there (28 of 30, say), and so is a tile's share above its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pdrop.methods.base import View
from pdrop.methods.in_front import InFront, pictures_in, tiled
from pdrop.methods.tower import Tile
from pdrop.methods.transfer import on_device
from pdrop.schedule import Schedule, check_ratio
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor

Shares = Literal["flat", "quadrants"]


@dataclass(frozen=True)
class HiRED(InFront):
    """Attention of the tower's class token, tile by tile.

    Attributes:
        alpha: Share of the number that the small picture gets.
        shares: Which patches of the small picture count for a tile: "flat" runs, or "quadrants".
    """

    alpha: float = 0.5
    shares: Shares = "flat"
    tower_layers: ClassVar[tuple[int, ...] | None] = (0, -2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio(self.alpha)
        if self.shares not in get_args(Shares):
            raise ValueError(f"shares is one of {', '.join(get_args(Shares))}, not {self.shares!r}")

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """The tiles' shares, each at most the tile's tokens."""
        found = []
        for row, original in enumerate(visual):
            pictures = list(self.pictures(view, row))
            given = [
                min(n, len(tile.places)) for picture, each in pictures for tile, n in self.given(view, picture, each)
            ]
            found.append((sum(given), 0) if pictures else (original, 0))
        return found

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """At most: what rounding down takes from a picture's tiles follows from its attention."""
        return self.by_shares(schedule, prompt, num_layers, pictures_in(prompt))

    def given(self, view: View, picture: list[Tile], count: int) -> Iterator[tuple[Tile, int]]:
        """How many tokens of each tile stay, of `count` of the picture."""
        import torch

        tower, small, tiles = view.tower, picture[0], picture[1:]
        if not tiles:
            yield small, count
            return
        seen = tower.rows_on_host(0)[small.number].sum(0)[tower.classes :]
        patches = len(seen)
        first = min(int(count * self.alpha), patches)
        best = torch.zeros(patches)
        best[seen.argsort(descending=True, stable=True)[: int(patches * (1 - self.alpha))]] = 1
        looks = [float(part.sum()) for part in self.parts_of(best, view, picture)]
        yield small, first
        for tile, look in zip(tiles, looks):
            share = torch.tensor(look) / max(1.0, sum(looks)) * (count - first)
            yield tile, min(int(share), patches)

    def parts_of(self, best: Tensor, view: View, picture: list[Tile]) -> list[Tensor]:
        """The patches of the small picture that count for each tile, [patches] split by tile."""
        tiles = len(picture) - 1
        if self.shares == "flat":
            return list(best.split([(len(best) * (n + 1)) // tiles - (len(best) * n) // tiles for n in range(tiles)]))
        side, down = round(len(best) ** 0.5), rows_of_tiles(picture)
        square = best.view(side, side)
        across = tiles // down
        return [
            part
            for band in square.tensor_split(down, 0)
            for part in (piece.flatten() for piece in band.tensor_split(across, 1))
        ]

    def score(self, view: View) -> Tensor:
        """Sum over heads of the class token's attention, [B, T]; raised for the chosen tokens of a tiled picture."""
        scores = view.tower.of(view.index, view.tower.rows(-2).sum(1))
        raised = scores.clone()
        for row in range(len(view.originals)):
            pictures = list(self.pictures(view, row))
            if sum(len(picture) for picture, _ in pictures) < 2:
                continue
            for picture, each in pictures:
                for tile, count in self.given(view, picture, each):
                    places = on_device(tile.places, scores.device)
                    best = scores[row, places].argsort(descending=True, stable=True)[:count]
                    raised[row, places[best]] += view.tower.rows(-2).shape[1]
        return raised

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """A row of the last layer but one, and one of the first layer if a picture has tiles."""
        thinned = min(prompt.visual_per_layer, default=0) < prompt.visual
        read = (0, -2) if thinned and tiled(prompt, sizes.tower.tokens) else (-2,)
        layers = len({number % sizes.tower.layers for number in read})
        return SelectionCost(tower_rows=self.rows_of(schedule, prompt, sizes, layers))


def rows_of_tiles(picture: list[Tile]) -> int:
    """How many rows of tiles a picture has: tiles next to each other interleave their places in each row of tokens."""
    tiles, rows, end = picture[1:], 1, -1
    for tile in tiles:
        if end >= 0 and tile.places and tile.places[0] > end:
            rows += 1
            end = -1
        end = max(end, tile.places[-1] if tile.places else end)
    return rows
