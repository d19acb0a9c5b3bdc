"""A prompt's pictures with its visual tokens: the kept patches in colour, or attention as a heat map.

Every block of a layout (pdrop/evaluation/pictures.py) is one view: a box of a picture under a grid of tokens. A picture
in tiles has two views, the whole picture squeezed and the tiles; several pictures, or the frames of a video, have one
or two each. The views of a prompt are arranged in one panel, row by row.

Images come from a parquet file with columns `image_id` and `image`, or a folder of images named by image id (several
pictures of one sample: ID-0, ID-1, ...). By default they are those that the store keeps of each task's first samples
(pdrop/thumbnails.py), or the embedded tasks' test split.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pdrop.pictures import as_shown
from pdrop.thumbnails import SAMPLES

from ..statistics import FloatArray
from ..store.samples import BoolArray, Layout, Sample

EMBEDDED = Path(str(files("pdrop"))) / "embedded" / "data" / "test.parquet"
BACKGROUND = (122, 116, 104)  # CLIP's mean colour, which pictures are padded with
OUTLINE = np.array([213, 94, 0]) / 255  # of what is kept: white on white would be lost
SIDE = 336  # pixels of a view, about
GAP = 8
UNKEPT = (
    f"none is kept of it (runs keep those of the first {SAMPLES} samples of each task): give the task's data a column "
    "image_id (a name per picture), make the run again with force=true, and pass the pictures with --images (a folder "
    "of files named so, or a parquet file)"
)


@dataclass(frozen=True)
class PictureView:
    """A grid of tokens over a part of a picture; `start` is its first token's number in the prompt."""

    picture: Image.Image
    rows: int
    columns: int
    newline: int
    start: int

    def cells(self, values: FloatArray | BoolArray) -> FloatArray:
        """The values of the grid's tokens without newlines, [rows, columns]."""
        wide = self.columns + self.newline
        held = np.asarray(values, dtype=np.float64)[self.start : self.start + self.rows * wide]
        return held.reshape(self.rows, wide)[:, : self.columns]


def views(sample: Sample, images: Sequence[Image.Image], image_mode: str) -> list[PictureView]:
    """The views of a sample's prompt.

    Args:
        sample: The sample, with its tokens and their places.
        images: Its pictures in order.
        image_mode: "crop" or "pad", for records from before layouts were stored.

    Raises:
        ValueError: If the tokens' places are not known, or these are not the prompt's pictures.
    """
    layout = sample.layout or square(sample, images, image_mode)
    if len(images) != len(layout):
        raise ValueError(f"{sample.doc_id}: {len(layout)} pictures were shown, {len(images)} are at hand")
    found, start = [], 0
    for image, blocks in zip(images, layout):
        for rows, columns, newline, *box in blocks:
            grid = int(rows), int(columns)
            if box[0] < box[2]:  # otherwise tokens without a place in it
                found.append(PictureView(crop(image, box, grid), *grid, int(newline), start))
            start += grid[0] * (grid[1] + int(newline))
    if start != sample.visual_tokens:
        raise ValueError(f"{sample.doc_id}: a layout of {start} tokens for {sample.visual_tokens}")
    return found


def square(sample: Sample, images: Sequence[Image.Image], image_mode: str) -> Layout:
    """The layout of one picture under one square grid, for records from before layouts were stored.

    Raises:
        ValueError: If the tokens do not form such a grid.
    """
    side, pictures = math.isqrt(sample.visual_tokens), max(1, sample.prompt.count("<image>"))
    if side * side != sample.visual_tokens or side == 0 or pictures > 1 or len(images) != 1:
        raise ValueError(
            f"{sample.visual_tokens} visual tokens of {pictures} image(s) are not a square grid over one image, and "
            "the record does not say where they are: run it again with force=true, or show another sample (--sample "
            "TASK:DOC_ID): tokens of a picture so narrow that its tiles have no width have no place"
        )
    width, height = images[0].size
    edge = max(width, height) if image_mode == "pad" else min(width, height)
    across, down = edge / width / 2, edge / height / 2
    return [[[side, side, 0, 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down]]]


def crop(image: Image.Image, box: Sequence[float], grid: tuple[int, int]) -> Image.Image:
    """The part of the picture under a grid [rows, columns], resized to whole pixels per token; padding outside."""
    edges = [round(edge * length) for edge, length in zip(box, (image.width, image.height) * 2)]
    part = Image.new("RGB", (max(1, edges[2] - edges[0]), max(1, edges[3] - edges[1])), BACKGROUND)
    part.paste(image, (-edges[0], -edges[1]))
    scale = max(1, round(SIDE / max(grid)))
    return part.resize((grid[1] * scale, grid[0] * scale))


