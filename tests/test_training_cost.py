"""FLOPs of a training step: the closed form against torch's counter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from saved_checkpoints import LAYERS, VISUAL_TOKENS, config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from pdrop import PyramidDrop, Schedule, Stage, attach
from pdrop.sizes import Architecture
from pdrop.training.cost import step_flops
from pdrop.training.parts import Rates, checkpoint_activations, prepare

TEXT, HALF = 11, Schedule((Stage(1, 0.5), Stage(3, 0.25)))


@pytest.mark.parametrize("schedule", [Schedule(), HALF], ids=["none", "pyramiddrop"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    "rates",
    [Rates(1, 1, 1), Rates(0, 1, 1), Rates(0, 1, 0)],
    ids=["everything", "frozen tower", "projector"],
)
def test_closed_form_equals_the_counter(rates, checkpointing, schedule) -> None:
    model = LlavaForConditionalGeneration(config()).train()
    model.set_attn_implementation("eager")  # fused backward kernels recompute, which is their own affair
    prepare(model, rates, None)
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.full((1, TEXT + VISUAL_TOKENS), 7)
    ids[:, 2 : 2 + VISUAL_TOKENS] = model.config.image_token_id
    labels = torch.where(torch.arange(ids.shape[1]) > ids.shape[1] - 4, ids, -100)
    pixels = torch.zeros(1, 3, 28, 28)
    with attach(model, PyramidDrop(), schedule), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
    layers = schedule.tokens_per_layer(VISUAL_TOKENS, LAYERS)
    arch = Architecture.from_config(model.config)
    closed = step_flops(
        arch,
        layers,
        TEXT,
        boundaries=schedule.layers,
        images=1,
        trained=rates,
        checkpointing=checkpointing,
    )
    counted = counter.get_total_flops()
    # of a trained tower: no gradient of the pixels, and what its checkpointing does not run again
    pixels_gradient, last_products = 2 * VISUAL_TOKENS * (3 * 7 * 7) * 16, 2 * 2 * (VISUAL_TOKENS + 1) * 24 * 16
    over = pixels_gradient + (pixels_gradient + last_products if checkpointing else 0) if rates.vision_tower else 0
    assert closed - over == counted


def test_dropping_saves_the_same_share_of_every_part() -> None:
    arch = Architecture.from_config(config())
    half = step_flops(arch, [16, 8, 8, 4], TEXT, boundaries=(1, 3))
    whole = step_flops(arch, [16] * 4, TEXT)
    assert half < whole < step_flops(arch, [16] * 4, TEXT, checkpointing=True)
    assert step_flops(arch, [16] * 4, TEXT, lora=True) < whole
    assert step_flops(arch, [16] * 4, TEXT, causal=True) < whole
