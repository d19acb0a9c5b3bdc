"""SparseVLM: rank by the text that looks most like the image, recycle the best of what goes (arXiv 2410.04417).

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", sections 3.2 to 3.4. Three
algorithms were released under the name. This is v1.5, the published code's default: fixed lists of counts, recycling,
renumbered positions, cut on the OUTPUT of layers 2, 6 and 15, which are the boundaries 3, 7 and 16. (The paper's
rank-adaptive counts are v1, pdrop/methods/sparsevlm_v1.py; pdrop/methods/sparsevlm_plus.py is the third.)

Where the published code and its paper differ, the code is done: a rater lies strictly above the mean, 30 % + 1 of what
goes is recycled into a tenth of that + 1 tokens, clusters are by Euclidean distance and averaged.

Where this differs from the published code:
- raters, ranking and clustering are computed in float32, that code's in the model's dtype, where scores tie often;
- equal densities are broken by rank (the better-ranked token counts as denser), that code adds random noise;
- densities are compared as logarithms, which do not underflow where tokens are far apart;
- raters are text after the prompt's LAST visual token, up to the last query token; without any, the query token asks.
  That code knows one image, and text after it;
- a stage of keep = 1.0 drops nothing, as in every method here; a count that large drops one token, as in that code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdrop.methods.base import Merged, Method, Positions, View
from pdrop.methods.sparsevlm_schedules import sparsevlm
from pdrop.methods.transfer import on_device
from pdrop.schedule import Schedule, Stage
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseVLM(Method):
    """SparseVLM v1.5. Keeps the listed count, or one token less than there are; fractions are rounded.

    Attributes:
        recycle: Share of what goes that is merged, the paper's tau; 0: nothing is.
        tokens_per_cluster: One merged token for so many recycled ones, the inverse of the paper's theta.
    """

    recycle: float = 0.3
    tokens_per_cluster: int = 10
    positions: Positions = field(default="compact", kw_only=True)
    observe: int = field(default=-1, kw_only=True)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recycle <= 1:
            raise ValueError(f"recycle is a share between 0 and 1, not {self.recycle!r}")
        if self.tokens_per_cluster < 1:
            raise ValueError(f"tokens_per_cluster is a number from 1 on, not {self.tokens_per_cluster!r}")

    # ------------------------------------------------------------------ how many

    def count(self, stage: Stage, visual: int) -> int:
        """The listed count; of a fraction, the nearest whole number: 300/576 of 576 is 300 again."""
        return super().count(stage, visual) if stage.keep is None else round(visual * stage.keep)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """min(count, now - 1): at least one token goes at every boundary, unless all of them are to stay."""
        return now if stage.keep == 1 or not now else min(self.count(stage, visual), now - 1)

    def recycled(self, going: int) -> int:
        """How many of `going` tokens are merged: int(0.3 going) + 1."""
        return min(going, int(self.recycle * going) + 1) if self.recycle and going else 0

    def merges(self, going: int) -> int:
        """How many tokens are made of them: recycled // 10 + 1."""
        recycled = self.recycled(going)
        return min(recycled, recycled // self.tokens_per_cluster + 1) if recycled else 0

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The published list of 192, scaled."""
        return sparsevlm(num_layers, ratio, layers=layers)

    # ------------------------------------------------------------------ which

    def begin(self, view: View) -> Tensor:
        """The raters, [B, L] bool: text whose mean likeness to the visual tokens is above the text's mean.

        Likeness: softmax over the text of the embeddings' dot products, without scaling (section 3.2).
        """
        import torch

        visual, text = view.visual, view.question()
        images = visual.int().argsort(dim=1, descending=True, stable=True)[:, : max(view.visual_counts)]
        words = text.int().argsort(dim=1, descending=True, stable=True)[:, : max(view.text_counts)]
        hidden, row = view.hidden.detach().float(), torch.arange(len(visual), device=visual.device)[:, None]
        products = hidden[row, images] @ hidden[row, words].transpose(1, 2)  # [B, visual, text]
        lowest = torch.finfo(products.dtype).min
        likeness = products.masked_fill(~text[row, words][:, None], lowest).softmax(-1)
        likeness = (likeness * visual[row, images][..., None]).sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
        mean = (likeness * text[row, words]).sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
        raters = torch.zeros_like(text).scatter_(1, words, (likeness > mean) & text[row, words])
        return torch.where(raters.any(1, keepdim=True), raters, last_of(view.query))

    def score(self, view: View) -> Tensor:
        """Mean over heads and raters of the attention probabilities, [B, T]."""
        return view.attention(raters_of(view), most_raters(view))

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """The best of what goes, clustered by density peaks and averaged (section 3.4)."""
        import torch

        most = max(self.merges(n) for n in going)
        batch, width, size = view.hidden.shape
        order = scores.masked_fill(~goes, float("-inf")).argsort(dim=1, descending=True, stable=True)
        states = view.hidden.new_zeros(batch, most, size, dtype=torch.float32)
        weights = view.hidden.new_zeros(batch, most, width, dtype=torch.float32)
        centres = order[:, :most].clone()
        for number in sorted(set(going) - {0}):  # prompts that lose equally many are clustered together
            rows = [row for row, n in enumerate(going) if n == number]
            chosen = on_device(rows, order.device)
            at = order[chosen, : self.recycled(number)]  # [R, recycled], best first
            members = view.hidden[chosen[:, None], at].float()
            centre, group = density_peaks(members.detach(), self.merges(number), self.tie_break(at))
            share = (group[:, None] == torch.arange(centre.shape[1], device=at.device)[:, None]).float()
            share = share / share.sum(-1, keepdim=True)  # [R, clusters, recycled]
            states[chosen, : centre.shape[1]] = share @ members
            centres[chosen, : centre.shape[1]] = at.gather(1, centre)
            part = torch.zeros(len(rows), centre.shape[1], width, device=at.device)
            weights[chosen, : centre.shape[1]] = part.scatter_(2, at[:, None].expand_as(share), share)
        return Merged(states, centres, weights)

    def tie_break(self, recycled: Tensor) -> Tensor:
        """Decides between equally dense tokens, higher = denser, [R, m]; two nearest neighbours are often just that.

        The better-ranked one. (The published code chooses at random.)
        """
        return -recycled.new_ones(recycled.shape).cumsum(1)

    # ------------------------------------------------------------------ what it costs

    def query_rows(self, text_tokens: float) -> float:
        """A row for each text token: how many of them are raters is known to the device alone, and is not asked."""
        return max(text_tokens, 1)

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Likeness of text and image; distances and means of what is recycled."""
        entering = [round(n) for n in (prompt.visual, *prompt.visual_per_layer)]
        macs = prompt.visual * prompt.text * sizes.hidden
        for stage in schedule:
            now, after = entering[stage.layer : stage.layer + 2]
            going = self.gone(now, after) if stage.adaptive else now - self.stays(stage, entering[0], now)
            recycled = self.recycled(going)
            macs += (recycled * recycled + self.merges(going) * recycled) * sizes.hidden
        return macs

    def gone(self, before: int, after: int) -> int:
        """How many of `before` tokens went, where `after` are left of them, merged ones included (or one more)."""
        return next((n for n in range(1, before + 1) if before - n + self.merges(n) == after), 0)


def last_of(mask: Tensor) -> Tensor:
    """Only the last of the tokens in each row of `mask`, [B, T] bool."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def raters_of(view: View) -> Tensor:
    """The raters among the tokens alive, [B, T] bool. A merged token is not one, even in a rater's place."""
    raters: Tensor = view.begun.to(view.index.device).gather(1, view.index)
    return raters & view.valid & ~view.visual


def most_raters(view: View) -> int:
    """A bound on a prompt's raters that is known without asking the device: its text tokens."""
    return max(1, *view.text_counts)


def density_peaks(x: Tensor, clusters: int, tie_break: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks over the nearest neighbours (DPC-kNN, with as many neighbours as clusters).

    Args:
        x: [R, m, D] float32.
        clusters: How many.
        tie_break: Of two equally dense tokens, the one with the higher number counts as denser, [R, m].

    Returns:
        Centres, [R, clusters] in 0..m-1; and the cluster of each token, [R, m].
    """
    import torch

    x = x - x.mean(1, keepdim=True)  # distances stay; squares get smaller, and with them the rounding below
    squares = x.square().sum(-1)
    products = x @ x.transpose(1, 2)
    products = products + products.transpose(1, 2)  # symmetric to the bit: equal distances must tie
    distances = (squares[:, :, None] + squares[:, None] - products).clamp(min=0).sqrt()
    distances = distances.diagonal_scatter(torch.zeros_like(squares), dim1=1, dim2=2) / x.shape[-1] ** 0.5
    density = -distances.topk(clusters, largest=False).values.square().mean(-1)  # logarithm; the token itself counts
    equal = (density[:, None] == density[:, :, None]) & (tie_break[:, None] > tie_break[:, :, None])
    denser = (density[:, None] > density[:, :, None]) | equal  # [R, i, j]: j is denser than i
    gap = torch.where(denser, distances, distances.amax((1, 2), keepdim=True)).amin(-1)
    centre = (density + gap.log()).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    group = distances.gather(1, centre[..., None].expand(-1, -1, x.shape[1])).argmin(1)
    own = torch.arange(clusters, device=x.device).expand_as(centre)
    return centre, group.scatter(1, centre, own)
