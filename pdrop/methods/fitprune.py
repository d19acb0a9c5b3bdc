"""FitPrune: attention from the picture times attention from the question (arXiv 2409.10197, "Fit and Prune: Fast and
Training-free Visual Token Pruning for Multi-modal Large Language Models"; its code, ywh187/FitPrune at d28e418).

In the layer before the boundary, the maximum over heads of the attention: the mean that each visual token gets from the
visual tokens, times the sum that it gets from the text after the last picture. Tokens with the smallest product go. The
published code cuts inside that layer, after its attention; since the rest of a layer treats each token separately, that
equals a cut on the next layer's input. Nearly every layer is a boundary; a table says how many go at each, made by
fitting the attention that is removed (`pdrop.runs.calibration.fitprune`).

Where this differs from the published code:
- without text after the picture the prompt's query token is used; that code multiplies by zero;
- all pictures of a prompt are one set, and each prompt of a batch has its own; that code takes a batch of one, one
  picture;
- shares are of the original number, rounded to the nearest integer, so that count/576 of 576 gives the count again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdrop.methods.base import Method, View
from pdrop.methods.fitprune_tables import fitprune
from pdrop.schedule import Schedule, Stage
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FitPrune(Method):
    """Maximum over heads of the attention from the picture and from the question.

    Attributes:
        observe: -1: in the layer before the boundary, 0: in the layer at it.
    """

    observe: int = field(default=-1, kw_only=True)  # type: ignore[misc]

    def count(self, stage: Stage, visual: int) -> int:
        """The listed count; of a fraction, the nearest whole number."""
        return super().count(stage, visual) if stage.keep is None else round(visual * stage.keep)

    def score(self, view: View) -> Tensor:
        """Mean over the visual rows times the sum over the question's, [B, T]."""
        own, question = self.attention(view)
        if view.block is not None:
            return own * question * (view.block.query + 1 - view.block.stop)
        return own * question * (view.question() | view.query).sum(1, keepdim=True)

    def attention(self, view: View) -> tuple[Tensor, Tensor]:
        """Maximum over heads of the attention from picture and question, means over the rows, [B, T] each."""
        if (block := view.block) is not None:  # all rows in their order
            rows = view.attention_rows(view.valid, range(view.index.shape[1]))
            largest = rows.probabilities.amax(1)  # [B, T, T]
            return largest[:, block.start : block.stop].mean(1), largest[:, block.stop : block.query + 1].mean(1)
        words = view.question() | view.query
        asking = view.visual | words
        most = max(visual + text for visual, text in zip(view.visual_counts, view.text_counts))
        rows = view.attention_rows(asking, most)
        order = asking.int().argsort(dim=1, descending=True, stable=True)[:, : rows.asks.shape[1]]
        largest = rows.probabilities.amax(1)  # [B, Q, T]
        found = []
        for part in (view.visual, words & ~view.visual):
            weight = (part.gather(1, order) & rows.asks)[..., None]
            found.append((largest * weight).sum(1) / weight.sum(1).clamp(min=1))
        return found[0], found[1]

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """Rows of all tokens at every boundary."""
        reaching = [prompt.visual + prompt.text, *prompt.tokens_per_layer]
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        made = 0 if self.observe < 0 else keys
        macs = sum(
            n * sizes.hidden * made + n * (sizes.hidden + n) * queries for n in (reaching[k] for k in schedule.layers)
        )
        return SelectionCost(macs=macs if prompt.visual else 0.0)

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The published tables, interpolated."""
        return fitprune(num_layers, ratio, layers=layers)
