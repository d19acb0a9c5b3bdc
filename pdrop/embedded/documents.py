"""Documents: lines of a label and its value, as on a receipt; and pages of random words for the vision tower."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .drawing import FONTS, Canvas, draw_text, font, jitter, text_width
from .questions import EmbeddedQuestion, yes_no
from .scenes import Level, background, random_code
from .vocabulary import IMAGE_SIZE, LABELS, PATCH_SIZE


@dataclass(frozen=True)
class Document:
    """What was drawn, top to bottom: (label, value)."""

    rows: tuple[tuple[str, str], ...]


def draw_document(rng: random.Random, level: Level) -> tuple[Canvas, Document]:
    """Draw three to five lines; labels in capitals on the left, values in one column or right after the label."""
    canvas = Canvas(jitter((250, 250, 248), rng, 5))
    count = rng.randint(*level.rows)
    labels = rng.sample(LABELS, count)
    size = rng.choice([16, 17, 18, 19, 20])
    pitch = rng.uniform(PATCH_SIZE, PATCH_SIZE + 1.5)
    label_font, value_font = font(rng.choice(FONTS), min(size, 18)), font(rng.choice(FONTS), size)
    top = rng.uniform(16, 30)
    step = rng.uniform(25, min(34, (IMAGE_SIZE - top - 14) / (count - 1)) if count > 1 else 34)
    top = rng.uniform(16, max(17, IMAGE_SIZE - 16 - (count - 1) * step))
    ink = jitter((25, 25, 30), rng, 20)
    left, column = rng.uniform(6, 16), rng.random() < 0.6
    value_left = left + rng.uniform(72, 84)
    rows = []
    for number, label in enumerate(labels):
        y, mark = top + number * step, LABELS.index(label) + 1
        end = draw_text(canvas, label.upper(), left, y, label_font, ink, 1, label=mark, numbered=False)
        value, gap = random_code(rng, level.characters), rng.choice([1, 2])
        width = text_width(value, value_font, gap, pitch)
        x = min(max(value_left if column else end + rng.uniform(8, 22), end + 6), IMAGE_SIZE - width - 3)
        draw_text(canvas, value, x, y, value_font, ink, gap, label=mark, pitch=pitch)
        if rng.random() < 0.3:
            canvas.pen.line([left, y + step / 2, IMAGE_SIZE - left, y + step / 2], fill=(170, 170, 170), width=1)
        rows.append((label, value))
    return canvas, Document(tuple(rows))


def draw_page(rng: random.Random, level: Level) -> tuple[Canvas, Document]:
    """Draw a page full of words without labels, for the vision tower's pre-training only."""
    canvas = Canvas(background(rng))
    y = rng.uniform(12, 20)
    while y < IMAGE_SIZE - 12:
        size = rng.randint(15, 26)
        face, x = font(rng.choice(FONTS), size), rng.uniform(3, 16)
        dark = rng.random() < 0.25
        if dark:
            canvas.pen.rectangle((0, y - size * 0.6, IMAGE_SIZE, y + size * 0.6), fill=jitter((45, 50, 60), rng, 25))
        ink = jitter((245, 245, 245), rng, 10) if dark else jitter((25, 25, 30), rng, 25)
        while True:
            code, gap, pitch = random_code(rng, (3, 5)), rng.choice([1, 2, 3]), rng.uniform(PATCH_SIZE, PATCH_SIZE + 4)
            if x + text_width(code, face, gap, pitch) > IMAGE_SIZE:
                break
            x = draw_text(canvas, code, x, y, face, ink, gap, pitch=pitch) + rng.uniform(9, 26)
        y += size * 1.25 + rng.uniform(2, 8)
    return canvas, Document(())


def value_of(document: Document, label: str, steps: int = 0) -> str | None:
    """The value `steps` lines below the label (negative: above); None if there is no such line."""
    labels = [name for name, _ in document.rows]
    if label not in labels:
        return None
    line = labels.index(label) + steps
    return document.rows[line][1] if 0 <= line < len(labels) else None


def document_questions(document: Document, rng: random.Random) -> list[EmbeddedQuestion]:
    """Ask for every value by its label (document), for a label (existence), for the line next to a label (multihop)."""
    found = []
    labels = [label for label, _ in document.rows]
    for label, value in document.rows:
        text = rng.choice([f"what is the {label} ?", f"what is the value of {label} ?"])
        found.append(EmbeddedQuestion("document", text, value))
    for _ in range(2):
        truth = rng.random() < 0.5
        label = rng.choice(labels if truth else [name for name in LABELS if name not in labels])
        found.append(EmbeddedQuestion("existence", f"is there a {label} field ?", yes_no(truth)))
    for label in rng.sample(labels, min(2, len(labels))):
        word, steps = rng.choice([("below", 1), ("above", -1)])
        reached = value_of(document, label, steps)
        if reached is not None:
            found.append(EmbeddedQuestion("multihop", f"what is the value {word} {label} ?", reached))
    found.append(EmbeddedQuestion("counting", "how many fields are there ?", str(len(labels))))
    rng.shuffle(found)
    return found
