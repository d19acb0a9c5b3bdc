"""FLOPs of a training step: the closed form against torch's counter, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from pdrop import PyramidDrop, Schedule, Stage, attach
from pdrop.cost.training import training_step_flops
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost
from pdrop.training.parts import Rates, checkpoint_activations, prepare
from tests.support.saved_checkpoints import LAYERS, VISUAL_TOKENS, config

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
    sizes, method = ModelSizes.from_config(model.config), PyramidDrop()
    prompt = PromptSize(TEXT, VISUAL_TOKENS, images=1).under(method, schedule, LAYERS)
    closed = training_step_flops(
        sizes,
        prompt,
        method.selection(schedule, prompt, sizes),
        train_tower=rates.vision_tower > 0,
        train_decoder=rates.language_model > 0,
        checkpointing=checkpointing,
        recomputed_scores=False,
    )
    assert closed["total"] == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_dropping_saves_the_same_share_of_every_part() -> None:
    sizes = ModelSizes.from_config(config())

    def total(layers: list[float], boundaries: tuple[int, ...] = (), **choices: Any) -> float:
        prompt = PromptSize(TEXT, layers[0], tuple(layers))
        return training_step_flops(sizes, prompt, SelectionCost(boundaries), **choices)["total"]

    whole = total([16] * 4)
    assert total([16, 8, 8, 4], boundaries=(1, 3)) < whole < total([16] * 4, checkpointing=True)
    assert whole < total([16] * 4, train_tower=True)
    assert total([16] * 4, train_decoder=False, adapters=True) < whole
    assert total([16] * 4, causal=True) < whole
