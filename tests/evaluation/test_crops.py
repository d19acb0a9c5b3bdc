"""What went through the vision tower: counted from what processors make, and right to the last FLOP.

pytest tests/evaluation/test_crops.py
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import cost
from pdrop.engine import attach
from pdrop.evaluation.answers import Question
from pdrop.evaluation.crops import seen
from pdrop.evaluation.generation import Respondent
from pdrop.evaluation.prompts import Prompter
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.models.checkpoint import load
from pdrop.schedule import Schedule, pyramid
from pdrop.shapes import ModelSizes
from tests.support.saved_checkpoints import LAYERS, VISUAL_TOKENS, save_llava, save_llava_next, save_qwen2_5_vl
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
    prompter = Prompter(checkpoint.processor)
    questions, counted = [], []
    for number, row in enumerate(sizes):
        pictures = [picture(place, size) for place, size in enumerate(row)]
        questions.append(Question("task", number, 0, "What is it?", images=functools.partial(list, pictures)))
        inputs = prompter.encode([prompter.render("What is it?", len(row))], [pictures])
        with attach(checkpoint.model, method, schedule):
            counted.append(counted_prefill_flops(checkpoint.model, inputs)["total"])
    arch = ModelSizes.from_config(checkpoint.model.config)
    for batch_size in (1, 3):
        respondent = Respondent(checkpoint, method, schedule, spec_of(batch_size=batch_size, max_new_tokens=1))
        answers = respondent.answer(questions).answers
        assert [answer.images for answer in answers] == expected
        for answer, flops in zip(answers, counted):
            found = cost(arch, [answer.size], schedule, method, 4)
            assert found.prefill_flops == pytest.approx(flops, rel=1e-6)


def test_layouts() -> None:
    assert seen({}, [0, 0], [0, 0]) == [0, 0], "text alone"
    tiles = torch.ones(3, 5, 3, 2, 2)
    tiles[0, 3:] = 0
    tiles[2, 1:] = 0
    assert seen({"pixel_values": tiles}, [1, 2], [40, 70]) == [3, 6], "LLaVA-NeXT: one row per image"
    assert seen({"pixel_values": tiles}, [2, 1, 3], [40, 20, 60]) == [3, 5, 1], "Idefics: one row per prompt"
    flat = torch.ones(8, 3, 2, 2)
    assert seen({"pixel_values": flat}, [1, 2], [4, 28]) == [1, 7], "InternVL: all tiles in a row"
    assert seen({"pixel_values": flat}, [3, 5], [3 * VISUAL_TOKENS, 5 * VISUAL_TOKENS]) == [3, 5]
    assert seen({"pixel_values": flat}, [1, 2], [5, 28]) == [None, None], "tiles of unequal size"
    assert seen({"pixel_values": flat[0, 0]}, [1], [4]) == [None] and seen({}, [1], [4]) == [None]
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 8, 4], [1, 4, 8]])}
    assert seen(grids, [2, 1], [12, 8]) == [[[1, 4, 4], [1, 8, 4]], [[1, 4, 8]]]


def test_processors_of_other_families() -> None:
    """LLaVA-OneVision cuts tiles only where a prompt has one picture; InternVL puts all tiles in a row."""
    pictures: Any = [[picture(0, (640, 480))], [picture(1), picture(2, (28, 112))]]
    side = {"height": 28, "width": 28}
    onevision = transformers.LlavaOnevisionImageProcessorPil(
        size=side, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    )
    inputs = onevision(pictures, return_tensors="pt")
    assert inputs["pixel_values"].shape[:2] == (3, 5)
    assert seen(inputs, [1, 2], [100, 32]) == [5, 2]
    internvl = transformers.GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
    inputs = internvl([image for row in pictures for image in row], return_tensors="pt")
    tiles = inputs["num_patches"].tolist()
    assert len(inputs["pixel_values"]) == sum(tiles) > 3
    assert seen(inputs, [1, 2], [4 * tiles[0], 4 * sum(tiles[1:])]) == [tiles[0], sum(tiles[1:])]
