"""Questions about a scene; the answers come from the scene's description."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from .questions import EmbeddedQuestion, as_choice, yes_no
from .scenes import Scene, Thing
from .vocabulary import CELLS, COLOR_NAMES, IMAGE_SIZE, PLURALS, RELATIONS, SHAPES

_CLEAR = 12  # pixels: two centres closer than this along an axis are not compared
_READING = ("what does the sign say ?", "what is written in the image ?", "read the text .")


def scene_questions(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    """Questions of all families that a scene can have, in random order."""
    found: list[EmbeddedQuestion] = []
    for ask in (_existence, _attribute, _relation, _position, _counting, _reading, _multihop):
        found += ask(scene, rng)
    rng.shuffle(found)
    return found


def singular(scene: Scene) -> list[Thing]:
    """The things whose pair of colour and shape occurs once."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def unique(scene: Scene, kind: Literal["shape", "color"]) -> list[Thing]:
    """The things whose shape (or colour) no other has."""
    counts = Counter(getattr(thing, kind) for thing in scene.things)
    return [thing for thing in scene.things if counts[getattr(thing, kind)] == 1]


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether `first` is `relation` (one of RELATIONS) `second`, by their centres."""
    tests: dict[str, Callable[[], bool]] = {
        "left of": lambda: first.x < second.x,
        "right of": lambda: first.x > second.x,
        "above": lambda: first.y < second.y,
        "below": lambda: first.y > second.y,
    }
    if relation not in tests:
        raise ValueError(f"unknown relation {relation!r}; known: {', '.join(RELATIONS)}")
    return tests[relation]()


def apart(relation: str, first: Thing, second: Thing) -> bool:
    """Whether the centres are far enough apart, along the relation's axis, for a clear answer."""
    across = relation in ("left of", "right of")
    return abs(first.x - second.x if across else first.y - second.y) >= _CLEAR


def cell(thing: Thing) -> str | None:
    """The ninth of the image that holds the thing's centre; None if the centre is too near a border."""
    across, down = thing.x / IMAGE_SIZE * 3, thing.y / IMAGE_SIZE * 3
    if min(abs(value - border) for value in (across, down) for border in (1, 2)) <= 0.09:
        return None
    return CELLS[int(down) * 3 + int(across)]


def next_thing(scene: Scene, start: Thing, relation: str) -> Thing | None:
    """The nearest thing on that side, measured along that axis only; None if there is none or two are too close."""
    axis = "x" if relation in ("left of", "right of") else "y"
    distances = sorted(
        (abs(getattr(thing, axis) - getattr(start, axis)), index)
        for index, thing in enumerate(scene.things)
        if thing is not start and holds(relation, thing, start)
    )
    others = [abs(getattr(thing, axis) - getattr(start, axis)) for thing in scene.things if thing is not start]
    if not distances or min(others) < _CLEAR:
        return None
    if len(distances) > 1 and distances[1][0] - distances[0][0] < _CLEAR:
        return None
    return scene.things[distances[0][1]]


def _existence(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    present = sorted({(thing.color, thing.shape) for thing in scene.things})
    found = []
    for _ in range(3):
        if rng.random() < 0.5:
            color, shape = rng.choice(present)
            found.append(EmbeddedQuestion("existence", f"is there a {color} {shape} ?", "yes"))
            continue
        absent = [(color, shape) for color in COLOR_NAMES for shape in SHAPES if (color, shape) not in present]
        if rng.random() < 0.6:
            # Adversarial, as in POPE: a colour or a shape that is there, but not together.
            absent = [(c, s) for c, s in absent if any(c == o or s == p for o, p in present)]
        color, shape = rng.choice(absent)
        found.append(EmbeddedQuestion("existence", f"is there a {color} {shape} ?", "no"))
    if rng.random() < 0.5:
        shapes = sorted({thing.shape for thing in scene.things})
        truth = rng.random() < 0.5
        shape = rng.choice(shapes if truth else [name for name in SHAPES if name not in shapes])
        found.append(EmbeddedQuestion("existence", f"is there a {shape} ?", yes_no(truth)))
    return found


def _attribute(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    shapes = Counter(thing.shape for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    by_shape, by_color = unique(scene, "shape"), unique(scene, "color")
    found = []
    for thing in rng.sample(by_shape, min(2, len(by_shape))):
        question = EmbeddedQuestion("attribute", f"what color is the {thing.shape} ?", thing.color)
        found += [question, as_choice(question, wrong_names(thing.color, colors, COLOR_NAMES, rng), rng)]
    for thing in rng.sample(by_color, min(2, len(by_color))):
        question = EmbeddedQuestion("attribute", f"what shape is the {thing.color} object ?", thing.shape)
        found += [question, as_choice(question, wrong_names(thing.shape, shapes, SHAPES, rng), rng)]
    # At most two of the four as multiple choice: they are long.
    choices = [question for question in found if question.family == "choice"][:2]
    return [question for question in found if question.family != "choice"] + choices


def wrong_names(answer: str, present: Iterable[str], all_names: tuple[str, ...], rng: random.Random) -> list[str]:
    """Wrong options; names from the image come first, so that knowing what is in the image is not enough."""
    here = dict.fromkeys(present)
    near = [name for name in here if name != answer]
    far = [name for name in all_names if name != answer and name not in here]
    return rng.sample(near, len(near)) + rng.sample(far, len(far))


def _relation(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    known = singular(scene)
    pairs = [(a, b) for a in known for b in known if a is not b]
    found = []
    for first, second in rng.sample(pairs, min(3, len(pairs))):
        relation = rng.choice(RELATIONS)
        if apart(relation, first, second):
            text = f"is the {first.name} {relation} the {second.name} ?"
            found.append(EmbeddedQuestion("relation", text, yes_no(holds(relation, first, second))))
    return found


def _position(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    found = []
    known = singular(scene)
    for thing in rng.sample(known, min(3, len(known))):
        answer = cell(thing)
        if answer is not None:
            found.append(EmbeddedQuestion("position", f"where is the {thing.name} ?", answer))
    if found and rng.random() < 0.3:
        question = rng.choice(found)
        found.append(as_choice(question, rng.sample(CELLS, len(CELLS)), rng))
    return found


def _counting(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    shapes = Counter(thing.shape for thing in scene.things)
    colors = Counter(thing.color for thing in scene.things)
    found = [EmbeddedQuestion("counting", "how many objects are there ?", str(len(scene.things)))]
    shape = rng.choice(list(shapes) if rng.random() < 0.8 else list(SHAPES))
    found.append(EmbeddedQuestion("counting", f"how many {PLURALS[shape]} are there ?", str(shapes[shape])))
    color = rng.choice(list(colors) if rng.random() < 0.8 else list(COLOR_NAMES))
    found.append(EmbeddedQuestion("counting", f"how many {color} objects are there ?", str(colors[color])))
    return found


def _reading(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    return [EmbeddedQuestion("reading", rng.choice(_READING), scene.sign)] if scene.sign else []


def _multihop(scene: Scene, rng: random.Random) -> list[EmbeddedQuestion]:
    known = singular(scene)
    found = []
    for start in rng.sample(known, min(3, len(known))):
        relation = rng.choice(RELATIONS)
        reached = next_thing(scene, start, relation)
        if reached is not None:
            kind = rng.choice(["color", "shape"])
            text = f"what {kind} is the next object {relation} the {start.name} ?"
            found.append(EmbeddedQuestion("multihop", text, getattr(reached, kind)))
    return found
