"""VisionZip: the tower's dominant tokens, and contextual tokens merged from the others (arXiv 2412.04467,
"VisionZip: Longer is Better but Not Necessary in Vision Language Models"; its code, JIA-Lab-research/VisionZip at
3151f6d).

Dominant tokens are the tower's class token, which goes through the projector and is placed before the picture, and the
patches that it attends to most in the tower's last layer but one. Of the others, targets are taken at even steps; each
of the rest joins the target with the most similar keys (that layer's, mean over heads). A contextual token is the
target's state plus the mean of those that joined it, projected: not a mean of all, and so twice the size of other
tokens, as in the published code. Text is not used.

The stage's number counts all of these. The paper's 192, 128 and 64 have contextual=30, 20 and 10; its "dominant"
includes the class token. In a tiled picture every tile has its share of both; the small picture comes first, in the
order above, then the other tiles' dominant tokens in the order of the joined picture, their class tokens, and their
contextual tokens.

Where this differs from the published code:
- attention in float32, computed for one row of one layer; that code computes all maps of all layers by patching CLIP;
- a number at or above the number of tokens keeps everything, and too many contextual tokens are cut down; that code
  raises;
- the newline at the end of a picture of one tile goes, as all newlines do.
Without a class token (SigLIP), attention is the mean over all rows, as the authors do for Qwen, and no token is placed
before the picture.

For Qwen2.5-VL the authors have separate code (Qwen2_5_VL/qwen2_5vl_visionzip.py at 769aa61): attention of the tower's
last layer, the mean over all rows and over a token's four patches, and keys with rotary positions, also averaged over
the patches; tokens are merged after the tower's merger, each contextual token is at its target's place, and positions
are kept (positions="original", the only ones that Qwen's models accept here). Its 70 and 50 % are 65 and 45 % dominant
tokens and 5 % contextual ones: contextual=0.05. This file does the same for such towers, also Qwen2-VL's and
Qwen3-VL's. That code takes one picture and one prompt; here each picture has its share by its size, and a frame of a
video is a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Merged, View
from pdrop.methods.in_front import InFront, Made, tiles_of, together
from pdrop.methods.tower import Tile
from pdrop.methods.transfer import on_device
from pdrop.schedule import Schedule, Stage
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VisionZip(InFront):
    """Dominant and contextual tokens.

    Attributes:
        contextual: How many of the stage's tokens are contextual; a fraction is of all tokens of a picture, at least
            one token.
    """

    contextual: int | float = 10
    tower_layers: ClassVar[tuple[int, ...] | None] = (-2,)
    merged_tower_layers: ClassVar[tuple[int, ...] | None] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        number, number_of = self.contextual, type(self.contextual)
        if not (number_of is int and number >= 0) and not (number_of is float and 0 < number < 1):
            raise ValueError(
                f"contextual is a number of tokens from 0 on, or a fraction between 0 and 1, not {number!r}"
            )

    # ------------------------------------------------------------------ how many

    def contextual_of(self, rows: float, total: float) -> int:
        """How many contextual tokens a tile of `rows` tokens has in a prompt with `total`."""
        if isinstance(self.contextual, float):
            return max(1, int(self.contextual * rows))
        return int(self.contextual * rows // total) if total else 0

    def parts_of(self, each: int, contextual: int, classes: int = 1) -> tuple[int, int, int]:
        """How a tile's `each` tokens divide into patches, class tokens and contextual tokens."""
        classes = min(classes, each)
        contextual = min(contextual, each - classes)
        return each - classes - contextual, classes, contextual

    def parts_in(self, view: View, row: int, tile: Tile, each: int) -> tuple[int, int, int]:
        """The same for one tile, within the tokens that it has."""
        total, each = sum(one.rows for one in tiles_of(view, row)), min(each, len(tile.places))
        return self.parts_of(each, self.contextual_of(tile.rows, total), view.tower.classes)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """The dominant patches of one picture."""
        each = self.count(stage, visual)
        return now if each >= visual else min(now, self.parts_of(each, self.contextual_of(visual, visual))[0])

    def merges(self, going: int) -> int:
        """The class token and the contextual tokens, if there is room for all of them."""
        return min(going, self.contextual_of(going, going) + 1) if going else 0

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """The stage's number, which counts all kinds of tokens."""
        return schedule.tokens_per_layer(visual, num_layers, self.count)

    def made(self, view: View, row: int, each: list[int]) -> tuple[int, int]:
        """The number of patches, and that of class and contextual tokens."""
        parts = [self.parts_in(view, row, tile, n) for tile, n in zip(tiles_of(view, row), each)]
        return sum(p for p, _, _ in parts), sum(c + m for _, c, m in parts)

    # ------------------------------------------------------------------ which

    def score(self, view: View) -> Tensor:
        """Sum over heads of the class token's attention, [B, T]; raised for the best of each of several tiles."""
        rows = view.tower.rows(self.attended(view))
        scores = view.tower.of(view.index, rows.sum(1))
        raised = scores.clone()
        for row, tile, places, each in self.chosen(view):
            patches = self.parts_in(view, row, tile, each)[0]
            best = scores[row, places].argsort(descending=True, stable=True)[:patches]
            raised[row, places[best]] += rows.shape[1]  # more than all heads' attention together
        return raised

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """Class token before each picture, contextual tokens after it (with a merger: at their own places)."""
        made: list[list[Made]] = [[] for _ in going]
        shares = {(row, tile.number): (places, each) for row, tile, places, each in self.chosen(view, 1)}
        for row, pictures in enumerate(view.tower.pictures):
            for picture in pictures:
                asked = [(tile, *shares[row, tile.number]) for tile in picture if (row, tile.number) in shares]
                found = [self.of_tile(view, row, goes, *one) for one in asked]
                if view.tower.merges > 1:
                    made[row] += [tails.after(tails.centres) for _, tails in found]
                elif found:
                    end = max(tile.places[-1] for tile in picture)
                    made[row] += [found[0][0].after(picture[0].places[0] - 1), found[0][1].after(picture[0].places[-1])]
                    made[row] += [heads.after(end) for heads, _ in found[1:]]
                    made[row] += [tails.after(end) for _, tails in found[1:]]
        return together(view, made)

    def of_tile(self, view: View, row: int, goes: Tensor, tile: Tile, places: Tensor, each: int) -> tuple[Made, Made]:
        """The class token and the contextual tokens of one tile."""
        import torch

        tower, width = view.tower, goes.shape[1]
        patches, classes, count = self.parts_in(view, row, tile, each)
        # in order of place; their number is known without waiting for the device
        rest = places[goes[row, places].int().argsort(descending=True, stable=True)[: len(places) - patches]]
        step = max(1, len(rest) // count) if count else len(rest) + 1
        numbers = list(range(0, len(rest), step))[:count]
        left = [n for n in range(len(rest)) if n not in set(numbers)]
        targets, others = rest[on_device(numbers, rest.device)], rest[on_device(left, rest.device)]
        rows = tower.at(view.index)[row]
        states, keys = tower.states.flatten(0, 1), tower.keys(self.attended(view)).mean(1).flatten(0, 1)
        keys = torch.nn.functional.normalize(keys.detach().float(), dim=-1)
        merged, weights = states[rows[targets]], torch.zeros(count, width, device=goes.device)
        if count and len(others):
            joined = (keys[rows[others]] @ keys[rows[targets]].T).argmax(1)
            share = torch.nn.functional.one_hot(joined, count).T.float()  # [contextual, others]
            share = share / share.sum(1, keepdim=True).clamp(min=1)
            merged = merged + (share @ states[rows[others]].float()).to(merged)
            weights[:, others] = share
        weights[torch.arange(count, device=targets.device), targets] = 1
        nothing = torch.zeros(classes, width, device=goes.device)
        head = Made(tower.project(tower.states[tile.number, :classes]), others[:classes], nothing)
        return head, Made(tower.project(merged), targets, weights)

    # ------------------------------------------------------------------ what it costs

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """A row of the tower; similarities and means of the other tokens; the projector for the made tokens."""
        asked = self.rows_of(schedule, prompt, sizes)
        tower = sizes.tower
        if not asked or min(prompt.visual_per_layer) >= prompt.visual:
            return SelectionCost(tower_rows=asked)
        frames, macs = [h * w / tower.merge**2 for h, w in tower.frames(prompt.visual, prompt.images)], 0.0
        total, width = sum(frames), tower.hidden if tower.merge == 1 else sizes.hidden
        for tokens, each in zip(frames, self.counts_of(schedule, prompt, frames)):
            contextual_of = self.contextual_of(tokens, total)
            patches, classes, contextual = self.parts_of(each, contextual_of, tower.class_tokens)
            others = min(tokens, prompt.visual * tokens / total) - patches - contextual
            macs += others * contextual * (tower.hidden / tower.heads + width)
            if tower.merge == 1:
                macs += (classes + contextual) * sum(inward * outward for inward, outward in tower.projector)
        return SelectionCost(tower_rows=asked, macs=macs)
