"""What a task's rule reads in an answer; answers that it cannot read are invalid.

A yes-or-no question (all of a task's targets are yes or no) is readable if the answer has one of the two words, or is y
or n alone; a choice (most targets are one of their options) if it has a letter as a word or the text of one option; a
box if it has four numbers; anything else if it has any word. An invalid answer scores as wrong but means something
else: the model no longer answers, rather than no longer sees. No torch, no lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pdrop.evaluation.official import LETTERS, option, options_of, said

UNREADABLE = "unreadable"  # the metric with which our own tasks report it
WORD = re.compile(r"[a-z]+")
LETTER = re.compile(r"(?<![A-Za-z'])[A-H](?![A-Za-z'])")


def readings(samples: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """What is read in each answer; None if it is invalid.

    Args:
        samples: As lmms-eval logs them (doc, target, filtered_resps, metrics), generated answers.
    """
    targets = [str(sample["target"]).strip() for sample in samples]
    yes_no = all(target.lower() in ("yes", "no") for target in targets)
    letters = [is_choice(target, options_of(sample["doc"])) for target, sample in zip(targets, samples)]
    choices = 2 * sum(letters) > len(letters)
    found: list[str | None] = []
    for sample, letter in zip(samples, letters):
        answer = said(sample).strip()
        if UNREADABLE in sample:
            found.append(None if sample[UNREADABLE] else answer)
        elif yes_no:
            found.append(yes_or_no(answer))
        elif choices and letter:
            found.append(choice(answer, options_of(sample["doc"])))
        else:
            found.append(answer or None)
    return found


def is_choice(target: str, options: Mapping[str, str]) -> bool:
    """Whether a target is an option: its letter, in brackets or not, its text, or its number."""
    lone = target.strip("()")
    numbered = lone.isdecimal() and int(lone) < len(options)
    return (len(lone) == 1 and lone in LETTERS) or target in options.values() or numbered


def yes_or_no(answer: str) -> str | None:
    """The first yes or no in the answer; "not" is no. None without either."""
    words = WORD.findall(answer.lower())
    said_by = {"yes": "yes", "no": "no", "not": "no"} | ({"y": "yes", "n": "no"} if len(words) == 1 else {})
    return next((said_by[word] for word in words if word in said_by), None)


def choice(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of an answer to a choice: by the official rule, else the last letter that is a word.

    Args:
        answer: The answer after the task's filters; a single lower-case letter counts too.
        options: The texts by letter; empty if the document does not have them.
    """
    if found := option(answer, options):
        return found
    letters = LETTER.findall(answer.upper() if len(answer) == 1 else answer)
    return next((letter for letter in reversed(letters) if not options or letter in options), None)
