"""FLOPs of a training step in closed form, from those of a forward (pdrop/flops.py).

A matrix product of the forward costs as much again for the gradient of its input, and once more for that of its
weights; attention's products have two inputs each (fused kernels that compute the scores again are not counted). What
is frozen has no gradient of weights, and a frozen tower has none at all. With gradient checkpointing the decoder's
layers run forward again, up to their last product, whose result nobody needs. Ranking carries no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdrop.flops import prefill_flops
from pdrop.sizes import Architecture, Images
from pdrop.training.parts import Rates
from pdrop.training.record import TrainingCost

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.schedule import Schedule
    from pdrop.training.settings import TrainingSettings


def step_flops(
    arch: Architecture,
    visual_per_layer: Sequence[float],
    text_tokens: float,
    *,
    boundaries: Sequence[int] = (),
    asking: float = 1,
    own_macs: float = 0,
    images: Images | None = None,
    trained: Rates | None = None,
    lora: bool = False,
    checkpointing: bool = False,
    causal: bool = False,
) -> float:
    """FLOPs of forward and backward of one record.

    Args:
        arch, visual_per_layer, text_tokens, boundaries, asking, own_macs, images: As for `prefill_flops`.
        trained: Rates of the parts, 0 = frozen; None: everything is trained.
        lora: Only adapters of the decoder are trained; their own products are left out (r / hidden of the rest).
        checkpointing: The decoder's layers (and a trained tower's) run forward again in the backward pass.
        causal: Count the half of attention's square that causal kernels compute.
    """
    forward = prefill_flops(
        arch,
        visual_per_layer,
        text_tokens,
        boundaries=boundaries,
        asking=asking,
        own_macs=own_macs,
        images=images,
        logits=round(visual_per_layer[0] + text_tokens),  # labels can be anywhere: every position gets logits
    )
    tower = trained is None or trained.vision_tower > 0
    projector = trained is None or trained.projector > 0
    decoder = (trained is None or trained.language_model > 0) and not lora
    again = 1 if checkpointing else 0
    sizes = [inside * outside for inside, outside in arch.tower.projector]
    behind_first = sum(sizes[1:]) / sum(sizes)  # in front of a frozen tower nobody asks for a gradient
    times: Mapping[str, float] = {
        "vision_tower": 3 + again if tower else 1,
        "projector": 1 + projector + (1 if tower else behind_first * projector),
        "attention_projections": 2 + decoder + again,
        "attention_causal" if causal else "attention": 3 + again,
        "mlp": 2 + decoder + again * 2 / 3,
        "ranking": 1,
        "lm_head": 2 + decoder,
    }
    return sum(forward[name] * factor for name, factor in times.items())


def cost_of(
    totals: Mapping[str, float],
    means: Mapping[str, float],
    peak_memory_bytes: int,
    arch: Architecture,
    method: Method | None,
    schedule: Schedule,
    settings: TrainingSettings,
) -> TrainingCost:
    """The record's cost; FLOPs of a step are the mean record's times the records of a step."""
    text, visual = means["text_tokens"], means["visual_tokens"]
    whole = [visual] * arch.layers
    layers: list[float] = [visual] * arch.layers
    own: dict[str, Any] = {}
    if method is not None and schedule:
        whole_tokens = method.tokens_per_layer(schedule, round(visual), arch.layers)
        layers = [n * visual / max(1, round(visual)) for n in whole_tokens]
        boundaries = schedule.layers if method.ranks_by_attention else ()
        extra = method.own_macs(schedule, round(visual), text, arch.layers, arch.hidden, arch.head_dim)
        own = {"boundaries": boundaries, "asking": method.asking(text), "own_macs": extra}
    common: dict[str, Any] = {
        "trained": settings.rates,
        "lora": settings.lora is not None,
        "checkpointing": settings.gradient_checkpointing,
    }
    with_it, without = (
        settings.batch_size * step_flops(arch, n, text, **common, **more) for n, more in ((layers, own), (whole, {}))
    )
    return TrainingCost(
        **totals,
        **means,
        peak_memory_bytes=peak_memory_bytes,
        visual_tokens_per_layer=layers,
        step_flops=with_it,
        step_flops_unpruned=without,
    )
