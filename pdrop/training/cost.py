"""The measured cost of a training, and the closed-form cost of its mean record (pdrop/cost/training.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pdrop.cost.training import training_step_flops
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize
from pdrop.training.record import TrainingCost

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.training.settings import TrainingSettings


def cost_of(
    totals: Mapping[str, float],
    means: Mapping[str, float],
    peak_memory_bytes: int | None,
    sizes: ModelSizes,
    method: Method | None,
    schedule: Schedule,
    settings: TrainingSettings,
) -> TrainingCost:
    """The record's cost; FLOPs of a step are the mean record's times the records of a step."""
    whole = PromptSize(means["text_tokens"], means["visual_tokens"]).undropped(sizes.layers)
    prompt = whole.under(method, schedule, sizes.layers)
    selection = None if method is None else method.selection(schedule, prompt, sizes)
    rates, lora = settings.rates, settings.lora is not None
    common: dict[str, Any] = {
        "train_decoder": rates.language_model > 0 and not lora,
        "train_projector": rates.projector > 0,
        "train_tower": rates.vision_tower > 0,
        "adapters": lora,
        "checkpointing": settings.gradient_checkpointing,
        "recomputed_scores": settings.attn_implementation != "eager",
    }
    with_it, without = (
        settings.batch_size * training_step_flops(sizes, *step, **common)["total"]
        for step in ((prompt, selection), (whole,))
    )
    return TrainingCost(
        **totals,
        **means,
        peak_memory_bytes=peak_memory_bytes,
        visual_tokens_per_layer=list(prompt.visual_per_layer),
        step_flops=with_it,
        step_flops_unpruned=without,
    )
