"""Draws for the corpus: shapes, text, and the map of what each patch shows.

Only fonts that are part of Pillow and matplotlib are used, so the same package versions draw the same pixels on every
machine.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import CHARACTERS, COLOR_NAMES, GRID, IMAGE_SIZE, LABELS, PATCH_SIZE, SHAPES

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

FONTS = ("pillow", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")
MAPS = ("shape", "color", "character", "place", "label", "height")

# One classification head of the vision tower's pre-training per entry: name -> number of classes (class 0: nothing).
PATCH_HEADS = {
    "shape": len(SHAPES) + 2,  # the last class is a sign
    "color": len(COLOR_NAMES) + 1,
    "character": len(CHARACTERS) + 1,
    "place": 8,  # place of the character in its word, from 1
    "label": len(LABELS) + 1,  # which document label the row belongs to
    "height": 10,  # value of the bar, 1 to 9
    "row": GRID + 1,  # where the patch itself is, from 1: otherwise the tower forgets it
    "column": GRID + 1,
}


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font by file name at `size` pixels; "pillow" is Pillow's own."""
    if name == "pillow":
        loaded = ImageFont.load_default(size)
        if not isinstance(loaded, ImageFont.FreeTypeFont):
            raise ValueError("this Pillow was built without FreeType; the corpus needs scalable fonts")
        return loaded
    import matplotlib

    folder = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / name), size)


def jitter(color: Color, rng: random.Random, amount: int = 14) -> Color:
    """The colour with each channel moved by up to `amount`."""
    r, g, b = (max(0, min(255, channel + rng.randint(-amount, amount))) for channel in color)
    return r, g, b


@dataclass
class Canvas:
    """An image being drawn, with integer maps of the same size that say what is where.

    `maps[name]` is uint8 (IMAGE_SIZE, IMAGE_SIZE); 0 means nothing. `patch_labels` reads them at the centres of the
    patches; only the vision tower's pre-training uses them.
    """

    background: Color
    image: Image.Image = field(init=False)
    pen: ImageDraw.ImageDraw = field(init=False)
    maps: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self.background)
        self.pen = ImageDraw.Draw(self.image)
        self.maps = {name: np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8) for name in MAPS}

    def mark(self, name: str, box: Box, value: int) -> None:
        """Writes `value` into the map `name` inside the box (left, top, right, bottom), in pixels."""
        left, top, right, bottom = (max(0, round(edge)) for edge in box)
        self.maps[name][top:bottom, left:right] = value

    def patch_labels(self) -> np.ndarray:
        """uint8 (len(PATCH_HEADS), VISUAL_TOKENS): the class of each patch for each head, row by row."""
        middle = np.arange(GRID) * PATCH_SIZE + PATCH_SIZE // 2
        heads = [self.maps[name][np.ix_(middle, middle)] for name in MAPS]
        heads += list(np.indices((GRID, GRID), np.uint8) + 1)
        return np.stack(heads).reshape(len(PATCH_HEADS), -1)

    def pixels(self) -> np.ndarray:
        """uint8 (IMAGE_SIZE, IMAGE_SIZE, 3)."""
        return np.asarray(self.image)


def draw_shape(canvas: Canvas, shape: str, x: float, y: float, size: float, color: Color) -> None:
    """One of SHAPES, centred on (x, y), about `size` pixels wide."""
    pen, half = canvas.pen, size / 2
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "square":
        half *= 0.9
        pen.rectangle((x - half, y - half, x + half, y + half), fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - half), (x + half, y + half * 0.85), (x - half, y + half * 0.85)], fill=color)
    elif shape == "diamond":
        pen.polygon([(x, y - half * 1.1), (x + half * 0.8, y), (x, y + half * 1.1), (x - half * 0.8, y)], fill=color)
    elif shape == "star":
        points = []
        for tip in range(10):
            angle = -math.pi / 2 + tip * math.pi / 5
            radius = half * (1.1 if tip % 2 == 0 else 0.45)
            points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
        pen.polygon(points, fill=color)
    elif shape == "cross":
        arm = half * 0.36
        pen.rectangle((x - half, y - arm, x + half, y + arm), fill=color)
        pen.rectangle((x - arm, y - half, x + arm, y + half), fill=color)
    elif shape == "ring":
        pen.ellipse((x - half, y - half, x + half, y + half), outline=color, width=max(3, int(half * 0.42)))
    elif shape == "heart":
        lobe = half * 1.1
        pen.ellipse((x - half, y - half * 0.9, x - half + lobe, y - half * 0.9 + lobe), fill=color)
        pen.ellipse((x + half - lobe, y - half * 0.9, x + half, y - half * 0.9 + lobe), fill=color)
        pen.polygon(
            [(x - half * 0.93, y - half * 0.12), (x + half * 0.93, y - half * 0.12), (x, y + half)],
            fill=color,
        )
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def text_width(text: str, face: ImageFont.FreeTypeFont, gap: int, pitch: float = 0.0) -> float:
    """Pixels that `draw_text` will need."""
    return sum(max(pitch, face.getlength(character) + gap) for character in text)


def draw_text(
    canvas: Canvas,
    text: str,
    x: float,
    y: float,
    face: ImageFont.FreeTypeFont,
    color: Color,
    gap: int = 1,
    label: int = 0,
    numbered: bool = True,
    pitch: float = 0.0,
) -> float:
    """Draws character by character from the left end x, vertically centred on y; returns the right end.

    Each character is centred in a cell of at least `pitch` pixels. For codes that is PATCH_SIZE or more, so that each
    character covers the centre of some patch: a patch that shows halves of two characters cannot be read.
    `label` (a class of the "label" head) is marked where the text is; `numbered` marks each character's place.
    """
    half = face.size * 0.5
    for place, character in enumerate(text, start=1):
        width = max(pitch, face.getlength(character) + gap)
        canvas.pen.text((x + width / 2, y), character, fill=color, font=face, anchor="mm")
        box = (x, y - half, x + width, y + half)
        canvas.mark("character", box, CHARACTERS.index(character) + 1)
        if numbered:
            canvas.mark("place", box, min(place, 7))
        if label:
            canvas.mark("label", box, label)
        x += width
    return x
