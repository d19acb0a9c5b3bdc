"""SCOPE: cover the picture with tokens that the class token attends to (arXiv 2510.24214, "SCOPE: Saliency-Coverage
Oriented Token Pruning for Efficient Multimodal LLMs"; its code, kinredon/SCOPE at 6bf7306).

Greedy choice: always the token that adds most coverage, times its attention to the power `alpha`. Each token is covered
by its largest cosine (of tower states) to a chosen token; negative cosines never count. Attention is the sum over heads
of the class token's row in the tower's last layer but one. Text is not used, nothing is merged, the class token is not
kept.

The number is for the whole prompt, and every picture or tile has the same share, rounded down, as in that code: 100 for
three tiles are 33 each.

Where this differs from the published code:
- cosines and gains in float32; in half precision that code's choices are decided by rounding at 192 tokens;
- a number at or above the number of tokens keeps everything; that code raises above it;
- no newline is kept, also if a picture has only one tile.
The release does not run as published (imports from a private folder, a script that names a baseline no branch knows).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pdrop.methods.base import View
from pdrop.methods.in_front import InFront
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor

Combined = Literal["multi", "add"]


@dataclass(frozen=True)
class SCOPE(InFront):
    """Coverage times attention.

    Attributes:
        alpha: The power of the attention; 0: coverage alone.
        combined: How they are combined: "multi" or "add", as that code calls it.
    """

    alpha: float = 1.0
    combined: Combined = "multi"
    tower_layers: ClassVar[tuple[int, ...] | None] = (-2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combined not in get_args(Combined):
            raise ValueError(f"combined is one of {', '.join(get_args(Combined))}, not {self.combined!r}")
        if self.alpha < 0:
            raise ValueError(f"alpha is a power from 0 on, not {self.alpha!r}")

    def score(self, view: View) -> Tensor:
        """For chosen tokens, how many of their tile's were still to choose at their turn; 0 for others. [B, T]."""
        import torch

        tower = view.tower
        attention, rows = tower.rows(-2).sum(1).flatten(), tower.at(view.index)
        states = tower.states.detach().flatten(0, 1)
        scores = torch.zeros(view.index.shape, device=view.index.device)
        for row, _, places, each in self.chosen(view, least=1):
            at = rows[row, places]
            turns = covering(states[at], attention[at], min(each, len(places)), self.alpha, self.combined)
            scores[row, places[turns]] = torch.arange(len(turns), 0, -1, device=scores.device, dtype=scores.dtype)
        return scores

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """One row of the tower; if any token goes, the cosines of all pairs of a tile's tokens."""
        asked = self.rows_of(schedule, prompt, sizes)
        if not asked or min(prompt.visual_per_layer) >= prompt.visual:
            return SelectionCost(tower_rows=asked)
        frames = sizes.tower.frames(prompt.visual, prompt.images)
        return SelectionCost(tower_rows=asked, macs=sum((h * w) ** 2 for h, w in frames) * sizes.tower.hidden)


def covering(states: Tensor, attention: Tensor, count: int, alpha: float = 1.0, combined: Combined = "multi") -> Tensor:
    """Which of states [N, d] are chosen, in order of choice, [count].

    Args:
        states: Before the projector.
        attention: [N].
        count: How many.
        alpha: As `SCOPE` has it.
        combined: As `SCOPE` has it.
    """
    import torch

    states = torch.nn.functional.normalize(states.float(), dim=-1)
    cosines, weight = states @ states.T, attention.float() ** alpha
    cover, left = torch.zeros_like(weight), torch.zeros_like(weight)  # left: minus infinity for tokens already chosen
    adds = torch.empty_like(cosines)  # reused in all rounds: a new [N, N] in each takes four times as long
    turns: list[Tensor] = []
    for _ in range(count):
        gain = torch.sub(cosines, cover, out=adds).clamp_(min=0).sum(1)
        gain = torch.addcmul(left, gain, weight) if combined == "multi" else gain + weight + left
        best = gain.argmax(0, keepdim=True)  # [1]: reading a number would wait for the device
        turns.append(best)
        left.index_fill_(0, best, -torch.inf)
        cover = torch.maximum(cover, cosines.index_select(0, best)[0])
    return torch.cat(turns) if turns else torch.zeros(0, dtype=torch.long, device=states.device)
