"""Boards: plates of different colours, each with a code. They are used for training only: an image holds many words to
read, where a scene has one sign."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .drawing import FONTS, Canvas, draw_text, font, jitter, text_width
from .questions import EmbeddedQuestion
from .scenes import Level, background, random_code
from .vocabulary import COLOR_NAMES, COLORS, IMAGE_SIZE, PATCH_SIZE, SHAPES

_ROWS, _COLUMNS = 5, 2  # places for plates
_BRIGHT = 130  # luma of a colour, the channels weighted as the eye sees them; on brighter plates the ink is dark


@dataclass(frozen=True)
class Board:
    """What was drawn: (colour of the plate, code)."""

    plates: tuple[tuple[str, str], ...]


def draw_board(rng: random.Random, level: Level) -> tuple[Canvas, Board]:
    """Two to six plates in a loose grid."""
    canvas = Canvas(background(rng))
    places = rng.sample(range(_ROWS * _COLUMNS), rng.randint(*level.plates))
    wide, high = IMAGE_SIZE / _COLUMNS, IMAGE_SIZE / _ROWS
    plates = []
    for place, color in zip(places, rng.sample(COLOR_NAMES, len(places))):
        code, face = random_code(rng, level.characters), font(rng.choice(FONTS), rng.randint(18, 24))
        pitch = rng.uniform(PATCH_SIZE, PATCH_SIZE + 3)
        width, height = text_width(code, face, 1, pitch), rng.uniform(25, 29)
        x = place % _COLUMNS * wide + rng.uniform(4, max(5.0, wide - width - 4))
        y = place // _COLUMNS * high + rng.uniform(height / 2 + 1, high - height / 2 - 1)
        box = (x - 3, y - height / 2, min(x + width + 3, IMAGE_SIZE - 1), y + height / 2)
        fill = jitter(COLORS[color], rng)
        canvas.pen.rectangle(box, fill=fill)
        canvas.mark("shape", box, len(SHAPES) + 1)
        canvas.mark("color", box, COLOR_NAMES.index(color) + 1)
        bright = 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] > _BRIGHT
        draw_text(canvas, code, x, y, face, (15, 15, 20) if bright else (250, 250, 250), 1, pitch=pitch)
        plates.append((color, code))
    return canvas, Board(tuple(plates))


def board_questions(board: Board, rng: random.Random) -> list[EmbeddedQuestion]:
    """Each plate's code by its colour."""
    asked = "what does the {} sign say ?"
    found = [EmbeddedQuestion("reading", asked.format(color), code) for color, code in board.plates]
    rng.shuffle(found)
    return found
