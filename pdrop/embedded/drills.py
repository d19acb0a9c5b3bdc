"""Drills: many questions of one kind about an image, which teach what the benchmark's few questions per image do not.

A skill such as looking up a word in the image appears suddenly, after tens of thousands of questions of its kind.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Literal

from .documents import Document
from .questions import EmbeddedQuestion, as_choice, yes_no
from .scene_questions import apart, cell, holds, singular, unique, wrong_names
from .scenes import Scene
from .vocabulary import COLOR_NAMES, LABELS, PLURALS, RELATIONS, SHAPES

Drill = Literal["retrieval", "sides", "letters", "counts", "fields"]


def drill_questions(facts: Scene | Document, drill: Drill, rng: random.Random) -> list[EmbeddedQuestion]:
    """The questions of a drill, in random order; "fields" is for documents, all others are for scenes.

    Raises:
        ValueError: If the drill is for another kind of image.
    """
    if isinstance(facts, Document) != (drill == "fields"):
        raise ValueError(f"the drill {drill!r} is not about a {type(facts).__name__.lower()}")
    found = _fields(facts) if isinstance(facts, Document) else _of_scene(facts, drill, rng)
    rng.shuffle(found)
    return found


def _of_scene(scene: Scene, drill: Drill, rng: random.Random) -> list[EmbeddedQuestion]:
    drills: dict[Drill, Callable[[Scene, random.Random], list[EmbeddedQuestion]]]
    drills = {"retrieval": _retrieval, "sides": _sides, "letters": _letters, "counts": _counts}
    return drills[drill](scene, rng)


def _look_ups(scene: Scene) -> list[EmbeddedQuestion]:
    """Ask for the colour of every shape that occurs once, and for the shape of every colour that occurs once."""
    by_shape, by_color = "what color is the {} ?", "what shape is the {} object ?"
    return [
        *(EmbeddedQuestion("attribute", by_shape.format(o.shape), o.color) for o in unique(scene, "shape")),
        *(EmbeddedQuestion("attribute", by_color.format(o.color), o.shape) for o in unique(scene, "color")),
    ]


def _retrieval(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    """Look-ups; where each thing is; whether a thing is there (half of the wrong names are adversarial)."""
    found, present = _look_ups(scene), {(thing.color, thing.shape) for thing in scene.things}
    for thing in singular(scene):
        place = cell(thing)
        if place is not None:
            found.append(EmbeddedQuestion("position", f"where is the {thing.name} ?", place))
        found.append(EmbeddedQuestion("existence", f"is there a {thing.name} ?", "yes"))
        near = rng.random() < 0.5
        colors = [color for color, _ in present] if near else list(COLOR_NAMES)
        absent = sorted({color for color in colors if (color, thing.shape) not in present})
        if absent:
            text = f"is there a {rng.choice(absent)} {thing.shape} ?"
            found.append(EmbeddedQuestion("existence", text, "no"))
    return found


def _sides(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    """Every pair of things in both orders, each with a relation drawn at random, and where each thing is."""
    known, found = singular(scene), []
    for first in known:
        place = cell(first)
        if place is not None:
            found.append(EmbeddedQuestion("position", f"where is the {first.name} ?", place))
        for second in known:
            relation = rng.choice(RELATIONS)
            if first is not second and apart(relation, first, second):
                text = f"is the {first.name} {relation} the {second.name} ?"
                found.append(EmbeddedQuestion("relation", text, yes_no(holds(relation, first, second))))
    return found


def _letters(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    """Every look-up as multiple choice, twice with other options."""
    found = []
    for question in 2 * _look_ups(scene):
        kind, names = ("color", COLOR_NAMES) if question.answer in COLOR_NAMES else ("shape", SHAPES)
        wrong = wrong_names(question.answer, [getattr(thing, kind) for thing in scene.things], names, rng)
        found.append(as_choice(question, wrong, rng))
    return found


def _counts(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    """Ask for the number of every shape and colour that occurs more than once, of as many that occur once, and of two
    that do not occur. In most scenes each occurs once: without this balance, the model learns to answer "1"."""
    found = []
    for kind, names in (("shape", SHAPES), ("color", COLOR_NAMES)):
        counts = Counter(getattr(thing, kind) for thing in scene.things)
        several = [name for name in names if counts[name] > 1]
        once = [name for name in names if counts[name] == 1]
        absent = [name for name in names if counts[name] == 0]
        for name in several + rng.sample(once, min(len(once), max(1, len(several)))) + rng.sample(absent, 2):
            asked = PLURALS[name] if kind == "shape" else f"{name} objects"
            found.append(EmbeddedQuestion("counting", f"how many {asked} are there ?", str(counts[name])))
    return [*found, EmbeddedQuestion("counting", "how many objects are there ?", str(len(scene.things)))]


def _fields(document: Document) -> list[EmbeddedQuestion]:
    """Ask whether each label of the vocabulary is there, and for every value by its label."""
    there = dict(document.rows)
    return [
        *(EmbeddedQuestion("existence", f"is there a {label} field ?", yes_no(label in there)) for label in LABELS),
        *(EmbeddedQuestion("document", f"what is the {label} ?", value) for label, value in document.rows),
    ]
