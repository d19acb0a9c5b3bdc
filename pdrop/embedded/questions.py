"""A question about an image, and its template (the question with slots in place of names)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .vocabulary import COLOR_NAMES, LABELS, OPTION_LETTERS, PLURALS, SHAPES


@dataclass(frozen=True)
class EmbeddedQuestion:
    """One question about an image.

    `family` is one of vocabulary.FAMILIES, `answer` the exact answer, `options` the four choices of a
    multiple-choice question (else empty).
    """

    family: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


_SLOTS = (
    {name: "<color>" for name in COLOR_NAMES}
    | {name: "<shape>" for name in SHAPES}
    | {name: "<shapes>" for name in PLURALS.values()}
    | {name: "<label>" for name in LABELS}
)


def template(question: str) -> str:
    """The question with every colour, shape, label and the list of options replaced by a slot.

    >>> template("is there a red star ?")
    'is there a <color> <shape> ?'
    """
    stem, listed, _ = question.partition(" A. ")
    return " ".join(_SLOTS.get(word, word) for word in stem.split()) + (" <options>" if listed else "")


def named(question: str) -> dict[str, str]:
    """Slot -> the first name in it. A blind guess may repeat it: in scenes of few colours or shapes it is often right.

    >>> named("what shape is the next object above the red star ?")
    {'<color>': 'red', '<shape>': 'star'}
    """
    found: dict[str, str] = {}
    for word in question.partition(" A. ")[0].split():
        if word in _SLOTS:
            found.setdefault(_SLOTS[word], word)
    return found


def as_choice(question: EmbeddedQuestion, wrong: Sequence[str], rng: random.Random) -> EmbeddedQuestion:
    """The question as multiple choice: its answer among three of `wrong`, letters in random order."""
    if len(set(wrong) - {question.answer}) < len(OPTION_LETTERS) - 1:
        raise ValueError(f"need three wrong options for {question.text!r}, got {list(wrong)}")
    options = [question.answer, *[option for option in dict.fromkeys(wrong) if option != question.answer][:3]]
    rng.shuffle(options)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options))
    letter = OPTION_LETTERS[options.index(question.answer)]
    return EmbeddedQuestion("choice", f"{question.text} {listed} answer with the letter .", letter, tuple(options))


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"
