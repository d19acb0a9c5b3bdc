"""HoloV: the class token's attention, with a budget for each strip of the picture (arXiv 2510.02912, "Don't Just Chase
Highlighted Tokens: Revisiting Visual Holistic Context Retention"; its code, obananas/HoloV at 1d2e65e).

A picture's tokens, in order, are cut into `crops` runs ("spatial crops", but 36 of 576 are one and a half rows of 24).
Each run is given a share of the budget by its mean attention (mean over heads of the class token's row, last tower
layer but one), in whole numbers; the remainder goes to the largest shares, one token each. In a run the tokens with the
most attention stay, the most attended FIRST; a run that stays whole keeps its order. Positions are renumbered in that
order.

The paper chooses inside a crop by attention and a diversity term. In the published code that term is rescaled to the
attention's own mean and averaged away: other features choose the same tokens. So features are not read here.

overflow="zeros" is the published code: a run given more than it has keeps all its tokens, and the surplus becomes ZERO
VECTORS after the picture's last token, which the language model then reads; never at 64 of 576, often at 288.
"redistribute" gives the surplus to the runs with room, by their share, one each per round, as the paper says and as
RESTORE (cvlab-yonsei/RESTORE at 9b27e68) re-ran it. The paper's crops for 64, 128 and 192 tokens are 16, 8 and 5; the
code has 16.

Where this differs from the published code:
- with several pictures each has its share and its own crops; that code raises;
- a budget at or above the number of tokens keeps everything in order; newlines go.

For Qwen2.5-VL the code takes the tower's last layer, the mean over all rows, and for a token the mean over its four
patches; its crops are max(1, int(1024 / 576 * tokens / number that stays)): 5, 8 and 16 at 33.3, 22.2 and 11.1 %, to be
set as `crops` here. That code leaves the attention in the order of the tower's windows although the tokens are back in
the picture's order, so it ranks tokens by others' attention (at 640 x 480, only 51 of 391 by their own), and its
picture begins one token early, at the vision mark. Here each token has its own attention, and marks stay. That code
keeps the positions of the tokens that stay, here positions="original"; a vector of zeros has the position of a token
that went, in that code the picture's last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pdrop.methods.base import Merged, View
from pdrop.methods.in_front import InFront, Made, pictures_in, together
from pdrop.methods.tower import Tile
from pdrop.methods.transfer import on_device, read_back
from pdrop.schedule import Schedule, Stage
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Overflow = Literal["zeros", "redistribute"]
ZERO = -1
FLAT = 1.09  # what the diversity term makes of a run's mean attention: 1 + alpha, alpha 0.09


@dataclass(frozen=True)
class HoloV(InFront):
    """Attention of the tower's class token, run by run. All tokens that stay count as made, since their order changes.

    Attributes:
        crops: Runs that a picture is cut into.
        overflow: What happens to a run's surplus: "zeros" or "redistribute".
    """

    crops: int = 16
    overflow: Overflow = "zeros"
    tower_layers: ClassVar[tuple[int, ...] | None] = (-2,)
    merged_tower_layers: ClassVar[tuple[int, ...] | None] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.crops, bool) or not isinstance(self.crops, int) or self.crops < 1:
            raise ValueError(f"crops is a number of runs from 1 on, not {self.crops!r}")
        if self.overflow not in get_args(Overflow):
            raise ValueError(f"overflow is one of {', '.join(get_args(Overflow))}, not {self.overflow!r}")

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """0 unless all stay: every other token that stays is a made one."""
        return now if self.count(stage, visual) >= visual else 0

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        return schedule.tokens_per_layer(visual, num_layers, self.count)

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """All tokens that a prompt ends with are made, unless nothing goes."""
        found = []
        for row, original in enumerate(visual):
            pictures = list(self.pictures(view, row))
            found.append((0, sum(min(each, size_of(p)) for p, each in pictures)) if pictures else (original, 0))
        return found

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """Each picture's share: its tiles have one budget."""
        return self.by_shares(schedule, prompt, num_layers, pictures_in(prompt))

    def score(self, view: View) -> Tensor:
        """Mean over heads of the class token's attention, [B, T]."""
        return view.tower.of(view.index, view.tower.rows(self.attended(view)).mean(1))

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """The tokens that stay, in their new order, and zero vectors."""
        import torch

        made: list[list[Made]] = [[] for _ in going]
        (read,) = read_back([scores])
        for row in range(len(going)):
            for picture, each in self.pictures(view, row):
                places = sorted(place for tile in picture for place in tile.places)
                count = min(each, len(places))
                order = arranged(read[row, places], self.crops, count, self.overflow)
                kept = on_device([places[n] for n in order if n != ZERO], goes.device)
                spare = [place for n, place in enumerate(places) if n not in set(order)][: count - len(kept)]
                states = torch.cat([view.hidden[row, kept], view.hidden.new_zeros(len(spare), view.hidden.shape[2])])
                centres = torch.cat([kept, on_device(spare, goes.device)])
                weights = torch.zeros(count, goes.shape[1], device=goes.device)
                weights[torch.arange(len(kept), device=goes.device), kept] = 1
                made[row].append(Made(states, centres, weights, picture[0].places[0] - 1))
        return replace(together(view, made), moved=True)

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """One row of one layer of the tower."""
        return SelectionCost(tower_rows=self.rows_of(schedule, prompt, sizes))


def size_of(picture: Sequence[Tile]) -> int:
    """Tokens of a picture."""
    return sum(len(tile.places) for tile in picture)


def arranged(attention: Tensor, crops: int, count: int, overflow: Overflow) -> list[int]:
    """Which of a picture's tokens stay, in their new order; ZERO means a vector of zeros.

    Args:
        attention: [N] float32.
        crops: Runs that the picture is cut into.
        count: How many stay, at most N.
        overflow: As `HoloV.overflow`.
    """
    import torch

    short, longer = divmod(len(attention), crops)
    runs = [run for run in attention.split([short + (number < longer) for number in range(crops)]) if len(run)]
    mass = torch.stack([run.mean() * 1000 * FLAT if len(run) > 1 else run.mean() for run in runs])
    shares = mass / (mass.sum() + 1e-6)
    given = (shares * count).floor().long()
    ranked = shares.argsort(descending=True, stable=True)
    given[ranked[: count - int(given.sum())]] += 1
    sizes = torch.tensor([len(run) for run in runs])
    while overflow == "redistribute" and bool((given > sizes).any() | (given.sum() < count)):
        given = torch.minimum(given, sizes)
        room = [n for n in ranked.tolist() if given[n] < sizes[n]]
        given[room[: count - int(given.sum())]] += 1
    order, first = [], 0
    for run, number in zip(runs, given.tolist()):
        best = range(len(run)) if number >= len(run) else run.argsort(descending=True, stable=True)[:number].tolist()
        order += [first + place for place in best]
        first += len(run)
    return (order + [ZERO] * count)[:count]
