"""Calibration on samples that two methods need before use: VTW's layer, FitPrune's table.

    layer, divergences = withdrawal_layer(model, batches)                  # VTW: single(layer, 0.0)
    fitted = fitprune(model, batches, reduction=0.6)                       # FitPrune: fitted.schedule()

`batches` are what `model(**batch)` takes, one prompt each; the model is in eval mode with nothing attached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pdrop.engine import attach
from pdrop.methods.base import Ranking, View
from pdrop.methods.fitprune import FitPrune
from pdrop.methods.vtw import VTW
from pdrop.schedule import Schedule, Stage, single

if TYPE_CHECKING:
    from torch import Tensor

ALPHA_STEP = 0.01  # width at which the bisection ends

Batch = Mapping[str, Any]


# ---------------------------------------------------------------- VTW


@torch.no_grad()
def withdrawal_layer(
    model: Any, batches: Sequence[Batch], threshold: float = 0.003, first: int = 5
) -> tuple[int | None, dict[int, float]]:
    """The first layer at which all visual tokens can go (VTW, arXiv 2405.05803, section 3.3; its code's search).

    Withdrawing them there changes the next token's probabilities by a mean divergence over the samples, KL(withdrawn ||
    whole), of at most `threshold`. That code uses 20 samples and a threshold of 0.003, 0.0005 for 13B, 0.0001 for
    LLaVA-NeXT.

    Args:
        model: A vision-language model.
        batches: One prompt each.
        threshold: The paper's eta.
        first: The first layer to try.

    Returns:
        The layer, None if there is none; and the mean divergence at each layer tried.

    Raises:
        ValueError: If there is no sample.
    """
    if not batches:
        raise ValueError("a layer is searched on samples: there are none")
    whole = [next_token(model, batch) for batch in batches]
    layers, tried = len(model.get_decoder().layers), dict[int, float]()
    for layer in range(first, layers):
        total = 0.0
        for batch, before in zip(batches, whole):
            with attach(model, VTW(), single(layer, 0.0)):
                after = next_token(model, batch)
            total += float((after.exp() * (after - before)).sum())
        tried[layer] = total / len(batches)
        if tried[layer] <= threshold:
            return layer, tried
    return None, tried


def next_token(model: Any, batch: Batch) -> Tensor:
    """Logarithms of the next token's probabilities, [vocabulary] float32."""
    logits: Tensor = model(**batch, logits_to_keep=1).logits
    return logits[0, -1].float().log_softmax(-1)


# ---------------------------------------------------------------- FitPrune


@dataclass(frozen=True)
class Fitted:
    """A table of how many tokens go in each layer.

    Attributes:
        gone: Visual tokens that go in each layer, the integer part of the samples' mean.
        visual: Visual tokens of a prompt.
        alpha: The share of attention that may be lost, as found.
        tried: For every alpha tried: (alpha, whether the table meets the FLOPs, the table).
    """

    gone: list[int]
    visual: int
    alpha: float
    tried: list[tuple[float, bool, list[int]]]

    def schedule(self) -> Schedule:
        """Counts for prompts with `visual` visual tokens; tokens that go in the last layer need no boundary."""
        stages = []
        for layer in range(1, len(self.gone)):
            if self.gone[layer - 1]:
                stages.append(Stage(layer, tokens=self.visual - sum(self.gone[:layer])))
        return Schedule(tuple(stages))


@torch.no_grad()
def fitprune(model: Any, batches: Sequence[Batch], reduction: float) -> Fitted:
    """FitPrune's table by its own search (arXiv 2409.10197, section 3.3; its code's statistical_analysis.py).

    One alpha for all layers, by bisection to 0.01. In each layer the tokens go that are among the least attended both
    by the visual tokens and by the question, as long as the lost attention stays below alpha of the unpruned model's;
    once only 1 - `reduction` of the visual tokens' FLOPs are left, nothing more goes. That code prints the table of the
    last alpha that it tried, even if it misses the FLOPs; this returns the last table that meets them.

    Args:
        model: A vision-language model.
        batches: One prompt each, with equally many visual tokens.
        reduction: Share of the FLOPs to save, 0.6 for the published "60 %".

    Raises:
        ValueError: If there is no sample, they have different numbers of visual tokens, or no alpha keeps the FLOPs.
    """
    if not batches:
        raise ValueError("a table is fitted to samples: there are none")
    decoder = model.get_decoder()
    layers, config = len(decoder.layers), decoder.config
    sums = [Sums() for _ in batches]
    counts = [entering(model, batch, Looking(sums=found), layers)[0] for batch, found in zip(batches, sums)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"FitPrune's table is for one number of visual tokens, and the samples have {sorted(set(counts))}"
        )
    low, high, tried = 0.0, 1.0, []
    while high - low > ALPHA_STEP + 1e-6:
        alpha = (low + high) / 2
        left = [entering(model, batch, Fitting(sums=found, alpha=alpha), layers) for batch, found in zip(batches, sums)]
        fits, table = within(left, config.hidden_size, config.intermediate_size, reduction)
        tried.append((alpha, fits, table))
        low, high = (low, alpha) if fits else (alpha, high)
    kept = [one for one in tried if one[1]]
    if not kept:
        raise ValueError(f"no table saves {reduction:.0%} of the FLOPs: {tried[-1][2]} is the closest")
    return Fitted(kept[-1][2], counts[0], kept[-1][0], tried)


