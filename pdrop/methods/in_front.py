"""What methods that cut before the decoder share: boundary 0, renumbered positions, one budget for every tile.

The schedule's number is for the whole prompt. Every picture, tile and crop gets a share of it, rounded down, in
proportion to its rows in the tower: the same number each if all have one size, as in the published codes, where 640,
320 and 160 "tokens" of LLaVA-NeXT are 128, 64 and 32 for each of five tiles. If a tile has fewer tokens than its share
because padding was cut away, the surplus is not passed on. Newline tokens, which none of these codes has, go; nothing
goes if all tokens are to stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Merged, Method, Positions, View
from pdrop.methods.tower import Tile
from pdrop.methods.transfer import on_device
from pdrop.schedule import Schedule, Stage, single
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InFront(Method):
    """A method with one boundary that ranks by the vision tower's attention or states for each tile."""

    positions: Positions = field(default="compact", kw_only=True)
    ranks_by_attention: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = True
    tower_layers: ClassVar[tuple[float, ...] | None] = ()

    # ------------------------------------------------------------------ how many

    def divided(self, stage: Stage, visual: int, tiles: Sequence[int]) -> list[int] | None:
        """How many tokens of each tile stay, made ones included; None if nothing goes.

        Args:
            stage: The stage that begins at the boundary.
            visual: The prompt's visual tokens.
            tiles: Rows of the tower of each tile, or of each picture.
        """
        whole = self.count(stage, visual)
        return None if whole >= visual else [whole * rows // sum(tiles) for rows in tiles]

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """Each tile's share, at most what it has."""
        assert view.stage is not None
        found = []
        for row, original in enumerate(visual):
            tiles = tiles_of(view, row)
            shares = self.divided(view.stage, original, [tile.rows for tile in tiles])
            ends = None if shares is None else [min(n, len(tile.places)) for n, tile in zip(shares, tiles)]
            found.append((original, 0) if ends is None else self.made(view, row, ends))
        return found

    def made(self, view: View, row: int, each: list[int]) -> tuple[int, int]:
        """For a prompt whose tiles end with `each` tokens: how many stay as they are, how many are made."""
        return sum(each), 0

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """Every crop's or picture's share."""
        return self.by_shares(schedule, prompt, num_layers, tiles_in(prompt))

    def by_shares(self, schedule: Schedule, prompt: PromptSize, num_layers: int, tiles: Sequence[int]) -> list[float]:
        """Visual tokens that enter each layer if tiles, or pictures, of these sizes have shares of their own."""
        left = super().entering(schedule, prompt, num_layers)
        if len(tiles) < 2:
            return left
        return [n if n >= prompt.visual else float(sum(n * rows // sum(tiles) for rows in tiles)) for n in left]

    def counts_of(self, schedule: Schedule, prompt: PromptSize, tiles: Sequence[float]) -> list[int]:
        """How many tokens of each tile stay, for the closed form; of whole tiles, as `chosen` has them."""
        (stage,) = schedule.stages
        if stage.adaptive:
            return [int(min(prompt.visual_per_layer) * rows / sum(tiles)) for rows in tiles]
        return self.divided(stage, round(prompt.visual), [round(rows) for rows in tiles]) or [round(n) for n in tiles]

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """One cut before the decoder."""
        return single(0, ratio, num_layers, layers)

    # ------------------------------------------------------------------ which

    def chosen(self, view: View, least: int = 2) -> Iterator[tuple[int, Tile, Tensor, int]]:
        """For every tile that loses tokens: its prompt, the tile, its candidates' places [n], and its share.

        Args:
            least: Only in prompts with at least this many tiles.
        """

        assert view.stage is not None
        for row, original in enumerate(view.originals):
            tiles = tiles_of(view, row)
            shares = self.divided(view.stage, original, [tile.rows for tile in tiles])
            if shares is None or len(tiles) < least:
                continue
            for tile, each in zip(tiles, shares):
                places = on_device(tile.places, view.index.device)
                if view.pinned[row]:
                    places = places[view.visual[row, places]]
                yield row, tile, places, each

    def pictures(self, view: View, row: int) -> Iterator[tuple[list[Tile], int]]:
        """A prompt's pictures that lose tokens, and how many each ends with."""
        assert view.stage is not None
        pictures = view.tower.pictures[row]
        rows = [sum(tile.rows for tile in picture) for picture in pictures]
        yield from zip(pictures, self.divided(view.stage, view.originals[row], rows) or ())

    def attended(self, view: View) -> float:
        """The layer of the tower whose attention it ranks by."""
        layers = self.merged_tower_layers if view.tower.merges > 1 else self.tower_layers
        assert layers
        return layers[-1]

    def by_tile(self, view: View, scores: Tensor) -> Tensor:
        """Scores in 0..1, raised by 1 for the best of each tile where a prompt has several. [B, T]."""
        raised = scores.clone()
        for row, _, places, each in self.chosen(view):
            best = scores[row, places].argsort(descending=True, stable=True)[:each]
            raised[row, places[best]] += 1
        return raised

    # ------------------------------------------------------------------ what it costs

    def rows_of(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes, layers: int = 1) -> tuple[float, ...]:
        """Rows of attention in this many layers of the tower: the class token's, or all if there is none."""
        if not schedule or not prompt.visual:
            return ()
        frames = sizes.tower.frames(prompt.visual, prompt.images)
        asked = 1.0 if sizes.tower.class_tokens else max((h * w for h, w in frames), default=0.0)  # of each, at most
        return (asked,) * layers


def tiles_in(prompt: PromptSize) -> list[int]:
    """Relative sizes of a prompt's crops, tiles and frames."""
    if isinstance(prompt.images, int):
        return [1] * prompt.images
    return [height * width for height, width in prompt.grids]


def pictures_in(prompt: PromptSize) -> list[int]:
    """Relative sizes of a prompt's pictures and videos; the tiles of a prompt are taken to be of one picture."""
    if prompt.images is None or isinstance(prompt.images, int):
        return [1] if tiled(prompt) else tiles_in(prompt)
    return [frames * height * width for frames, height, width in prompt.images]


def tiled(prompt: PromptSize, tokens: int | None = None) -> bool:
    """Whether a prompt's crops are tiles of pictures.

    Where tiles are joined a newline ends each row, so the visual tokens are not a whole number for each crop: neither a
    crop's own nor one more (a frame's class token, the newline after a picture of one tile).

    Args:
        prompt: The prompt.
        tokens: Visual tokens of a crop; None: the square nearest to the mean.
    """
    if not isinstance(prompt.images, int) or prompt.images < 2 or prompt.video:
        return False
    each = prompt.visual / prompt.images
    own = math.isqrt(int(each)) ** 2 if tokens is None else tokens
    return each not in (own, own + 1)


def tiles_of(view: View, row: int) -> list[Tile]:
    """All tiles of a prompt, picture by picture."""
    return [tile for picture in view.tower.pictures[row] for tile in picture]


@dataclass(frozen=True)
class Made:
    """Tokens made for a prompt: states [m, D], places of their centres [m], weights of what they are made of [m, T].

    Attributes:
        place: The token that they follow, -1: before the prompt; or one for each, [m].
    """

    states: Tensor
    centres: Tensor
    weights: Tensor
    place: int | Tensor = -1

    def after(self, place: int | Tensor) -> Made:
        """The same tokens, to follow `place`."""
        return replace(self, place=place)


def together(view: View, made: Sequence[Sequence[Made]]) -> Merged:
    """The tokens made for each prompt, in order, as one `Merged`."""
    import torch

    (batch, width, size), device = view.hidden.shape, view.index.device
    most = max(sum(len(part.centres) for part in parts) for parts in made)
    states = view.hidden.new_zeros(batch, most, size)
    centres, after = (torch.zeros(batch, most, dtype=torch.long, device=device) for _ in range(2))
    weights = torch.zeros(batch, most, width, device=device)
    for row, parts in enumerate(made):
        first = 0
        for part in parts:
            end = first + len(part.centres)
            if end > first:
                states[row, first:end] = part.states.to(states)
                centres[row, first:end], after[row, first:end] = part.centres, part.place
                weights[row, first:end] = part.weights
            first = end
    return Merged(states, centres, weights, after)
