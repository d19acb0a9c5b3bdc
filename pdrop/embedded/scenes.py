"""Scenes: a few coloured shapes, often with a sign that shows a code."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .drawing import FONTS, Box, Canvas, Color, draw_shape, draw_text, font, jitter, text_width
from .vocabulary import COLOR_NAMES, COLORS, DIGITS, IMAGE_SIZE, LETTERS, PATCH_SIZE, SHAPES

_BACKGROUNDS: tuple[Color, ...] = (
    (255, 255, 255),
    (245, 245, 245),
    (235, 240, 245),
    (250, 245, 232),
    (222, 232, 224),
    (228, 224, 236),
)


@dataclass(frozen=True)
class Level:
    """How hard the images are; the defaults are the benchmark's distribution, smaller values are for warm-ups."""

    objects: tuple[int, int] = (2, 6)
    distinct: bool = False  # no colour and no shape twice in a scene, and no sign
    sign: float = 0.7  # probability of a sign
    characters: tuple[int, int] = (3, 4)  # length of a code
    rows: tuple[int, int] = (3, 5)  # lines of a document
    bars: tuple[int, int] = (3, 5)
    plates: tuple[int, int] = (2, 6)  # signs of a board


@dataclass(frozen=True)
class Thing:
    """One shape: `x`, `y` its middle and `size` its width, in pixels."""

    color: str
    shape: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        """For example "red star"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What was drawn: the things, and the sign's code ("" for none)."""

    things: tuple[Thing, ...]
    sign: str = ""


def random_code(rng: random.Random, length: tuple[int, int]) -> str:
    """A code of `length` (least, most) characters: digits (45 %), letters (45 %) or both."""
    count, kind = rng.randint(*length), rng.random()
    if kind < 0.45:
        return rng.choice(DIGITS[1:]) + "".join(rng.choice(DIGITS) for _ in range(count - 1))
    alphabet = LETTERS if kind < 0.9 else LETTERS + DIGITS
    return "".join(rng.choice(alphabet) for _ in range(count))


def background(rng: random.Random) -> Color:
    return jitter(rng.choice(_BACKGROUNDS), rng, 8)


def _draw_sign(canvas: Canvas, rng: random.Random, code: str) -> Box:
    """Draws the code, with or without a plate, and returns the box it covers."""
    face, gap = font(rng.choice(FONTS), rng.randint(20, 26)), rng.choice([1, 2, 3])
    pitch = rng.uniform(PATCH_SIZE, PATCH_SIZE + 4)
    width, height = text_width(code, face, gap, pitch), face.size * 1.1
    x = rng.uniform(6, IMAGE_SIZE - width - 6)
    y = rng.uniform(height / 2 + 5, IMAGE_SIZE - height / 2 - 5)
    box = (x - 5, y - height / 2 - 2, x + width + 4, y + height / 2 + 2)
    look = rng.random()
    if look < 0.5:
        canvas.pen.rectangle(box, fill=jitter((250, 250, 250), rng, 5), outline=(60, 60, 60), width=2)
        ink = jitter((20, 20, 20), rng, 20)
    elif look < 0.75:
        canvas.pen.rectangle(box, fill=jitter((45, 50, 60), rng, 25))
        ink = jitter((245, 245, 245), rng, 10)
    else:
        ink = jitter((30, 30, 40), rng, 25)
    canvas.mark("shape", box, len(SHAPES) + 1)
    draw_text(canvas, code, x, y, face, ink, gap, pitch=pitch)
    return box


def draw_scene(rng: random.Random, level: Level) -> tuple[Canvas, Scene]:
    """Draw shapes (and a sign) at random places where no two overlap."""
    canvas = Canvas(background(rng))
    taken: list[Box] = []
    sign = ""
    if not level.distinct and rng.random() < level.sign:
        sign = random_code(rng, level.characters)
        taken.append(_draw_sign(canvas, rng, sign))
    count = rng.randint(*level.objects)
    if level.distinct:
        looks = list(zip(rng.sample(COLOR_NAMES, count), rng.sample(SHAPES, count)))
    else:
        # Few colours or few shapes make counting harder, and wrong names more plausible.
        colors = rng.sample(COLOR_NAMES, rng.randint(2, 4)) if rng.random() < 0.35 else list(COLOR_NAMES)
        shapes = rng.sample(SHAPES, rng.randint(1, 3)) if rng.random() < 0.35 else list(SHAPES)
        looks = [(rng.choice(colors), rng.choice(shapes)) for _ in range(count)]
    things = []
    for color, shape in looks:
        place = _free_place(rng, taken)
        if place is None:
            continue
        x, y, size = place
        box = (x - size / 2, y - size / 2, x + size / 2, y + size / 2)
        taken.append(box)
        draw_shape(canvas, shape, x, y, size, jitter(COLORS[color], rng))
        canvas.mark("shape", box, SHAPES.index(shape) + 1)
        canvas.mark("color", box, COLOR_NAMES.index(color) + 1)
        things.append(Thing(color, shape, x, y, size))
    return canvas, Scene(tuple(things), sign)


def _free_place(rng: random.Random, taken: list[Box]) -> tuple[float, float, float] | None:
    """(x, y, size) of a square that keeps 3 pixels from all boxes, or None after 40 tries."""
    for _ in range(40):
        size = rng.uniform(26, 42)
        half = size / 2
        x, y = (rng.uniform(half + 3, IMAGE_SIZE - half - 3) for _ in range(2))
        if all(
            x + half + 3 < left or x - half - 3 > right or y + half + 3 < top or y - half - 3 > bottom
            for left, top, right, bottom in taken
        ):
            return x, y, size
    return None