def kept_panel(found: Sequence[PictureView], kept: BoolArray) -> FloatArray:
    """The views with dropped patches faded to grey and kept ones outlined, [height, width, 3] in 0..1."""
    return arranged([faded(view, view.cells(kept)) for view in found])


def faded(view: PictureView, kept: FloatArray) -> FloatArray:
    """One view, dropped patches faded."""
    pixels = np.asarray(view.picture, dtype=np.float64) / 255
    mask = spread(view, kept)
    grey = 0.22 * pixels.mean(axis=2, keepdims=True) + 0.78 * 0.58
    blend: FloatArray = mask * pixels + (1 - mask) * grey
    if not kept.all():
        blend[outline(mask[..., 0] > 0.5, max(1, round(view.picture.height / view.rows / 16)))] = OUTLINE
    return blend


def outline(mask: BoolArray, width: int) -> BoolArray:
    """The pixels of a mask [height, width] that are this near its edge, or the picture's."""
    inner = np.pad(mask, 1)
    for _ in range(width):
        around = [np.roll(inner, step, axis) for step in (-1, 1) for axis in (0, 1)]
        inner = inner & np.logical_and.reduce(around)
    edge: BoolArray = mask & ~inner[1:-1, 1:-1]
    return edge


def heat_panel(found: Sequence[PictureView], weights: FloatArray) -> FloatArray:
    """The views in grey under a heat map of the weights (at most 1), [height, width, 3] in 0..1."""
    from matplotlib import colormaps

    panels = []
    for view in found:
        grey = np.asarray(view.picture, dtype=np.float64).mean(axis=2, keepdims=True) / 255
        strength = np.sqrt(np.clip(spread(view, view.cells(weights)), 0, 1))  # small weights would not be seen
        heat = colormaps["inferno"](strength[..., 0])[..., :3]
        panels.append((1 - 0.75) * grey + 0.75 * heat)
    return arranged(panels)


def spread(view: PictureView, cells: FloatArray) -> FloatArray:
    """Each cell's value at all pixels of its patch, [height, width, 1]."""
    scale = view.picture.height // view.rows
    return np.kron(cells, np.ones((scale, scale))).astype(np.float64)[..., None]


def arranged(panels: Sequence[FloatArray]) -> FloatArray:
    """Several panels in one, row by row, about as wide as high; a white gap between them."""
    if len(panels) == 1:
        return panels[0]
    across = math.ceil(math.sqrt(len(panels)))
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    down = math.ceil(len(panels) / across)
    whole = np.ones((down * (height + GAP) - GAP, across * (width + GAP) - GAP, 3))
    for number, panel in enumerate(panels):
        top, left = (number // across) * (height + GAP), (number % across) * (width + GAP)
        whole[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return whole


def read_images(
    source: Path | None, image: str | None, what: str, number: int = 1, kept: Sequence[bytes] = ()
) -> list[Image.Image]:
    """The pictures of a sample, RGB.

    Args:
        source: Parquet file or folder; None: those kept in the store, or the embedded test split.
        image: The sample's image id.
        what: Names the sample in errors.
        number: How many pictures it has. The embedded clips show one picture in every frame.
        kept: Files of the pictures that the store keeps of it.

    Raises:
        ValueError: If they are not found.
    """
    if source is None and kept:
        return [as_shown(Image.open(io.BytesIO(file))) for file in kept]
    if image is None:
        raise ValueError(f"{what} names no image, and {UNKEPT}")
    path = source or EMBEDDED
    if path.is_dir():
        wanted = [image] if number == 1 else [f"{image}-{n}" for n in range(number)]
        found = {file.stem: file for file in path.iterdir() if file.stem in wanted}
        if missing := [name for name in wanted if name not in found]:
            named = "files are named by the data's column image_id; without one, by a hash that only runs know"
            raise ValueError(f"{what}: no image named {', '.join(missing)} in {path}: {named}")
        return [as_shown(Image.open(found[name])) for name in wanted]
    if not path.is_file():
        raise ValueError(f"{path} is neither a parquet file nor a folder of images: give --images")
    frame = pd.read_parquet(path, columns=["image_id", "image"], filters=[("image_id", "==", image)])
    if frame.empty:
        raise ValueError(f"{what}: no image_id {image} in {path}" + (f", and {UNKEPT}" if source is None else ""))
    if number > 1 and path != EMBEDDED:
        raise ValueError(f"{what} has {number} pictures: give --images as a folder with {image}-0, {image}-1, ...")
    return [as_shown(Image.open(io.BytesIO(frame.iloc[0]["image"]["bytes"])))] * number
