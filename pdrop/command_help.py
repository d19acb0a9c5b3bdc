"""Help of a command that fits the terminal: paragraphs are refilled, long rows of a list continue below their text."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

ROW = re.compile(r"( *\S.*? {2,}|\s+)(?=\S)")  # the head of a list's row: a term and two blanks, or an indent
NARROWEST = 24  # columns of a row's text


COMMAND = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)  # what a module has that is one


def refuse_no_command(line: Sequence[str], package: str) -> None:
    """End `python -m pdrop.store` and the like with a line: Python would do nothing, say nothing and exit with 0.

    Args:
        line: The interpreter's command line.
        package: The folder of the package that its modules belong to.
    """
    folder = Path(package)
    modules = re.compile(rf"(?:-\w*m)?({folder.name}(?:\.\w+)+)")
    asked = next((found[1] for word in line[1:] if (found := modules.fullmatch(word))), "")
    file = folder.joinpath(*asked.split(".")[1:]).with_suffix(".py")
    if asked and file.is_file() and not COMMAND.search(file.read_text(encoding="utf8")):
        sys.exit(f"error: {asked} is no command: python -m {folder.name} --help shows what there is")


class CommandHelp(argparse.RawDescriptionHelpFormatter):
    """Takes a module's docstring as description."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return folded(text, width)


def folded(text: str, width: int) -> str:
    """A docstring in lines of at most `width` columns, unless a word is longer: paragraphs (lines that start at the
    left) are refilled; other lines are kept, and continue below their text if they are too long."""
    found = []
    for paragraph in textwrap.dedent(text.expandtabs()).strip().split("\n\n"):
        lines = paragraph.split("\n")
        if not any(ROW.match(line) for line in lines):
            found.append(textwrap.fill(" ".join(lines), width, break_long_words=False, break_on_hyphens=False))
        else:
            found.append("\n".join(row(line, width) for line in lines))
    return "\n\n".join(found)


def row(line: str, width: int) -> str:
    """A line of a list, which continues below its text if it is too long."""
    if len(line) <= width:
        return line
    head = ROW.match(line)
    start = len(head[0]) if head is not None else 0
    longest = max(len(word) for word in line[start:].split())
    below = start if start and start + max(NARROWEST, longest) <= width else 8
    return textwrap.fill(
        line, width, subsequent_indent=" " * below, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
