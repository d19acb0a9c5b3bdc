"""What went through the vision tower: counted from what processors make, and right to the last FLOP.

pytest tests/evaluation/test_pictures.py
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdrop.conformance.families import build
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import cost
from pdrop.engine import attach
from pdrop.engine.pictures import tiled
from pdrop.evaluation.answers import Question
from pdrop.evaluation.generation import Generator
from pdrop.evaluation.pictures import pictures_of, tower_of
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.models.checkpoint import load
from pdrop.schedule import Schedule, pyramid
from pdrop.shapes import ModelSizes
from tests.support.saved_checkpoints import LAYERS, save_llava, save_llava_next, save_qwen2_5_vl
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture

# sizes of the pictures of each question, and what the tower sees of them
CASES: list[tuple[Any, list[list[tuple[int, int]]], list[Any]]] = [
    (save_llava, [[(640, 480)], [(28, 28), (40, 28)]], [1, 2]),
    (save_llava_next, [[(640, 480)], [(28, 112)], [(28, 28), (640, 480)]], [5, 3, 3 + 5]),
    (save_qwen2_5_vl, [[(64, 48)], [(64, 48), (16, 32)]], [[[1, 12, 16]], [[1, 12, 16], [1, 8, 4]]]),
]


@pytest.mark.parametrize(("save", "sizes", "expected"), CASES, ids=["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("drop", [False, True])
def test_cost_is_what_torch_counts(save: Any, sizes: Any, expected: Any, drop: bool, tmp_path: Path) -> None:
    checkpoint = load(str(save(tmp_path / "model")), name="tiny")
    method, schedule = (PyramidDrop(positions="original"), pyramid(LAYERS)) if drop else (None, Schedule())
    builder = PromptBuilder(checkpoint.processor)
    questions, counted = [], []
    for number, row in enumerate(sizes):
        pictures = [picture(place, size) for place, size in enumerate(row)]
        questions.append(Question("task", number, 0, "What is it?", images=functools.partial(list, pictures)))
        inputs = builder.encode([builder.render("What is it?", len(row))], [pictures])
        with attach(checkpoint.model, method, schedule):
            counted.append(counted_prefill_flops(checkpoint.model, inputs)["total"])
    arch = ModelSizes.from_config(checkpoint.model.config)
    for batch_size in (1, 3):
        generator = Generator(checkpoint, method, schedule, spec_of(batch_size=batch_size, max_new_tokens=1))
        answers = generator.answer(questions).answers
        assert [answer.images for answer in answers] == expected
        for answer, flops in zip(answers, counted):
            found = cost(arch, [answer.size], schedule, method, 4)
            assert found.prefill_flops == pytest.approx(flops, rel=1e-6)


def towers(family: str, visual: list[int], **inputs: Any) -> list[Any] | None:
    """What goes through the tower of prompts of so many visual tokens, text and padding around them."""
    model = build(family)
    ids = torch.full((len(visual), max(visual) + 2), 5)
    for row, count in zip(ids, visual):
        row[1 : 1 + count] = model.config.image_token_id
    read = pictures_of(model, {"input_ids": ids, **inputs})
    return None if read is None else [tower_of(row) for row in read]


def test_layouts() -> None:
    assert towers("llava", [0, 0]) == [0, 0], "text alone"
    flat = torch.ones(8, 3, 2, 2)
    assert towers("internvl", [4, 28], pixel_values=flat) == [1, 7], "InternVL: all tiles in a row"
    assert towers("llava", [3 * 16, 5 * 16], pixel_values=flat) == [3, 5]
    assert towers("internvl", [5, 28], pixel_values=flat) is None, "tiles of unequal size"
    tiles = torch.ones(3, 5, 3, 2, 2)
    tiles[0, 3:] = 0
    tiles[2, 1:] = 0
    assert towers("idefics3", [12, 20, 4], pixel_values=tiles) == [3, 5, 1], "Idefics: a row per prompt"
    grids = torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])
    given = {"pixel_values": flat, "image_grid_thw": grids}
    assert towers("qwen2_5_vl", [4 + 8, 8], **given) == [[[1, 4, 4], [1, 8, 4]], [[1, 4, 8]]]
    assert towers("qwen2_5_vl", [4 + 8, 9], **given) is None, "other numbers of tokens"


def test_tiles_only_where_a_prompt_has_one_picture() -> None:
    """LLaVA-OneVision leaves pictures whole that share a prompt."""
    model = build("llava_onevision")
    size = [2 * model.config.vision_config.image_size] * 2
    alone, sharing = tiled(model.model, size, True), tiled(model.model, size, False)
    assert isinstance(alone.tower, int) and alone.tower > 1 and sharing.tower == 1
    given = {"image_sizes": torch.tensor([size] * 3), "batch_num_images": torch.tensor([1, 2])}
    visual = [alone.tokens, 2 * sharing.tokens]
    assert towers("llava_onevision", visual, pixel_values=torch.ones(1), **given) == [alone.tower, 2]


def test_processors_of_other_families() -> None:
    """InternVL puts all tiles in a row; which prompt has which follows from the tokens."""
    pictures: Any = [[picture(0, (640, 480))], [picture(1), picture(2, (28, 112))]]
    side = {"height": 28, "width": 28}
    internvl = transformers.GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
    inputs = internvl([image for row in pictures for image in row], return_tensors="pt")
    tiles = inputs["num_patches"].tolist()
    assert len(inputs["pixel_values"]) == sum(tiles) > 3
    visual = [4 * tiles[0], 4 * sum(tiles[1:])]
    assert towers("internvl", visual, pixel_values=inputs["pixel_values"]) == [tiles[0], sum(tiles[1:])]
