"""What choosing costs, in closed form, where a prompt has several pictures, tiles or frames.

pytest tests/methods/test_selection_costs.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from pdrop import Composed, DivPrune, FastV, HiRED, Schedule, Stage, VisionZip, attach
from pdrop.conformance.families import IMAGE, build, ready
from pdrop.conformance.prompts import sample, single
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.shapes import ModelSizes, PromptSize
from tests.methods.test_in_front import METHODS


def of_three_layers(family: str) -> Any:
    """A family's model with a third layer in its tower: the first and the last but one are then not the same."""
    small = build(family).config
    values = small.to_dict()
    values["vision_config"]["num_hidden_layers"] = 3
    kind = {"llava": "Llava", "llava_next": "LlavaNext", "video_llava": "VideoLlava"}[family]
    model = getattr(transformers, f"{kind}ForConditionalGeneration")
    return ready(model(type(small).from_dict(values)), "sdpa", torch.float32)


@torch.no_grad()
@pytest.mark.product(2)
@pytest.mark.parametrize(
    ("family", "texts"),
    [
        pytest.param("video_llava", (3, 6), id="frames"),
        pytest.param("llava", (3, 5, 2, 7), id="three pictures"),
        pytest.param("llava_next", (3, 6), id="three tiles"),
        pytest.param("llava_next", (3, 5, 6), id="two pictures of three tiles"),
    ],
)
def test_costs_and_counts_of_many_pictures_tiles_and_frames(family: str, texts: tuple[int, ...]) -> None:
    """In closed form as counted; HiRED reads the tower's first layer only where pictures have tiles."""
    model, video = of_three_layers(family), family == "video_llava"
    inputs = single(family, sample(family, model, texts, 0, video=video))
    sizes, visual = ModelSizes.from_config(model.config), int((inputs["input_ids"] >= IMAGE).sum())
    crops = sum(value.flatten(0, -4).shape[0] for name, value in inputs.items() if name.startswith("pixel"))
    whole = PromptSize(inputs["input_ids"].shape[1] - visual, visual, images=crops, video=video)
    for method in [*METHODS, VisionZip(contextual=0.2), DivPrune(), Composed(HiRED(), FastV())]:
        for stage in (Stage(0, keep=0.5), Stage(0, keep=7 / visual)):
            inside = (Stage(2, keep=0.02),) if isinstance(method, Composed) else ()
            schedule = Schedule((stage, *inside))
            with attach(model, method, schedule) as trace:
                counted = counted_prefill_flops(model, inputs)["total"]
            layers = tuple(row[0] for row in trace.visual_tokens)
            seen = replace(whole, visual_per_layer=layers, video=False)  # as a record has it
            closed = prefill_flops(sizes, seen, method.selection(schedule, seen, sizes))["total"]
            assert closed == pytest.approx(counted, rel=1e-6), (method, stage)
            said = method.entering(schedule, whole, sizes.layers)
            if any(isinstance(part, HiRED) for part in method.parts) or len(texts) > 2:
                assert all(there <= n for there, n in zip(layers, said)), (method, "a budget is never exceeded")
            else:
                assert said == list(layers), (method, stage)
