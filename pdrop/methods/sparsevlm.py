"""SparseVLM: rank by the text most similar to the image, recycle the best of the dropped tokens (arXiv 2410.04417).

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", sections 3.2 to 3.4. Three
algorithms were released under this name. This is v1.5, the published code's default: fixed lists of counts, recycling,
renumbered positions, cut on the OUTPUT of layers 2, 6 and 15, which are the boundaries 3, 7 and 16. (The paper's
rank-adaptive counts are v1, pdrop/methods/sparsevlm_v1.py; pdrop/methods/sparsevlm_plus.py is the third.)

Where the published code and its paper differ, this follows the code: a rater is strictly above the mean, 30 % + 1 of
the dropped tokens are recycled into a tenth of that + 1 tokens, clusters are by Euclidean distance and averaged.

Where this differs from the published code:
- raters, ranking and clustering are computed in float32; that code uses the model's dtype, where scores tie often;
- ties of density are broken by rank (the better-ranked token counts as denser); that code adds random noise;
- densities are compared as logarithms, which do not underflow when tokens are far apart;
- raters are text after the prompt's LAST visual token, up to the last query token; without raters the query token is
  used. That code knows one image, and text after it;
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
        recycle: Share of the dropped tokens that is merged, the paper's tau; 0: none.
        tokens_per_cluster: One merged token for this many recycled ones, the inverse of the paper's theta.
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
        """How many tokens are made of the recycled ones: recycled // 10 + 1."""
        recycled = self.recycled(going)
        return min(recycled, recycled // self.tokens_per_cluster + 1) if recycled else 0

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The published list for budget 192, scaled."""
        return sparsevlm(num_layers, ratio, layers=layers)

    # ------------------------------------------------------------------ which

    def begin(self, view: View) -> Tensor:
        """The raters, [B, L] bool: text tokens whose mean similarity to the visual tokens is above the text's mean.

        Similarity: softmax over the text of the embeddings' dot products, without scaling (section 3.2).
        """
        import torch

        hidden, block = view.hidden.detach().float(), view.block
        if block is not None:
            window = text_window(view)
            products = hidden[:, block.start : block.stop] @ hidden[:, window.start :].transpose(1, 2)
            asked = products[..., block.stop - window.start : block.query + 1 - window.start]  # [B, visual, question]
            likeness = asked.softmax(-1).mean(1)
            raters = likeness > likeness.mean(1, keepdim=True)
            raters[:, -1:].logical_or_(~raters.any(1, keepdim=True))
            return torch.nn.functional.pad(raters, (block.stop, view.index.shape[1] - 1 - block.query))
        visual, text = view.visual, view.question()
        images = visual.int().argsort(dim=1, descending=True, stable=True)[:, : max(view.visual_counts)]
        words = text.int().argsort(dim=1, descending=True, stable=True)[:, : max(view.text_counts)]
        row, there = torch.arange(len(visual), device=visual.device)[:, None], text.gather(1, words)
        products = hidden[row, images] @ hidden[row, words].transpose(1, 2)  # [B, visual, text]
        lowest = torch.finfo(products.dtype).min
        likeness = products.masked_fill(~there[:, None], lowest).softmax(-1)
        likeness = (likeness * visual.gather(1, images)[..., None]).sum(1) / visual.sum(1, keepdim=True).clamp(min=1)
        mean = (likeness * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        raters = torch.zeros_like(text).scatter_(1, words, (likeness > mean) & there)
        return torch.where(raters.any(1, keepdim=True), raters, last_of(view.query))

    def score(self, view: View) -> Tensor:
        """Mean over heads and raters of the attention probabilities, [B, T]."""
        return view.attention(raters_of(view), most_raters(view))

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """The best of the dropped tokens, clustered by density peaks and averaged (section 3.4)."""
        import torch

        ranked = torch.where(goes, scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
        if min(going) == max(going):  # the usual case: all are clustered together
            return Merged(*self.clustered(view.hidden, ranked, going[0]))
        most = max(self.merges(n) for n in going)
        batch, width, size = view.hidden.shape
        states = view.hidden.new_zeros(batch, most, size, dtype=torch.float32)
        weights = view.hidden.new_zeros(batch, most, width, dtype=torch.float32)
        centres = ranked[:, :most].clone()
        for number in sorted(set(going) - {0}):  # prompts that lose equally many are clustered together
            chosen = on_device([row for row, n in enumerate(going) if n == number], ranked.device)
            made, of, parts = self.clustered(view.hidden[chosen], ranked[chosen], number)
            count = made.shape[1]
            states[chosen, :count], centres[chosen, :count], weights[chosen, :count] = made, of, parts
        return Merged(states, centres, weights)

    def clustered(self, hidden: Tensor, ranked: Tensor, going: int) -> tuple[Tensor, Tensor, Tensor]:
        """For prompts that lose equally many tokens: states, centres and weights as in `Merged`.

        Args:
            hidden: [R, T, D].
            ranked: Places of the tokens that go, best first, then any others, [R, T].
            going: How many go.
        """
        import torch

        at = ranked[:, : self.recycled(going)]
        row = torch.arange(len(at), device=at.device)[:, None] if len(at) > 1 else 0
        members = hidden[row, at].float()
        centre, group = density_peaks(members.detach(), self.merges(going), self.tie_break(at))
        share = (group[:, None] == torch.arange(centre.shape[1], device=at.device)[:, None]).float()
        share = share / share.sum(-1, keepdim=True)  # [R, clusters, recycled]
        weights = share.new_zeros(*share.shape[:2], hidden.shape[1]).scatter_(2, at[:, None].expand_as(share), share)
        return share @ members, at.gather(1, centre), weights

    def tie_break(self, recycled: Tensor) -> Tensor | None:
        """Breaks ties of density, higher = denser, [R, m]; two mutual nearest neighbours are often equally dense.

        None: the better-ranked token counts as denser. (The published code chooses at random.)
        """
        return None

    # ------------------------------------------------------------------ what it costs

    def query_rows(self, text_tokens: float) -> float:
        """A row for each text token: how many are raters is only known on the device, and is not read."""
        return max(text_tokens, 1)

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Similarity of text and image; distances and means of the recycled tokens."""
        entering = [round(n) for n in (prompt.visual, *prompt.visual_per_layer)]
        macs = prompt.visual * prompt.text * sizes.hidden
        for stage in schedule:
            now, after = entering[stage.layer : stage.layer + 2]
            going = self.gone(now, after) if stage.adaptive else now - self.stays(stage, entering[0], now)
            recycled = self.recycled(going)
            macs += (recycled * recycled + self.merges(going) * recycled) * sizes.hidden
        return macs

    def gone(self, before: int, after: int) -> int:
        """How many of `before` tokens went if `after` are left, merged ones included (or one more)."""
        return next((n for n in range(1, before + 1) if before - n + self.merges(n) == after), 0)


def last_of(mask: Tensor) -> Tensor:
    """Only the last of the tokens in each row of `mask`, [B, T] bool."""
    count = mask.cumsum(1)
    return mask & (count == count[:, -1:])


def text_window(view: View) -> range:
    """The last places, as many as a prompt has text tokens; with a block they include all text after it."""
    width = view.index.shape[1]
    return range(width - view.text_counts[0], width)


def raters_of(view: View) -> Tensor:
    """The raters among the tokens alive, [B, T] bool. A merged token is not one, even in a rater's place."""
    raters: Tensor = view.begun.to(view.index.device)
    if view.block is not None:  # only tokens before them have gone
        return raters[:, raters.shape[1] - view.index.shape[1] :]
    raters = raters.gather(1, view.index)
    return raters & view.valid & ~view.visual


def most_raters(view: View) -> int | range:
    """A bound on a prompt's raters that is known without waiting for the device: its text tokens."""
    return max(1, *view.text_counts) if view.block is None else text_window(view)


def density_peaks(x: Tensor, clusters: int, tie_break: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks over the nearest neighbours (DPC-kNN, with as many neighbours as clusters).

    Args:
        x: [R, m, D] float32.
        clusters: How many.
        tie_break: Of two equally dense tokens, the one with the larger value counts as denser, [R, m]; None: the
            earlier one.

    Returns:
        Centres, [R, clusters] in 0..m-1; and the cluster of each token, [R, m].
    """
    import torch

    x = x - x.mean(1, keepdim=True)  # same distances, but smaller squares and so less rounding below
    squares = x.square().sum(-1)
    products = x @ x.transpose(1, 2)
    products = products + products.transpose(1, 2)  # exactly symmetric: equal distances must tie
    distances = (squares[:, :, None] + squares[:, None] - products).clamp(min=0).sqrt()
    distances.diagonal(dim1=1, dim2=2).zero_()
    distances = distances / x.shape[-1] ** 0.5
    # minus the logarithm of the density; the token itself counts
    thinness = distances.topk(clusters, largest=False).values.square().mean(-1)
    if tie_break is None:
        order = thinness.argsort(dim=1, stable=True)  # densest first
    else:
        first = tie_break.argsort(dim=1, descending=True, stable=True)
        order = first.gather(1, thinness.gather(1, first).argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    denser = rank[:, None] < rank[:, :, None]  # [R, i, j]: j is denser than i
    gap = torch.where(denser, distances, distances.amax((1, 2), keepdim=True)).amin(-1)
    centre = (gap.log() - thinness).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    group = distances.gather(1, centre[..., None].expand(-1, -1, x.shape[1])).argmin(1)
    own = torch.arange(clusters, device=x.device).expand_as(centre)
    return centre, group.scatter(1, centre, own)
