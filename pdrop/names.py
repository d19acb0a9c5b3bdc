r"""The one grammar of names that become parts of paths: of models, methods, tasks, recipes and experiments.

    check("model.name", "llava15_7b")       # returns it
    check("model.name", "../../llava")      # ValueError
    printable("\x1b[2Jgone")                 # other text that comes from elsewhere, as a terminal may show it

Held where a name comes in: at the door, and where a record is read that somebody else may have written. What has such
a name needs no further care in a path, a LaTeX label or a shell line: no separator, no "..", no hidden file, nothing
that looks like an option. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 80  # three of them and an identity, as a training's folder is called, are the 255 bytes of a file's name
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
GRAMMAR = f"letters from a to z, digits, _ . + - only, the first one a letter, a digit or _, {LONGEST} at most"


def is_name(text: object) -> bool:
    """Whether `text` is a valid name."""
    return isinstance(text, str) and len(text) <= LONGEST and NAME.fullmatch(text) is not None


def check(what: str, text: object) -> str:
    """The name itself.

    Args:
        what: What the message calls it, such as the dial that sets it.
        text: What may be a name.

    Raises:
        ValueError: If it is not a name.
    """
    if isinstance(text, str) and is_name(text):
        return text
    shown = ascii(text)
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."
    raise ValueError(f"{what} becomes part of a path: {GRAMMAR}; not {shown}")


def as_name(text: str) -> str:
    """Free text, such as a sample's id, as part of a file's name: what a name may not hold becomes "_"."""
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", text)[:LONGEST]


def printable(text: str) -> str:
    """Text with control characters, bidirectional marks and odd line ends as their codes; line feeds and tabs stay."""
    if text.isprintable():  # most are
        return text
    return "".join(one if one in "\n\t" or _shows(one) else ascii(one)[1:-1] for one in text)


def _shows(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
