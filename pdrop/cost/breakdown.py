"""The cost of one prompt: everything that dropping costs and saves, in closed form, as readable lines.

    python run.py model=llava_1_5_7b tasks=none            # no weights, no network, no GPU

Each convention has its own name and is shown next to its value with nothing dropped: the papers' multiply-adds, FLOPs
of prefill (attention as full squares, and the half that causal kernels compute), of a decoding step and of a training
step, and the cache's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pdrop.cost.flops import SUMMED, cost, fastv_macs_visual, paper_macs_visual, sparsevlm_macs
from pdrop.cost.training import training_step_flops
from pdrop.record import Cost
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize

if TYPE_CHECKING:
    from pdrop.methods.base import Method

IN_WORDS = {
    "vision_tower": "vision tower",
    "projector": "projector",
    "attention_projections": "q, k, v, o",
    "attention": "attention, full square",
    "mlp": "MLP",
    "ranking": "ranking and merging",
    "lm_head": "lm_head, one position",
}


def lines(
    sizes: ModelSizes, prompt: PromptSize, schedule: Schedule, method: Method | None, dtype_bytes: int, title: str
) -> list[str]:
    """The breakdown as text.

    Args:
        sizes: The model's.
        prompt: The prompt under the schedule.
        schedule: The schedule.
        method: None if nothing is dropped.
        dtype_bytes: Bytes of a number in the cache.
        title: Title of the breakdown.
    """
    spent = cost(sizes, [prompt], schedule, method, dtype_bytes)
    whole = cost(sizes, [prompt.undropped()], Schedule(), None, dtype_bytes)
    letter, unit = ("T", 1e12) if whole.prefill_flops > 1e11 else ("G", 1e9)
    found = [
        title,
        f"one prompt: {prompt.visual:g} visual tokens, {prompt.text:g} of text, {sizes.layers} layers; "
        f"schedule {schedule or 'without a boundary: nothing is dropped'}",
        f"visual tokens entering the layers: {runs_of(prompt.visual_per_layer)}; mean {mean(spent):.1f} "
        f"({100 * spent.mean_keep:.1f} %)",
        f"{'':42}{'this':>12}{'nothing dropped':>18}{'ratio':>8}",
        f"papers' FLOPs: multiply-adds of the decoder, in {letter}",
        *conventions(sizes, prompt, unit),
        f"prefill, in {letter}FLOPs (a multiply-add is 2)",
    ]
    for name in SUMMED:
        found.append(line(f"  {IN_WORDS[name]}", spent.flops_parts[name], whole.flops_parts[name], unit))
    causal, whole_causal = spent.prefill_flops_causal or 0.0, whole.prefill_flops_causal or 0.0
    found += [
        line("  total", spent.prefill_flops, whole.prefill_flops, unit),
        line("  total, attention's causal half", causal, whole_causal, unit),
        "after the prefill",
        line("  a decoding step, GFLOPs",
             spent.decode_flops_per_token or 0.0, whole.decode_flops_per_token or 0.0, 1e9),
        line("  KV cache, MiB", spent.kv_bytes, whole.kv_bytes, 2**20),
        f"a training step on it, in {letter}FLOPs (full fine-tuning, frozen tower)",
    ]  # fmt: skip
    selection = None if method is None else method.selection(schedule, prompt, sizes)
    for checkpointing in (False, True):
        label = "  with gradient checkpointing" if checkpointing else "  forward and backward"
        this = training_step_flops(sizes, prompt, selection, checkpointing=checkpointing)["total"]
        none = training_step_flops(sizes, prompt.undropped(), checkpointing=checkpointing)["total"]
        found.append(line(label, this, none, unit))
    return found


def conventions(sizes: ModelSizes, prompt: PromptSize, unit: float) -> list[str]:
    """The papers' multiply-adds, one line per convention."""
    text, whole = prompt.text, prompt.undropped().visual_per_layer
    found = []
    formulas: list[tuple[str, Callable[..., float], float]] = [
        ("PyramidDrop's (visual tokens)", paper_macs_visual, 0),
        ("FastV's (visual tokens, 2-matrix MLP)", fastv_macs_visual, 0),
        ("SparseVLM's code (all tokens)", sparsevlm_macs, text),
    ]
    for label, formula, more in formulas:
        this, none = (
            formula(sizes.hidden, sizes.intermediate, [n + more for n in tokens])
            for tokens in (prompt.visual_per_layer, whole)
        )
        found.append(line(f"  {label}", this, none, unit))
    return found


def line(label: str, this: float, none: float, unit: float) -> str:
    ratio = f"{this / none:8.3f}" if none else f"{'–':>8}"
    return f"{label:42}{this / unit:12.4g}{none / unit:18.4g}{ratio}"


def mean(spent: Cost) -> float:
    """Mean over the layers of the visual tokens entering a layer."""
    return sum(spent.visual_tokens_per_layer) / len(spent.visual_tokens_per_layer)


def runs_of(tokens: Sequence[float]) -> str:
    """Run lengths as text: 576 x 8, 288 x 8."""
    return ", ".join(f"{value:g} x {len(list(same))}" for value, same in groupby(tokens))
