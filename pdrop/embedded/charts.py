"""Bar charts: bars of different colours with whole values from 1 to 9."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .drawing import Canvas, font, jitter
from .questions import EmbeddedQuestion, as_choice, yes_no
from .scenes import Level
from .vocabulary import COLOR_NAMES, COLORS, IMAGE_SIZE


@dataclass(frozen=True)
class Chart:
    """What was drawn, left to right: (colour, value)."""

    bars: tuple[tuple[str, int], ...]


def draw_chart(rng: random.Random, level: Level) -> tuple[Canvas, Chart]:
    """Draw three to five bars over an axis with lines at 0, 3, 6 and 9."""
    canvas = Canvas(jitter((252, 252, 252), rng, 3))
    pen, count = canvas.pen, rng.randint(*level.bars)
    colors = rng.sample(COLOR_NAMES, count)
    values = [rng.randint(1, 9) for _ in range(count)]
    left, bottom, top = 26, IMAGE_SIZE - 14, 12
    unit, face = (bottom - top) / 9.5, font("pillow", 12)
    for value in range(0, 10, 3):
        y = bottom - value * unit
        pen.line([left, y, IMAGE_SIZE - 4, y], fill=(200, 200, 200), width=1)
        pen.text((left - 5, y), str(value), fill=(40, 40, 40), font=face, anchor="rm")
    pen.line([left, top - 4, left, bottom], fill=(40, 40, 40), width=2)
    pen.line([left, bottom, IMAGE_SIZE - 4, bottom], fill=(40, 40, 40), width=2)
    pitch = (IMAGE_SIZE - left - 10) / count
    width = pitch * rng.uniform(0.62, 0.85)
    for number, (color, value) in enumerate(zip(colors, values)):
        x, y = left + 5 + number * pitch + (pitch - width) / 2, bottom - value * unit
        pen.rectangle((x, y, x + width, bottom - 1), fill=jitter(COLORS[color], rng))
        canvas.mark("color", (x, y, x + width, bottom), COLOR_NAMES.index(color) + 1)
        canvas.mark("height", (x, y, x + width, bottom), value)
    return canvas, Chart(tuple(zip(colors, values)))


def chart_questions(chart: Chart, rng: random.Random) -> list[EmbeddedQuestion]:
    """Ask for values, extremes and comparisons (chart), neighbours (multihop), presence, number of bars, choices."""
    colors, values = [color for color, _ in chart.bars], [value for _, value in chart.bars]
    found = []
    for extreme, words in ((max(values), ("tallest", "largest")), (min(values), ("shortest", "smallest"))):
        if values.count(extreme) == 1:
            answer = colors[values.index(extreme)]
            found.append(EmbeddedQuestion("chart", f"which bar is the {rng.choice(words)} ?", answer))
            found.append(
                EmbeddedQuestion("multihop", f"what is the value of the {rng.choice(words)} bar ?", str(extreme))
            )
    for color, value in rng.sample(chart.bars, min(3, len(chart.bars))):
        found.append(EmbeddedQuestion("chart", f"what is the value of the {color} bar ?", str(value)))
    numbers = [str(number) for number in range(1, 10)]
    if rng.random() < 0.5:
        found.append(as_choice(found[-1], rng.sample(numbers, len(numbers)), rng))
    for _ in range(2):
        (first, a), (second, b) = rng.sample(chart.bars, 2)
        if a != b:
            word = rng.choice(["taller", "shorter"])
            truth = (a > b) == (word == "taller")
            found.append(EmbeddedQuestion("chart", f"is the {first} bar {word} than the {second} bar ?", yes_no(truth)))
    found += _neighbours(chart, rng)
    truth = rng.random() < 0.5
    color = rng.choice(colors if truth else [name for name in COLOR_NAMES if name not in colors])
    found.append(EmbeddedQuestion("existence", f"is there a {color} bar ?", yes_no(truth)))
    found.append(EmbeddedQuestion("counting", "how many bars are there ?", str(len(colors))))
    rng.shuffle(found)
    return found


def neighbour(chart: Chart, color: str, side: str) -> tuple[str, int] | None:
    """The bar on that side ("left of" or "right of") of the bar of that colour; None at the edge."""
    place = [name for name, _ in chart.bars].index(color) + (1 if side == "right of" else -1)
    return chart.bars[place] if 0 <= place < len(chart.bars) else None


def _neighbours(chart: Chart, rng: random.Random) -> list[EmbeddedQuestion]:
    found = []
    for color, _ in rng.sample(chart.bars, 2):
        side = rng.choice(["left of", "right of"])
        reached = neighbour(chart, color, side)
        if reached is None:
            continue
        if rng.random() < 0.5:
            found.append(EmbeddedQuestion("multihop", f"what color is the bar {side} the {color} bar ?", reached[0]))
        else:
            text = f"what is the value of the bar {side} the {color} bar ?"
            found.append(EmbeddedQuestion("multihop", text, str(reached[1])))
    return found
