"""Hints: intermediate supervision. After some words of a question the training also has a step of the answer predicted,
so that a long chain is taught step by step. The benchmark's questions have no hints."""

from __future__ import annotations

from pdrop.embedded.questions import EmbeddedQuestion
from pdrop.embedded.vocabulary import COLOR_NAMES, LABELS, OPTION_LETTERS, PLURALS, SHAPES

_NAMES = {*COLOR_NAMES, *SHAPES, *PLURALS.values(), *LABELS}


def hints(question: EmbeddedQuestion) -> list[tuple[int, str]]:
    """Pairs of a place in `question.text.split()` and the word to predict after it, in order.

    After the last name in the question, where the answer could be known, that is the answer's first word; if the answer
    is a place, its last word follows at the question mark. In a multiple-choice question it is the first word of the
    right option; then, after each option, its letter if it is the right one and "no" otherwise; and after the word
    "letter" the letter.

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
