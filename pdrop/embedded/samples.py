"""Images with their questions, each made from one seed; and which seeds belong to which split.

from pdrop.embedded.samples import sample
picture = sample("train", 0)
picture.canvas.image.show(); picture.questions
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from .boards import Board, board_questions, draw_board
from .charts import Chart, chart_questions, draw_chart
from .documents import Document, document_questions, draw_document, draw_page
from .drawing import Canvas
from .drills import Drill, drill_questions
from .questions import EmbeddedQuestion
from .scene_questions import scene_questions
from .scenes import Level, Scene, draw_scene

KINDS = ("scene", "document", "chart", "page", "board")  # pages and boards are for training only
MIX: Mapping[str, float] = {"scene": 0.5, "document": 0.28, "chart": 0.22}
BENCHMARK = Level()
NO_DRILLS: Mapping[Drill, float] = {}

# First seed of each split; no split is longer than the gap between them, so no image can be in two.
SPLITS = {"train": 0, "validation": 2_000_000_000, "test": 3_000_000_000}
SPLIT_LENGTH = 1_000_000_000


@dataclass(frozen=True)
class Picture:
    """A drawn image: its kind, what it shows (`facts`), the canvas, and the questions about it."""

    seed: int
    kind: str
    canvas: Canvas
    facts: Scene | Document | Chart | Board
    questions: tuple[EmbeddedQuestion, ...]


def split_seed(split: str, index: int) -> int:
    """The seed of image `index` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 <= index < SPLIT_LENGTH:
        raise ValueError(f"index must be in 0..{SPLIT_LENGTH - 1}, got {index}")
    return SPLITS[split] + index


def sample(
    split: str,
    index: int,
    mix: Mapping[str, float] = MIX,
    level: Level = BENCHMARK,
    drills: Mapping[Drill, float] = NO_DRILLS,
) -> Picture:
    """Image `index` of a split.

    `mix` weights the kinds of image; `drills` gives the fraction of the scenes (for "fields": of the documents) that
    get a drill's questions instead of their own.
    """
    if not mix or set(mix) - set(KINDS):
        raise ValueError(f"mix must weigh some of {', '.join(KINDS)}, got {dict(mix)}")
    seed = split_seed(split, index)
    rng = random.Random(seed)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    facts: Scene | Document | Chart | Board
    if kind == "scene":
        canvas, facts = draw_scene(rng, level)
        drill = _drill({name: share for name, share in drills.items() if name != "fields"}, rng)
        found = scene_questions(facts, rng) if drill is None else drill_questions(facts, drill, rng)
    elif kind == "document":
        canvas, facts = draw_document(rng, level)
        drill = _drill({name: share for name, share in drills.items() if name == "fields"}, rng)
        found = document_questions(facts, rng) if drill is None else drill_questions(facts, drill, rng)
    elif kind == "chart":
        canvas, facts = draw_chart(rng, level)
        found = chart_questions(facts, rng)
    elif kind == "board":
        canvas, facts = draw_board(rng, level)
        found = board_questions(facts, rng)
    else:
        canvas, facts = draw_page(rng, level)
        found = []
    return Picture(seed, kind, canvas, facts, tuple(found))


def _drill(drills: Mapping[Drill, float], rng: random.Random) -> Drill | None:
    """The drill of an image, or None. Without drills no random number is drawn: pictures do not depend on them."""
    draw = rng.random() if drills else 1.0
    for name, share in drills.items():
        if draw < share:
            return name
        draw -= share
    return None
