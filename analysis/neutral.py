"""Text of records as tables and terminals may show it: a store may come from a stranger.

What a record says is data. In a Markdown page it becomes no HTML, fetched picture or link; in a CSV no spreadsheet
formula; on a terminal no escape sequence. What cannot be shown is shown as its code: \\x1b.
"""

from __future__ import annotations

import re

from pdrop.names import printable

# what starts HTML in Markdown; "<0.001" does not, and <folder> is in our own sentences
HTML = re.compile(r"<(?!folder>)(?=[A-Za-z/!?])")
LINK = re.compile(r"\](?=[(\[:])")  # [text](where), [text][name], [name]: where; our intervals [1.0, 2.0] are none
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def in_page(text: str) -> str:
    """A Markdown page or a part of one: none of its words becomes HTML, a picture or a link."""
    return LINK.sub("]\\\\", HTML.sub("&lt;", printable(text)))


def in_cell(value: object) -> object:
    """A value of a CSV file: a text that a spreadsheet would take for a formula gets a ' in front; numbers stay."""
    if isinstance(value, str) and value.startswith(FORMULA) and not is_number(value):
        return f"'{value}"
    return value


def is_number(text: str) -> bool:
    """Whether a spreadsheet reads the text as a number."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None