@dataclass
class Sums:
    """Attention that all visual tokens of a sample get in each layer of the unpruned model."""

    own: dict[int, float] = field(default_factory=dict)
    question: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Looking(FitPrune):
    """Records the sums of one sample, and drops nothing."""

    sums: Sums = field(default_factory=Sums)
    adaptive: ClassVar[bool] = True

    def score(self, view: View) -> Tensor | Ranking:  # type: ignore[override]
        own, question = self.attention(view)
        visual = view.visual[0]
        self.sums.own[view.layer] = float(own[0, visual].sum())
        self.sums.question[view.layer] = float(question[0, visual].sum())
        return Ranking(torch.zeros_like(own), torch.tensor(view.visual_counts))


@dataclass(frozen=True)
class Fitting(FitPrune):
    """Drops the tokens little attended by both, within alpha."""

    sums: Sums = field(default_factory=Sums)
    alpha: float = 0.0
    adaptive: ClassVar[bool] = True

    def score(self, view: View) -> Tensor | Ranking:  # type: ignore[override]
        """1 for tokens that stay."""
        own, question = self.attention(view)
        visual = view.visual[0].nonzero()[:, 0]
        stays = torch.ones_like(own)
        least = [
            self.least(got[0, visual].double(), whole[view.layer])
            for got, whole in ((own, self.sums.own), (question, self.sums.question))
        ]
        gone = [n for n in least[0] if n in set(least[1])]
        stays[0, visual[gone]] = 0
        return Ranking(stays, torch.tensor([view.visual_counts[0] - len(gone)]))

    def least(self, got: Tensor, whole: float) -> list[int]:
        """The least attended tokens whose attention together stays within alpha."""
        order = got.argsort()
        left = got.sum() - torch.cat([got.new_zeros(1), got[order].cumsum(0)])[: len(got)]
        short = (left < (1 - self.alpha) * whole).nonzero()
        number = int(short[0]) if len(short) else len(got)
        return order[: max(number - 1, 0)].tolist()


def entering(model: Any, batch: Batch, method: FitPrune, layers: int) -> list[int]:
    """Visual tokens that enter each layer of a prompt, found by an adaptive method."""
    schedule = Schedule(tuple(Stage(layer, adaptive=True) for layer in range(1, layers)))
    with attach(model, method, schedule) as trace:
        model(**batch, logits_to_keep=1)
    return [row[0] for row in trace.visual_tokens]


def within(left: Sequence[Sequence[int]], hidden: int, inner: int, reduction: float) -> tuple[bool, list[int]]:
    """Whether a table saves enough, and the table, in which nothing goes once enough is saved.

    Args:
        left: For each sample, the visual tokens that enter each layer.
        hidden, inner: Sizes of the decoder and its MLP.
        reduction: Share of the FLOPs (multiply-adds of the visual tokens) to save.
    """
    layers, d, m = len(left[0]), hidden, inner

    def attended(n: int) -> float:
        return 3 * n * d * d + 2 * n * n * d

    def after(n: int) -> float:
        return n * d * d + 3 * n * d * m

    whole = sum(layers * (attended(row[0]) + after(row[0])) for row in left)
    used, total = 0.0, [0] * layers
    for layer in range(layers):
        used += sum(attended(row[layer]) for row in left)
        rest = sum(
            after(row[layer]) + (layers - 1 - layer) * (attended(row[layer]) + after(row[layer])) for row in left
        )
        if used + rest <= (1 - reduction) * whole:
            return True, [gone // len(left) for gone in total]
        following = [row[min(layer + 1, layers - 1)] for row in left]
        total[layer] = sum(row[layer] - then for row, then in zip(left, following))
        used += sum(after(then) for then in following)
    return False, [gone // len(left) for gone in total]
