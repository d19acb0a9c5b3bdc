"""PruMerge and PruMerge+: outliers of the class token's attention, with similar tokens merged in (arXiv 2403.15388,
"LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"; its code, 42Shawn/LLaVA-PruMerge at
097c041).

"Attention" is the class token's query against all keys of the tower's LAST layer, whose output LLaVA does not read,
with all heads as one vector, over the square root of its width. The tokens with the most attention are chosen. Each is
given, before the projector, the sum of its `neighbours` most similar tokens (by cosine of keys, chosen ones included),
weighted by their attention: this adds little, since the weights are of the order of 1 / tokens. One extra token is the
attention-weighted sum of all that were not chosen. The tokens are in order of attention, the extra one last, and
positions are renumbered.

How many: at adaptive stages, as published, the outliers of the attention, those above the third quartile by 1.5
interquartile ranges; a schedule's number counts all tokens that stay, the extra one included (73 for the training's 72
= 576 / 8). PruMerge+ adds tokens in even steps: at adaptive stages every int(int(1 / share of outliers) / 3)-th,
otherwise as many as are chosen by attention. The published scores are of checkpoints fine-tuned with it.

Where this differs from the published code:
- PruMerge+ without outliers leaves the one extra token, as PruMerge does; that code divides by zero;
- if more than a third are outliers, PruMerge+ keeps every token; that code has a step of zero;
- each picture and tile has its own threshold; that code has one for all pictures of a call, and PruMerge+ raises on
  two;
- no token appears twice: in that code's training a step may fall on a token already chosen by attention, and as many
others are lost from the rest. As in that code, the steps never reach a picture's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Merged, Ranking, View
from pdrop.methods.in_front import InFront, Made, tiles_of, together
from pdrop.methods.tower import Tile
from pdrop.methods.transfer import on_device, read_back
from pdrop.schedule import Schedule, Stage, single
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PruMerge(InFront):
    """Outliers of the class token's attention, with similar tokens merged in. Every token that is left is a made one.

    Attributes:
        plus: PruMerge+: tokens in even steps in addition.
        neighbours: How many similar tokens are added to each.
    """

    plus: bool = False
    neighbours: int = 32
    tower_layers: ClassVar[tuple[int, ...] | None] = (-1,)
    class_token: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise ValueError(f"neighbours is a number of tokens from 0 on, not {self.neighbours!r}")

    # ------------------------------------------------------------------ how many

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """0 unless all stay: every other token that is left is a made one."""
        return now if self.count(stage, visual) >= visual else 0

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        return schedule.tokens_per_layer(visual, num_layers, self.count)

    def made(self, view: View, row: int, each: list[int]) -> tuple[int, int]:
        return 0, sum(each)

    # ------------------------------------------------------------------ which

    def score(self, view: View) -> Tensor | Ranking:
        """The class token's attention with all heads as one, [B, T]; at adaptive stages with how many are made."""
        import torch

        scores = view.tower.of(view.index, self.attention(view).detach())
        if view.stage is None or not view.stage.adaptive:
            return scores
        (read,) = read_back([scores])
        makes = [
            sum(len(self.taken(read, row, tile, None)) + 1 for tile in tiles_of(view, row))
            for row in range(len(view.originals))
        ]
        makes = [min(made, now) for made, now in zip(makes, view.visual_counts)]
        count = torch.tensor(makes)
        return Ranking(scores, torch.zeros_like(count), count)

    def attention(self, view: View) -> Tensor:
        """[P, R] float32, softmax over all rows of a tile."""
        import torch

        query, keys = view.tower.query(-1).float(), view.tower.keys(-1).float()  # [P, heads, size], [P, heads, R, size]
        width = query.shape[1] * query.shape[2]
        products = torch.einsum("phrs,phs->pr", keys, query)
        found: Tensor = (products / width**0.5).softmax(-1)
        return found

    def taken(self, scores: Tensor, row: int, tile: Tile, count: int | None) -> list[int]:
        """Places of a tile's chosen tokens, in their order.

        Args:
            scores: [B, T], on the host.
            row: The prompt.
            tile: The tile.
            count: How many; None: the outliers, and for PruMerge+ the steps that follow from their share.
        """
        import torch

        own = scores[row, list(tile.places)]
        ranked = own.argsort(descending=True, stable=True).tolist()
        total = len(ranked)
        if count is None:
            low, high = torch.quantile(own, torch.tensor([0.25, 0.75])).tolist()
            outliers = int((own > high + 1.5 * (high - low)).sum())
            step = max(1, int(int(1 / (outliers / total)) / 3)) if outliers else 0
            chosen, spaced = ranked[:outliers], range(0, total - 1, step) if self.plus and step else range(0)
        else:
            half = (count + 1) // 2 if self.plus else count
            chosen, more = ranked[:half], count - half
            others = sorted(set(range(total - 1)) - set(chosen))
            spaced = [others[n * len(others) // more] for n in range(more)] if others else []  # type: ignore[assignment]
        found = [*chosen, *(place for place in spaced if place not in set(chosen))]
        return [tile.places[n] for n in found]

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """The chosen tokens with similar ones merged in, and one token of all others."""
        import torch

        assert view.stage is not None
        keys = view.tower.keys(-1).detach().float().transpose(1, 2).flatten(2)  # [P, R, d]
        keys = torch.nn.functional.normalize(keys, dim=-1).flatten(0, 1)
        rows, states = view.tower.at(view.index), view.tower.states.flatten(0, 1)
        attention = view.tower.of(view.index, self.attention(view))  # the scores once more, with their gradient
        made: list[list[Made]] = [[] for _ in going]
        (read,) = read_back([scores])
        for row, original in enumerate(view.originals):
            tiles = tiles_of(view, row)
            sizes = [tile.rows for tile in tiles]
            shares = None if view.stage.adaptive else self.divided(view.stage, original, sizes)
            if not going[row] or (shares is not None and not any(shares)):
                continue
            for number, tile in enumerate(tiles):
                each = None if shares is None else min(shares[number], len(tile.places)) - 1
                taken = self.taken(read, row, tile, each)
                chosen, places = on_device(taken, goes.device), on_device(tile.places, goes.device)
                weights = self.weights(attention[row], keys[rows[row]], places, chosen)
                state = weights[:, places] @ states[rows[row, places]].float()
                rest = next((n for n in tile.places if n not in set(taken)), tile.places[-1])
                centres = torch.cat([chosen, on_device([rest], goes.device)])
                front = tile_front(view, row, tile)
                made[row].append(Made(view.tower.project(state.to(states)), centres, weights.detach(), front))
        return together(view, made)

    def weights(self, attention: Tensor, keys: Tensor, places: Tensor, chosen: Tensor) -> Tensor:
        """Weights of what each chosen token, and the extra one, is made of, [chosen + 1, T].

        Args:
            attention: [T].
            keys: Keys of unit length, [T, d].
            places: Places of the tile's tokens.
            chosen: Places of the chosen tokens.
        """
        import torch

        weights = torch.zeros(len(chosen) + 1, len(attention), device=attention.device)
        weights[-1, places] = attention[places]
        weights[-1, chosen] = 0
        if len(chosen):
            alike = keys[chosen] @ keys[places].T
            alike = alike.masked_fill(chosen[:, None] == places, -torch.inf)
            near = places[
                alike.argsort(dim=1, descending=True, stable=True)[:, : min(self.neighbours, len(places) - 1)]
            ]
            weights[torch.arange(len(chosen), device=chosen.device)[:, None], near] = attention[near]
            weights[torch.arange(len(chosen), device=chosen.device), chosen] = 1
        return weights

    # ------------------------------------------------------------------ what it costs

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """A row of the last layer; cosines to the chosen tokens, sums, and the projector for the made tokens."""
        tower = sizes.tower
        if not schedule or not prompt.visual:
            return SelectionCost()
        frames, left = tower.frames(prompt.visual, prompt.images), min(prompt.visual_per_layer)
        macs = 0.0
        for height, width in frames:
            patches, made = height * width, left / len(frames)
            macs += (patches + tower.class_tokens + 1) * tower.hidden**2 + (patches + tower.class_tokens) * tower.hidden
            if 0 < left < prompt.visual:
                macs += (patches + tower.class_tokens) * tower.hidden + (2 * made - 1) * patches * tower.hidden
                macs += made * sum(inward * outward for inward, outward in tower.projector)
        return SelectionCost(macs=macs)


def tile_front(view: View, row: int, tile: Tile) -> int:
    """The place before the picture that a tile belongs to."""
    picture = next(picture for picture in view.tower.pictures[row] if tile in picture)
    return min(one.places[0] for one in picture if one.places) - 1


def prumerge(
    num_layers: int, ratio: float = 0.125, layers: Sequence[int] | None = None, adaptive: bool = False
) -> Schedule:
    """One cut before the decoder.

    Args:
        num_layers: Layers of the decoder.
        ratio: Share of the tokens that is left, the extra one included.
        layers: [0], as the command line spells it.
        adaptive: The number of outliers instead, as published: `ratio` is ignored.

    Raises:
        ValueError: If the ratio is no fraction, or there is not exactly one boundary.
    """
    found = single(0, ratio, num_layers, layers)
    return Schedule(tuple(Stage(stage.layer, adaptive=True) for stage in found)) if adaptive else found
