"""The condition of published LLaVA-NeXT numbers, from a checkpoint's folder: 2 x 2 tiles always, nothing cut away.

pytest tests/methods/test_two_by_two.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from pdrop import (
    SCOPE,
    DivPrune,
    FasterVLM,
    HiPrune,
    HiRED,
    HoloV,
    PruMerge,
    Schedule,
    Stage,
    VisionZip,
    VisPruner,
    attach,
    single,
    solve,
)
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.shapes import PromptSize
from tests.support.saved_checkpoints import save_llava_next

SIDE, TILE = 4, 16  # of a tile, in patches
SHAPES = [(100, 30), (30, 100), (64, 64), (28, 28)]


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Model and processor of a folder whose only grid is 2 x 2 tiles."""
    folder: Path = save_llava_next(tmp_path_factory.mktemp("two") / "next")
    files = [path for path in folder.glob("*.json") if "image_grid_pinpoints" in path.read_text()]
    assert len(files) == 2, "config.json and the processor's"
    for path in files:
        written = json.loads(path.read_text())
        for part in (written, written.get("image_processor", {})):
            if "image_grid_pinpoints" in part:
                part["image_grid_pinpoints"] = [[56, 56]]
        path.write_text(json.dumps(written))
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_picture_has_five_whole_tiles(two_by_two: tuple[Any, Any], shape: tuple[int, int]) -> None:
    """Five tiles and a newline per row, whatever the shape; each tile keeps the same number, newlines go."""
    model, processor = two_by_two
    builder = PromptBuilder(processor, "chat", "pad")
    inputs = builder.encode([builder.render("What?", 1)], [[Image.new("RGB", shape, (200, 30, 90))]])
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert visual == 5 * TILE + 2 * SIDE, "16 of the small picture, 8 rows of 8 and a newline"
    with torch.no_grad(), attach(model, FasterVLM(), Schedule((Stage(0, keep=0.25),))) as trace:
        model(**inputs)
    kept = trace.kept[0][0].tolist()
    assert len(kept) == 5 * 4
    rows = [(n - TILE) % (2 * SIDE + 1) for n in kept if n >= TILE]
    assert sum(n < TILE for n in kept) == 4 and all(column < 2 * SIDE for column in rows), "a newline stayed"
    quarters = [((n - TILE) // (2 * SIDE + 1) // SIDE, c // SIDE) for n, c in zip((n for n in kept if n >= TILE), rows)]
    assert {quarter: quarters.count(quarter) for quarter in quarters} == {(a, b): 4 for a in (0, 1) for b in (0, 1)}


@pytest.mark.parametrize(("ratio", "each"), [(0.21858, 128), (0.10929, 64), (0.054645, 32)])
def test_the_numbers_of_published_tables(ratio: float, each: int) -> None:
    """640, 320 and 160 of five tiles of 576, by the ratios that the pages name: shares of 2928 tokens."""
    prompt = PromptSize(60, 5 * 576 + 48, images=5)
    for method in (FasterVLM(), VisionZip(), VisPruner(), SCOPE(), HiRED(), HoloV(), PruMerge(), HiPrune(), DivPrune()):
        assert method.entering(single(0, ratio), prompt, 32) == [5.0 * each] * 32
        solved = solve(method, f"avg_tokens:{5 * each}", num_layers=32, visual_tokens=prompt.visual, images=5)
        assert method.entering(solved, prompt, 32) == [5.0 * each] * 32


def test_an_unpadded_picture_is_cut(two_by_two: tuple[Any, Any]) -> None:
    """Why image_mode=pad is part of the condition."""
    model, processor = two_by_two
    builder = PromptBuilder(processor, "chat", "crop")
    inputs = builder.encode([builder.render("What?", 1)], [[Image.new("RGB", (100, 30))]])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) < 5 * TILE + 2 * SIDE
