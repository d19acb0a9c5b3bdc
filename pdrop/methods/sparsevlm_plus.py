"""SparseVLM+: SparseVLM without recycling, by the heads that attend to the image most (the third algorithm released
under the name of arXiv 2410.04417: the published code's version 2.0; no paper describes it).

Raters, boundaries and counts are SparseVLM's (pdrop/methods/sparsevlm.py), and so are the differences listed there.
Three things differ: attention is divided by what the rotary positions alone would give, with queries and keys of ones;
only the heads with the largest sum of that over raters and visual tokens count; positions are kept. The divisor passes
through zero and becomes negative as the distance between two tokens grows. The published code allows that, and so does
this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdrop.methods.base import Positions, View
from pdrop.methods.sparsevlm import SparseVLM, most_raters, raters_of
from pdrop.methods.sparsevlm_schedules import sparsevlm
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM+. Keeps the listed count, or one token less than there are; merges nothing.

    Attributes:
        heads: How many heads vote; the published code has 14 of 32. All of them where a layer has fewer.
    """

    recycle: float = 0.0
    heads: int = 14
    positions: Positions = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ValueError(f"heads is a number from 1 on, not {self.heads!r}")

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """Its own list for budget 192, scaled."""
        return sparsevlm(num_layers, ratio, layers=layers, plus=True)

    def score(self, view: View) -> Tensor:
        """Mean over voting heads and raters of the attention divided by the rotary positions' part, [B, T]."""
        rows = view.attention_rows(raters_of(view), most_raters(view))
        weight = rows.asks[..., None].float()  # [B, Q, 1]
        share = (rows.probabilities / rows.rotation()[:, None]).masked_fill(~rows.asks[:, None, :, None], 0)
        got = share.sum(2) / weight.sum(1, keepdim=True).clamp(min=1)[:, :, 0, None]  # [B, heads, T], mean over raters
        seen = got.masked_fill(~view.visual[:, None], 0).sum(-1)  # [B, heads]
        voting = seen.topk(min(self.heads, seen.shape[1])).indices
        return got.gather(1, voting[..., None].expand(-1, -1, got.shape[2])).mean(1)

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """SparseVLM's multiply-adds, and the products of ones at every boundary."""
        seen = sum(prompt.tokens_per_layer[layer - 1] for layer in schedule.layers)
        ones = seen * self.query_rows(prompt.text) * sizes.head_dim
        return super().extra_macs(schedule, prompt, sizes) + ones
