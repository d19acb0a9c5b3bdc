"""For each answered prompt: what went through the vision tower, and where its visual tokens are in the pictures.

Both are read by pdrop/engine/pictures.py from the processor's output, as for a method.
FLOPs need the first: LLaVA-NeXT cuts the features of padding away after the tower, and Qwen's towers attend within each
image, so that two small images cost less than a large one with equally many tokens. Overlays need the second.

A layout has one entry per picture: a list of blocks in the order of their tokens. A block is

    [rows, columns, newline, left, top, right, bottom]

a grid of rows x columns tokens over a box of the picture (in fractions of the task's own picture; padding is outside
0..1), each row followed by a newline token if `newline` is 1. LLaVA-1.5: one square block. LLaVA-NeXT and OneVision:
the whole picture squeezed into a square, then the tiles' rows with their newlines. Qwen: one block of the picture's
shape. A layout that blocks cannot express (class tokens, a lone newline, tiles that were not joined) is None. Each
frame of a video (for Qwen: each pair) is a separate entry, before those of pictures; there, a token without a place in
the frame (a class token, the newline that ends a video) is a block of one in an empty box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pdrop.engine.pictures import SeenPicture, UnknownLayout, read_pictures
from pdrop.engine.visual import visual_tokens
from pdrop.evaluation.answers import Seen
from pdrop.methods.layout import TokenGrid

Block = list[float]
Layout = list[list[Block]]
WHOLE, NOWHERE = [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]


def pictures_of(model: Any, inputs: Mapping[str, Any]) -> list[list[SeenPicture]] | None:
    """The pictures of each prompt of a batch; None where their layout is not known.

    Args:
        model: A vision-language model.
        inputs: The processor's output for the batch, with `input_ids` [B, L].
    """
    ids = inputs["input_ids"]
    visual = visual_tokens(ids, inputs, model.config)
    if (mask := inputs.get("attention_mask")) is not None:
        visual = visual & mask.bool()
    try:
        return read_pictures(model, inputs, ids, visual)
    except UnknownLayout:
        return None


def tower_of(pictures: Sequence[SeenPicture]) -> Seen:
    """What goes through the tower for a prompt's pictures: a number of crops, or each image's grid in patches."""
    grids = [list(picture.tower) for picture in pictures if not isinstance(picture.tower, int)]
    return grids or sum(picture.tower for picture in pictures if isinstance(picture.tower, int))


def layout_of(
    pictures: Sequence[SeenPicture],
    sizes: Sequence[tuple[int, int]],
    image_mode: str,
    cropped: bool,
    videos: Sequence[tuple[tuple[int, int], int]] = (),
    frames_cropped: bool = False,
) -> Layout | None:
    """Where the visual tokens of a prompt are in its pictures; None if blocks cannot express it.

    Args:
        pictures: As read by `pictures_of`.
        sizes: (width, height) of the task's own pictures.
        image_mode: "crop" or "pad"; frames of videos are never padded.
        cropped: Whether the processor cuts a square out of the middle.
        videos: (width, height) and number of frames of the videos, which come before the pictures.
        frames_cropped: Whether the processor cuts a square out of the middle of their frames.
    """
    left = list(pictures)
    layout: Layout = []
    # a video is read as one picture, or as a picture per frame
    apart = len(pictures) == len(sizes) + sum(count for _, count in videos)
    for (width, height), count in videos:
        for _ in range(min(len(left), count if apart else 1)):
            layout += frames_of(left.pop(0).grids or [], seen_box(width, height, "crop", frames_cropped))
    if len(left) != len(sizes):
        return None
    for picture, (width, height) in zip(left, sizes):
        square = picture.tower == 1 and len(picture.grids or ()) == 1
        box = seen_box(width, height, image_mode, cropped) if square else WHOLE
        blocks = blocks_of(picture.grids or [], box)
        if blocks is None:
            return None
        layout.append(blocks)
    return layout


def frames_of(grids: Sequence[TokenGrid], box: list[float]) -> Layout:
    """The blocks of each frame of a video; other tokens belong to the next frame, or after all frames to the last."""
    frames: Layout = []
    lone: list[Block] = []
    whole = any(grid.height * grid.width > 1 for grid in grids)
    for grid in grids:
        if whole and grid.height * grid.width == 1:
            lone.append([grid.height, grid.width, 0, *NOWHERE])
        else:
            frames.append([*lone, [grid.height, grid.width, grid.stride - grid.width, *box]])
            lone = []
    if frames:
        frames[-1] += lone
    return frames


def blocks_of(grids: Sequence[TokenGrid], box: list[float]) -> list[Block] | None:
    """A picture's grids as blocks; None if a grid is neither a part of the picture nor the newlines of one."""
    blocks: list[Block] = []
    for place, grid in enumerate(grids):
        before = grids[place - 1] if place else None
        if before is not None and before.stride > before.width and grid.first == before.first + before.width:
            continue  # the column of newlines that ends its rows
        lone = grid.width == grid.stride == 1 and len(grids) > 1  # class tokens, newlines without a row
        if lone or grid.stride - grid.width not in (0, 1):
            return None
        blocks.append([grid.height, grid.width, grid.stride - grid.width, *box])
    return blocks


def seen_box(width: int, height: int, image_mode: str, cropped: bool) -> list[float]:
    """The part of the picture that fills the tower's square, in fractions of the picture."""
    if image_mode != "pad" and not cropped:
        return WHOLE
    side = max(width, height) if image_mode == "pad" else min(width, height)
    across, down = side / width / 2, side / height / 2
    return [round(edge, 6) for edge in (0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down)]
