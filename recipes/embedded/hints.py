"""Hints: intermediate supervision. After some words of a question training has something predicted besides the answer,
so that a long chain of steps is taught step by step. The benchmark's questions have none."""

from __future__ import annotations

from pdrop.embedded.questions import EmbeddedQuestion
from pdrop.embedded.vocabulary import COLOR_NAMES, LABELS, OPTION_LETTERS, PLURALS, SHAPES

_NAMES = {*COLOR_NAMES, *SHAPES, *PLURALS.values(), *LABELS}


def hints(question: EmbeddedQuestion) -> list[tuple[int, str]]:
    """(place in `question.text.split()`, word to be predicted after it), in order.

    After the last name that the question gives, where the answer could be known: the answer's first word; of a place,
    at the question mark, its last word. Of a multiple-choice question: after that name the first word of the right
    option, after each option its letter if it is the right one, else "no", and after the word "letter" the letter.

    >>> hints(EmbeddedQuestion("attribute", "what shape is the red object ?", "star"))
    [(4, 'star')]
    """
    words = question.text.split()
    end = words.index("A.") if question.options else len(words)
    named = [place for place in range(end) if words[place] in _NAMES]
    right = question.options[OPTION_LETTERS.index(question.answer)] if question.options else question.answer
    found = [(named[-1], right.split()[0])] if named else []
    if question.family == "position":
        found.append((end - 1, right.split()[-1]))
    if not question.options:
        return found
    place = end
    for option in question.options:
        place += 1 + len(option.split())
        found.append((place - 1, question.answer if option == right else "no"))
    return [*found, (words.index("letter"), question.answer)]
