"""The cost of a training step: forward and backward of one prompt, with and without gradient checkpointing.

    step = training_step_flops(sizes, prompt, method.selection(schedule, prompt, sizes), checkpointing=True)
    step["total"] / training_step_flops(sizes, prompt.undropped(), checkpointing=True)["total"]    # what dropping saves

A matrix product y = xW of the forward becomes two in the backward: the gradient of x (if anything before it is trained)
and of W (if W is trained). Attention's two products become four, or five in kernels that recompute the scores. With
gradient checkpointing each decoder layer runs a second forward. Ranking is done once, without gradients. Losses need
logits of every position: the rows of dropped tokens come back as zeros after the last layer.

Not included: the optimizer (a few operations per weight, no matrix product), norms, activations, embedding look-ups.
tests/cost/test_training.py compares it with torch's FlopCounterMode over forward and backward.
"""

from __future__ import annotations

from dataclasses import replace

from pdrop.cost.flops import prefill_flops
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost


def training_step_flops(
    sizes: ModelSizes,
    prompt: PromptSize,
    selection: SelectionCost | None = None,
    *,
    checkpointing: bool = False,
    train_decoder: bool = True,
    train_projector: bool = True,
    train_tower: bool = False,
    adapters: bool = False,
    recomputed_scores: bool = True,
    through_tower: bool = False,
    causal: bool = False,
) -> dict[str, float]:
    """FLOPs (a multiply-add = 2) of one prompt's share of a training step.

    Args:
        sizes: The model's.
        prompt: The prompt with its answers counted as text, and the visual tokens that enter each layer.
        selection: What choosing them costs (`Method.selection`), with a query row per answer; keys are never cached.
        checkpointing: Decoder layers only keep their inputs, and run again in the backward.
        train_decoder: Full fine-tuning; False: the decoder is frozen, as in LLaVA's first stage.
        train_projector: As in both of LLaVA's stages.
        train_tower: LLaVA-1.5's is frozen, LLaVA-NeXT's second stage trains it. With `checkpointing` its layers run
            again.
        adapters: LoRA: gradients flow through a decoder that has none of its own; the adapters' products, r / hidden of
            the rest, are left out.
        recomputed_scores: Whether the attention's backward computes the scores again (sdpa and flash kernels do,
            eager does not).
        through_tower: Gradients flow through the frozen tower, too. Nothing needs them, but transformers'
            `gradient_checkpointing_enable` asks for gradients of every embedding, the tower's as well, and so pays for
            them (5.23; a tower that is read before its last layer saves that one, which is counted here).
        causal: Count the half of the decoder's attention that causal kernels compute.

    Returns:
        forward, backward and recomputed, and their sum `total`.

    Raises:
        ValueError: If nothing is trained, or the layers do not match the architecture's.
    """
    if not (train_decoder or train_projector or train_tower or adapters):
        raise ValueError("a step trains tower, projector, decoder or adapters: nothing is trained here")
    ranked = None if selection is None else replace(selection, keys_cached=False)
    forward = prefill_flops(sizes, prompt, ranked, logits=prompt.visual + prompt.text)
    if causal:
        saved = forward["attention"] - forward["attention_causal"]
        forward = forward | {"attention": forward["attention_causal"], "total": forward["total"] - saved}
    scores = 2.5 if recomputed_scores else 2.0
    # through the decoder flow the gradients of the projector's output, or of word embeddings
    products = (1 + train_decoder) * sum(forward[name] for name in ("attention_projections", "mlp", "lm_head"))
    reached = bool(prompt.visual) and (train_tower or through_tower)  # gradients reach the tower
    # where they do not, the projector's first matrix has nothing trained below it
    projector = forward["projector"] * (1 + train_projector if reached else (2 - first_share(sizes)) * train_projector)
    tower = again = 0.0
    if reached:
        tower, again = tower_backward(sizes, prompt, train_tower, scores)
        again *= checkpointing
    if checkpointing:
        again += sum(forward[name] for name in ("attention_projections", "attention", "mlp"))
        # the last product of a layer need not be repeated: nothing reads it
        again -= last_product(sizes, prompt)
    backward = products + scores * forward["attention"] + projector + tower
    step = {"forward": forward["total"], "backward": backward, "recomputed": again}
    return {**step, "total": sum(step.values())}


def tower_backward(sizes: ModelSizes, prompt: PromptSize, trained: bool, scores: float) -> tuple[float, float]:
    """FLOPs of the backward through the tower, and of its layers' second forward; `scores` as of attention there."""
    parts, _ = sizes.tower.macs(prompt.visual, prompt.images)
    backward = (1 + trained) * parts["linear"] + scores * parts["attention"]
    backward += trained * (parts["embedding"] + 2 * parts["pooling"])  # the pixels need no gradient
    return 2 * backward, 2 * (parts["linear"] - parts["last_matrices"] + parts["attention"])


def first_share(sizes: ModelSizes) -> float:
    """The first matrix's share of a projector; of several mergers each has its first."""
    matrices = [inward * outward for inward, outward in sizes.tower.projector]
    return sum(matrices[::2]) / sum(matrices)


def last_product(sizes: ModelSizes, prompt: PromptSize) -> float:
    """FLOPs of the layers' last matrices, whose outputs a second forward does not need."""
    return sum(2.0 * n * sizes.hidden * sizes.intermediate for n in prompt.tokens_per_layer)
