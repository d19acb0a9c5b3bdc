"""What a training step costs: the closed form against torch's counter over forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_training import LANES, Lane, TrainingSteps
from pdrop import FastV, PyramidDrop, Schedule, Uniform, attach, pyramid
from pdrop import single as one_boundary
from pdrop.conformance.families import fresh
from pdrop.conformance.prompts import sample, single
from pdrop.cost.training import training_step_flops
from pdrop.models.shipped import read
from pdrop.shapes import ModelSizes, PromptSize

CASES: list[Any] = [
    (None, Schedule()),
    (PyramidDrop(), pyramid(6, layers=(2, 3, 5))),
    (FastV(), one_boundary(2, 0.5)),
]


@pytest.mark.product(8)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("decoder", [True, False], ids=["full", "projector"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "schedule"), CASES, ids=["none", "pyramiddrop", "fastv"])
def test_a_step_is_what_torch_counts(
    method: Any, schedule: Schedule, backend: str, decoder: bool, checkpointing: bool
) -> None:
    model = fresh("llava", backend, torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.language_model.requires_grad_(decoder)
    model.lm_head.requires_grad_(decoder)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with attach(model, method, schedule), FlopCounterMode(display=False) as counter:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    sizes = ModelSizes.from_config(model.config)
    prompt = PromptSize(labels.numel() - visual, visual, images=2).under(method, schedule, 6)
    selection = None if method is None else method.selection(schedule, prompt, sizes)
    step = training_step_flops(
        sizes, prompt, selection, checkpointing=checkpointing, train_decoder=decoder,
        recomputed_scores=backend == "sdpa", through_tower=checkpointing,
    )  # fmt: skip
    assert step["total"] == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert (step["recomputed"] > 0) == checkpointing


@pytest.mark.parametrize(
    ("method", "schedule"), [(PyramidDrop(), pyramid(6, layers=(0, 3))), (Uniform(), one_boundary(0, 0.25))]
)
def test_a_step_that_drops_in_front_of_the_decoder(method: Any, schedule: Schedule) -> None:
    """The tower sees every visual token, and losses ask logits of every position."""
    model = fresh("llava", "eager", torch.float32).train()
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    with attach(model, method, schedule), FlopCounterMode(display=False) as counter:
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    sizes, prompt = ModelSizes.from_config(model.config), PromptSize(labels.numel() - 32, 32, images=2)
    prompt = prompt.under(method, schedule, sizes.layers)
    selection = method.selection(schedule, prompt, sizes)
    step = training_step_flops(sizes, prompt, selection, train_tower=True, recomputed_scores=False)
    assert step["total"] == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_what_dropping_saves_of_a_step_at_real_shapes() -> None:
    """LLaVA-1.5-7B, S=4, .5: more than its prefill saves by what the papers count, since the tower is not trained."""
    sizes, method, schedule = ModelSizes.from_config(read("llava_1_5_7b")), PyramidDrop(), pyramid(32)
    prompt = PromptSize(120, 576).under(method, schedule, 32)
    for checkpointing, factor in ((False, 3.0), (True, 4.0)):
        whole = training_step_flops(sizes, prompt.undropped(), checkpointing=checkpointing)
        selection = method.selection(schedule, prompt, sizes)
        step = training_step_flops(sizes, prompt, selection, checkpointing=checkpointing)
        assert 0.5 < step["total"] / whole["total"] < 0.6
        assert factor - 0.5 < whole["total"] / whole["forward"] < factor
    frozen = training_step_flops(sizes, prompt.undropped(), train_decoder=False)
    assert frozen["backward"] < 0.6 * training_step_flops(sizes, prompt.undropped())["backward"]


def test_a_step_that_trains_nothing_is_refused() -> None:
    sizes = ModelSizes.from_config(read("llava_1_5_7b"))
    with pytest.raises(ValueError, match="nothing is trained"):
        training_step_flops(sizes, PromptSize(60, 576).undropped(32), train_decoder=False, train_projector=False)


@pytest.mark.product(1)
@pytest.mark.parametrize("lane", LANES, ids=lambda lane: lane.name)
def test_the_benchmark_holds_its_steps_against_what_torch_counts(lane: Lane) -> None:
    case, lane = lane.cases[0], replace(lane, text=lane.text[:2], visual=144)
    model = lane.build()
    steps = TrainingSteps(model, lane.batch(model))
    counted = []
    for side in (case, None):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            steps.side(side)()
        counted.append(counter.get_total_flops())
    # the padding of the shorter row counts as tokens, and the math kernel keeps its scores for the backward
    expected = lane.flops_ratio(case, ModelSizes.from_config(model.config), causal=False)
    assert counted[0] / counted[1] == pytest.approx(expected, rel=0.01)
