"""DivPrune: keep the tokens that are least alike (arXiv 2503.02175, "DivPrune: Diversity-based Visual Token Pruning for
Large Multimodal Models", section 3.2; its code, vbdi/divprune at 799e2d9).

The max-min diversity problem, solved greedily: first the token whose nearest neighbour is farthest, then always the
token whose nearest chosen token is farthest, by cosines of the language model's input. Of equal distances the earlier
token.

Where this differs from the published code:
- all visual tokens of a prompt are ranked together, across pictures; that code prunes the first picture only;
- each prompt of a batch is ranked by its own tokens; that code cuts the first prompt's places out of all;
- cosines in float32, that code's in the model's dtype;
- nothing at keep 0, everything at keep 1; a prompt of one token is not an error.
As there, newlines of tiled pictures are tokens like others. They are all alike, so one of them stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pdrop.methods.base import Method, Positions, View
from pdrop.schedule import Schedule, Stage, single
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DivPrune(Method):
    """Diversity alone: no attention, no text. Keeps round(n * keep) tokens, halves to even (32.5 of 64 -> 32)."""

    positions: Positions = field(default="compact", kw_only=True)
    ranks_by_attention: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = True

    def count(self, stage: Stage, visual: int) -> int:
        """round(n * keep), as the published code has it (0.098 of 576 -> 56)."""
        return super().count(stage, visual) if stage.keep is None else round(visual * stage.keep)

    def score(self, view: View) -> Tensor:
        """For chosen tokens, how many were still to choose at their turn; 0 for others. [B, T]."""
        import torch

        assert view.stays is not None
        scores = torch.zeros(view.index.shape, device=view.hidden.device)
        for row, (stays, pinned, now) in enumerate(zip(view.stays, view.pinned, view.visual_counts)):
            at = view.visual_places(row)
            chosen = diverse(view.hidden[row, at].detach(), min(stays, now) - pinned if stays < now else 0)
            scores[row, at[chosen]] = torch.arange(len(chosen), 0, -1, device=scores.device, dtype=scores.dtype)
        return scores

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Cosines of all pairs, if any token goes."""
        return prompt.visual**2 * sizes.hidden if min(prompt.visual_per_layer) < prompt.visual else 0.0

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """One cut before the decoder."""
        return single(0, ratio, num_layers, layers)


def diverse(states: Tensor, count: int) -> Tensor:
    """The `count` least alike of states [N, D], in the order in which they are chosen."""
    import torch

    states = torch.nn.functional.normalize(states.float(), dim=-1)
    if count < 1:
        return states.new_zeros(0, dtype=torch.long)
    apart = 1 - states @ states.T
    # the nearest of each is itself, to rounding; the second nearest is another token
    nearest = apart.topk(min(2, len(apart)), 0, largest=False).values[-1]
    turns = [nearest.argmax(0, keepdim=True)]  # [1]: reading a number would wait for the device
    apart.fill_diagonal_(-torch.inf)  # a chosen token is never the farthest again
    nearest = apart.index_select(0, turns[0])[0]
    for _ in range(count - 1):
        turns.append(nearest.argmax(0, keepdim=True))
        nearest = torch.minimum(nearest, apart.index_select(0, turns[-1])[0])
    return torch.cat(turns)
