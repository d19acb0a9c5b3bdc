"""Makes text of records safe for tables and terminals: a store may come from a stranger.

A record's text is data. In a Markdown page it becomes no HTML, fetched picture or link; in a CSV no spreadsheet
formula; on a terminal no escape sequence. Characters that cannot be shown appear as their code: \\x1b.
"""

from __future__ import annotations

import re

from pdrop.names import printable

# the start of HTML in Markdown; "<0.001" is none, and <folder> is in our own sentences
HTML = re.compile(r"<(?!folder>)(?=[A-Za-z/!?])")
LINK = re.compile(r"\](?=[(\[:])")  # [text](where), [text][name], [name]: where; our intervals [1.0, 2.0] are none
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def in_page(text: str) -> str:
    """A Markdown page, or a part of one, in which nothing becomes HTML, a picture or a link."""
    return LINK.sub("]\\\\", HTML.sub("&lt;", printable(text)))


def in_cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet would take for a formula gets a leading '; numbers stay."""
    if isinstance(value, str) and value.startswith(FORMULA) and not is_number(value):
        return f"'{value}"
    return value


def is_number(text: str) -> bool:
    """Whether a spreadsheet reads the text as a number."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None
