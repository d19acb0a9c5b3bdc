"""One seed -> one image with its questions; which seeds belong to which split.

from pdrop.embedded.samples import sample
picture = sample("train", 0)
picture.canvas.image.show(); picture.questions
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from .charts import Chart, chart_questions, draw_chart
from .documents import Document, document_questions, draw_document, draw_page
from .drawing import Canvas
from .questions import Question
from .scene_questions import retrieval_questions, scene_questions
from .scenes import Level, Scene, draw_scene

KINDS = ("scene", "document", "chart", "page")
MIX: Mapping[str, float] = {"scene": 0.5, "document": 0.28, "chart": 0.22}
BENCHMARK = Level()

# First seed of each split; a split is as long as the gap, so no image can be in two splits.
SPLITS = {"train": 0, "validation": 2_000_000_000, "test": 3_000_000_000}
SPLIT_LENGTH = 1_000_000_000


@dataclass(frozen=True)
class Picture:
    """A drawn image: its kind, what it shows (`facts`), the canvas, and the questions about it."""

    seed: int
    kind: str
    canvas: Canvas
    facts: Scene | Document | Chart
    questions: tuple[Question, ...]


def split_seed(split: str, index: int) -> int:
    """The seed of image `index` of a split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 0 <= index < SPLIT_LENGTH:
        raise ValueError(f"index must be in 0..{SPLIT_LENGTH - 1}, got {index}")
    return SPLITS[split] + index


def sample(
    split: str, index: int, mix: Mapping[str, float] = MIX, level: Level = BENCHMARK, retrieval: bool = False
) -> Picture:
    """Image `index` of a split. `mix` weighs the kinds of image; `retrieval`: the warm-up's questions."""
    if not mix or set(mix) - set(KINDS):
        raise ValueError(f"mix must weigh some of {', '.join(KINDS)}, got {dict(mix)}")
    seed = split_seed(split, index)
    rng = random.Random(seed)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    facts: Scene | Document | Chart
    if kind == "scene":
        canvas, facts = draw_scene(rng, level)
        found = (retrieval_questions if retrieval else scene_questions)(facts, rng)
    elif kind == "document":
        canvas, facts = draw_document(rng, level)
        found = document_questions(facts, rng)
    elif kind == "chart":
        canvas, facts = draw_chart(rng, level)
        found = chart_questions(facts, rng)
    else:
        canvas, facts = draw_page(rng, level)
        found = []
    return Picture(seed, kind, canvas, facts, tuple(found))
