"""Where in the pictures each visual token of a prompt comes from, so that what was kept can be drawn over them.

A layout has one entry per picture: its blocks in the order of their tokens. A block is

    [rows, columns, newline, left, top, right, bottom]

a grid of rows x columns tokens over a box of the picture (fractions of the task's own picture; padding lies outside
of 0..1), each row followed by a newline token if `newline` is 1. LLaVA-1.5: one square block. LLaVA-NeXT and
OneVision: the whole picture squeezed into a square, then the tiles' rows with their newlines. Qwen: one block of the
picture's shape.

Read from what the processor made, as in crops.py; a layout whose tokens do not add up to the prompt's is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pdrop.evaluation.crops import shares

if TYPE_CHECKING:
    from PIL.Image import Image

Block = list[float]
Layout = list[list[Block]]
WHOLE = [0.0, 0.0, 1.0, 1.0]


def layouts(
    config: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    images: Sequence[Sequence[Image]],
    visual: Sequence[int],
    image_mode: str,
) -> list[Layout | None]:
    """The layout of each prompt of a batch; None where it is not known.

    Args:
        config: The model's.
        processor: The checkpoint's: whether it crops.
        inputs: What it made of the batch, images in the order of their prompts.
        images: The task's pictures of each prompt.
        visual: Number of visual tokens of each prompt.
        image_mode: "crop" or "pad".
    """
    counts = [len(pictures) for pictures in images]
    flat = [picture for pictures in images for picture in pictures]
    blocks: list[list[Block]] | None
    if "image_grid_thw" in inputs:
        blocks = grids(inputs["image_grid_thw"].tolist(), sum(visual), len(flat))
    elif "image_sizes" in inputs and hasattr(config, "image_grid_pinpoints"):
        blocks = tiles(config, inputs["image_sizes"].tolist())
    else:
        blocks = squares(flat, sum(visual), image_mode, bool(getattr(processor.image_processor, "do_center_crop", 0)))
    if blocks is None or len(blocks) != len(flat):
        return [None] * len(counts)
    return [
        layout if sum(map(tokens, (block for picture in layout for block in picture))) == expected else None
        for layout, expected in zip(shares(blocks, counts), visual)
    ]


def tokens(block: Block) -> int:
    """How many tokens a block has."""
    rows, columns, newline = (int(number) for number in block[:3])
    return rows * (columns + newline)


def squares(images: Sequence[Image], visual: int, image_mode: str, cropped: bool) -> list[list[Block]] | None:
    """One square per picture, all of one size: over the padded picture, its middle, or all of it, squeezed."""
    side = math.isqrt(visual // len(images)) if images else 0
    if not side or side * side * len(images) != visual:
        return None
    return [[[side, side, 0, *seen_box(image.width, image.height, image_mode, cropped)]] for image in images]


def seen_box(width: int, height: int, image_mode: str, cropped: bool) -> list[float]:
    """The part of the picture that fills the tower's square, in fractions of the picture."""
    if image_mode != "pad" and not cropped:
        return WHOLE
    side = max(width, height) if image_mode == "pad" else min(width, height)
    across, down = side / width / 2, side / height / 2
    return [round(edge, 6) for edge in (0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down)]


def grids(patches: Sequence[Sequence[int]], visual: int, images: int) -> list[list[Block]] | None:
    """Towers of any size: frames x height x width in patches, of which a square of merge x merge makes a token."""
    everything = sum(math.prod(grid) for grid in patches)
    merge = math.isqrt(everything // visual) if visual else 0
    if len(patches) != images or not merge:
        return None
    return [[[height // merge, width // merge, 0, *WHOLE] for _ in range(frames)] for frames, height, width in patches]


def tiles(config: Any, sizes: Sequence[Sequence[int]]) -> list[list[Block]]:
    """Any-resolution tiles: the squeezed picture, then the tiles without their padding, one newline token per row."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    found = []
    for size in sizes:
        down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tower.image_size)
        shape = unpad_image(torch.empty(1, down * side, across * side), size).shape
        found.append([[side, side, 0, *WHOLE], [*shape[1:], 1, *WHOLE]])
    return found
