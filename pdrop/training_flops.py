"""What a training step costs: forward and backward of one prompt, with and without gradient checkpointing.

    step = training_step_flops(arch, visual_per_layer, text_tokens=120, boundaries=(8, 16, 24), checkpointing=True)
    step["total"] / training_step_flops(arch, [576] * 32, 120, checkpointing=True)["total"]    # what dropping saves

A matrix product y = xW of the forward is two in the backward: x's gradient (where something below is trained) and W's
(where W is). Attention's two products become four, or five in kernels that keep no scores and compute them again. With
gradient checkpointing each decoder layer runs a second forward. Ranking is done once, without gradients. Losses need
logits of every position: the rows of dropped tokens come back as zeros behind the last layer.

Not in it: the optimizer (a few operations a weight, no matrix product), norms, activations, embedding look-ups. Held
against torch's FlopCounterMode over forward and backward by tests/test_training_flops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.flops import prefill_flops
from pdrop.sizes import Architecture, Images


def training_step_flops(
    arch: Architecture,
    visual_per_layer: Sequence[float],
    text_tokens: float,
    *,
    boundaries: Sequence[int] = (),
    asking: float = 1,
    own_macs: float = 0,
    images: Images | None = None,
    visual: float | None = None,
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
        arch: The model's sizes.
        visual_per_layer: Visual tokens that enter each layer.
        text_tokens: The other tokens, answers included.
        boundaries: Layers in front of which attention rows are computed to rank by.
        asking: Rows asked for at each: one an answer.
        own_macs: The method's own multiply-adds.
        images, visual: See `pdrop.flops.prefill_flops`.
        checkpointing: Decoder layers keep their inputs alone, and run again in the backward.
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
            them (5.23; a tower that is read in front of its last layer saves that one, which is counted here).
        causal: Count the half of the decoder's attention that causal kernels compute.

    Returns:
        forward, backward and recomputed, and their sum `total`.

    Raises:
        ValueError: If nothing is trained, or the layers do not match the architecture's.
    """
    if not (train_decoder or train_projector or train_tower or adapters):
        raise ValueError("a step trains tower, projector, decoder or adapters: nothing is trained here")
    came = visual_per_layer[0] if visual is None else visual
    forward = prefill_flops(
        arch, visual_per_layer, text_tokens, boundaries=boundaries, asking=asking, own_macs=own_macs, images=images,
        logits=round(visual_per_layer[0] + text_tokens), visual=visual,
    )  # fmt: skip
    if causal:
        saved = forward["attention"] - forward["attention_causal"]
        forward = forward | {"attention": forward["attention_causal"], "total": forward["total"] - saved}
    scores = 2.5 if recomputed_scores else 2.0
    # through the decoder flow the gradients of the projector's output, or of word embeddings
    products = (1 + train_decoder) * sum(forward[name] for name in ("attention_projections", "mlp", "lm_head"))
    reached = bool(came) and (train_tower or through_tower)  # gradients reach the tower
    # where they do not, the projector's first matrix has nothing trained below it
    projector = forward["projector"] * (1 + train_projector if reached else (2 - first_share(arch)) * train_projector)
    again = tower = 0.0
    if reached:
        parts, _ = arch.tower.macs(came, images)
        tower = 2 * ((1 + train_tower) * parts["linear"] + scores * parts["attention"])
        tower += 2 * train_tower * (parts["embedding"] + 2 * parts["pooling"])  # the pixels need no gradient
        again = 2 * (parts["linear"] - parts["last_matrices"] + parts["attention"]) if checkpointing else 0.0
    if checkpointing:
        again += sum(forward[name] for name in ("attention_projections", "attention", "mlp"))
        # the last product of a layer need not be repeated: nothing reads it
        again -= last_product(arch, visual_per_layer, text_tokens)
    backward = products + scores * forward["attention"] + projector + tower
    step = {"forward": forward["total"], "backward": backward, "recomputed": again}
    return {**step, "total": sum(step.values())}


def first_share(arch: Architecture) -> float:
    """The first matrix's share of a projector; of several mergers each has its first."""
    matrices = [inward * outward for inward, outward in arch.tower.projector]
    return sum(matrices[::2]) / sum(matrices)


def last_product(arch: Architecture, visual_per_layer: Sequence[float], text_tokens: float) -> float:
    """FLOPs of the layers' last matrices, whose outputs a second forward does not need."""
    return sum(2.0 * (n + text_tokens) * arch.hidden * arch.intermediate for n in visual_per_layer)
