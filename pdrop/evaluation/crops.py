"""What of each prompt goes through the vision tower: what its FLOPs depend on, beside the tokens.

The number of visual tokens does not tell: LLaVA-NeXT cuts the features of padding away after the tower, and Qwen's
towers attend within each image, so that two small ones cost less than a large one of as many tokens. Read from what
the processor made, whose layouts are few, not from the kind of model:

    image_grid_thw [images, 3]                      a tower of any size: frames, height and width in patches
    pixel_values [images, tiles, channels, h, w]    tiles of a fixed size, as many as the largest image has; the others
                                                    are filled up with zeros, which no model computes on
    pixel_values [images or tiles, channels, h, w]  crops of a fixed size, each of as many tokens

    seen(inputs, images=[1, 2], visual=[576, 1152])     # one LLaVA-1.5 prompt with one image, one with two: [1, 2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from pdrop.evaluation.answers import Seen

Entry = TypeVar("Entry")


def seen(inputs: Mapping[str, Any], images: Sequence[int], visual: Sequence[int]) -> list[Seen]:
    """For each prompt of a batch the number of its crops, or the grids of its images.

    Args:
        inputs: What the processor made of the batch, images in the order of their prompts.
        images: Number of images of each prompt.
        visual: Number of visual tokens of each prompt.

    Returns:
        One entry per prompt: crops, or [frames, height, width] in patches for each image; None where the layout of
        `pixel_values` is none of the above.
    """
    if not any(images):
        return [0] * len(images)
    if "image_grid_thw" in inputs:
        grids: list[list[int]] = inputs["image_grid_thw"].tolist()
        return list(shares(grids, images)) if len(grids) == sum(images) else [None] * len(images)
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim not in (4, 5):
        return [None] * len(images)
    if pixels.ndim == 5:
        tiles = (pixels != 0).flatten(2).any(2).sum(1).tolist()
        if len(tiles) == sum(images):
            return [sum(share) for share in shares(tiles, images)]
        return list(tiles) if len(tiles) == len(images) else [None] * len(images)
    if len(pixels) == sum(images):
        return list(images)
    if any(len(pixels) * tokens % sum(visual) for tokens in visual):
        return [None] * len(images)
    return [len(pixels) * tokens // sum(visual) for tokens in visual]


def shares(entries: Sequence[Entry], counts: Sequence[int]) -> list[list[Entry]]:
    """The entries of each prompt, of which there are so many, in a row."""
    return [list(entries[start:end]) for start, end in pairwise([0, *accumulate(counts)])]
