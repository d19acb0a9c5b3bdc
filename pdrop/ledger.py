"""The ledger of one prompt: everything that dropping costs and saves, in closed form, as lines that can be read.

    python run.py model=llava_1_5_7b tasks=none            # no weights, no network, no GPU

Every convention under its own name, each beside what it is with nothing dropped: the papers' multiply-adds, FLOPs of
prefill (attention as full squares, and the half that causal kernels compute), of a decoding step and of a training
step, and the cache's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from pdrop.conventions import fastv_macs_visual, sparsevlm_macs
from pdrop.flops import SUMMED, cost, paper_macs_visual
from pdrop.record import Cost
from pdrop.schedule import Schedule
from pdrop.sizes import Architecture, Images
from pdrop.training_flops import training_step_flops

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


@dataclass(frozen=True)
class Prompt:
    """One prompt with what enters each layer: what `pdrop.flops.cost` reads."""

    text: int
    visual: int
    visual_per_layer: Sequence[int]
    images: Images | None = None


def prompt_under(
    method: Method | None, schedule: Schedule, layers: int, text: int, visual: int, images: Images | None
) -> Prompt:
    """A prompt of that size, as the schedule leaves it."""
    left = [visual] * layers if method is None else method.tokens_per_layer(schedule, visual, layers)
    return Prompt(text, visual, left, images)


def lines(
    arch: Architecture, prompt: Prompt, schedule: Schedule, method: Method | None, dtype_bytes: int, title: str
) -> list[str]:
    """The ledger as text.

    Args:
        arch: The model's sizes.
        prompt: As the schedule leaves it.
        schedule: Where something is dropped.
        method: None where nothing is.
        dtype_bytes: Bytes of a number in the cache.
        title: What it is a ledger of.
    """
    spent = cost(arch, [prompt], schedule, method, dtype_bytes)
    whole = cost(arch, [prompt_under(None, Schedule(), arch.layers, prompt.text, prompt.visual, prompt.images)],
                 Schedule(), None, dtype_bytes)  # fmt: skip
    letter, unit = ("T", 1e12) if whole.prefill_flops > 1e11 else ("G", 1e9)
    found = [
        title,
        f"one prompt: {prompt.visual} visual tokens, {prompt.text} of text, {arch.layers} layers; "
        f"schedule {schedule or 'without a boundary: nothing is dropped'}",
        f"visual tokens entering the layers: {runs_of(prompt.visual_per_layer)}; mean {mean(spent):.1f} "
        f"({100 * spent.mean_keep:.1f} %)",
        f"{'':42}{'this':>12}{'nothing dropped':>18}{'ratio':>8}",
        f"papers' FLOPs: multiply-adds of the decoder, in {letter}",
        *conventions(arch, prompt, unit),
        f"prefill, in {letter}FLOPs (a multiply-add is 2)",
    ]
    for name in SUMMED:
        found.append(line(f"  {IN_WORDS[name]}", spent.flops_parts[name], whole.flops_parts[name], unit))
    causal, whole_causal = spent.prefill_flops_causal or 0.0, whole.prefill_flops_causal or 0.0
    found += [
        line("  total", spent.prefill_flops, whole.prefill_flops, unit),
        line("  total, attention's causal half", causal, whole_causal, unit),
        "behind the prefill",
        line("  a decoding step, GFLOPs",
             spent.decode_flops_per_token or 0.0, whole.decode_flops_per_token or 0.0, 1e9),
        line("  KV cache, MiB", spent.kv_bytes, whole.kv_bytes, 2**20),
        f"a training step on it, in {letter}FLOPs (full fine-tuning, frozen tower)",
    ]  # fmt: skip
    for checkpointing in (False, True):
        label = "  with gradient checkpointing" if checkpointing else "  forward and backward"
        this = training_step(arch, prompt, schedule, method, checkpointing)
        none = training_step(arch, undropped(prompt), Schedule(), None, checkpointing)
        found.append(line(label, this, none, unit))
    return found


def undropped(prompt: Prompt) -> Prompt:
    """The same prompt with nothing dropped."""
    return Prompt(prompt.text, prompt.visual, [prompt.visual] * len(prompt.visual_per_layer), prompt.images)


def conventions(arch: Architecture, prompt: Prompt, unit: float) -> list[str]:
    """What papers would print."""
    text, whole = prompt.text, undropped(prompt).visual_per_layer
    sizes, found = (arch.hidden, arch.intermediate), []
    formulas: list[tuple[str, Callable[..., float], int]] = [
        ("PyramidDrop's (visual tokens)", paper_macs_visual, 0),
        ("FastV's (visual tokens, 2-matrix MLP)", fastv_macs_visual, 0),
        ("SparseVLM's code (all tokens)", sparsevlm_macs, text),
    ]
    for label, formula, more in formulas:
        this, none = (formula(*sizes, [n + more for n in tokens]) for tokens in (prompt.visual_per_layer, whole))
        found.append(line(f"  {label}", this, none, unit))
    return found


def training_step(
    arch: Architecture, prompt: Prompt, schedule: Schedule, method: Method | None, checkpointing: bool
) -> float:
    """FLOPs of a training step on the prompt."""
    if method is None:
        step = training_step_flops(arch, prompt.visual_per_layer, prompt.text, images=prompt.images,
                                   checkpointing=checkpointing)  # fmt: skip
        return step["total"]
    macs = method.own_macs(schedule, prompt.visual, prompt.text, arch.layers, arch.hidden, arch.head_dim)
    return training_step_flops(
        arch, prompt.visual_per_layer, prompt.text, images=prompt.images, checkpointing=checkpointing,
        boundaries=schedule.layers if method.ranks_by_attention else (), asking=method.asking(prompt.text),
        own_macs=macs,
    )["total"]  # fmt: skip


def line(label: str, this: float, none: float, unit: float) -> str:
    """One entry."""
    ratio = f"{this / none:8.3f}" if none else f"{'–':>8}"
    return f"{label:42}{this / unit:12.4g}{none / unit:18.4g}{ratio}"


def mean(spent: Cost) -> float:
    """Visual tokens entering a layer, mean over the layers."""
    return sum(spent.visual_tokens_per_layer) / len(spent.visual_tokens_per_layer)


def runs_of(tokens: Sequence[float]) -> str:
    """Equal neighbours together: 576 x 8, 288 x 8."""
    return ", ".join(f"{value:g} x {len(list(same))}" for value, same in groupby(tokens))
