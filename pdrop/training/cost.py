"""What a training took, and the closed form of what its mean record costs (pdrop/training_flops.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdrop.sizes import Architecture
from pdrop.training.record import TrainingCost
from pdrop.training_flops import training_step_flops

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.schedule import Schedule
    from pdrop.training.settings import TrainingSettings


def cost_of(
    totals: Mapping[str, float],
    means: Mapping[str, float],
    peak_memory_bytes: int | None,
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
    rates, lora = settings.rates, settings.lora is not None
    common: dict[str, Any] = {
        "visual": visual,
        "train_decoder": rates.language_model > 0 and not lora,
        "train_projector": rates.projector > 0,
        "train_tower": rates.vision_tower > 0,
        "adapters": lora,
        "checkpointing": settings.gradient_checkpointing,
        "recomputed_scores": settings.attn_implementation != "eager",
    }
    with_it, without = (
        settings.batch_size * training_step_flops(arch, n, text, **common, **more)["total"]
        for n, more in ((layers, own), (whole, {}))
    )
    return TrainingCost(
        **totals,
        **means,
        peak_memory_bytes=peak_memory_bytes,
        visual_tokens_per_layer=layers,
        step_flops=with_it,
        step_flops_unpruned=without,
    )
