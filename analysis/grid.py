"""A grid of cells and its Markdown and LaTeX form: alignment, emphasis, escapes. Knows nothing of runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pdrop.names import printable

from .neutral import in_page

DASH = "–"
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "→": r"$\rightarrow$",
    "↓": r"$^{\downarrow}$",
    "↑": r"$^{\uparrow}$",
    "–": "--",
    "…": r"\ldots{}",
}


@dataclass(frozen=True)
class Text:
    """A cell's text with its emphasis: "best" is bold, "second" italic (Markdown) or underlined (LaTeX).

    "small" is small type in LaTeX, and a "banner" in a row's first cell spans all columns there.
    """

    text: str
    mark: Literal["", "best", "second", "small", "banner"] = ""

    def markdown(self) -> str:
        """For a Markdown table."""
        text = in_page(printable(self.text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " "))
        return {"best": f"**{text}**", "second": f"*{text}*", "banner": f"***{text}***"}.get(self.mark, text)

    def latex(self) -> str:
        """For a LaTeX tabular."""
        text = escape_latex(self.text)
        command = {"best": "textbf", "second": "underline", "banner": "textit", "small": "scriptsize"}.get(self.mark)
        if command == "scriptsize":
            return rf"{{\scriptsize {text}}}" if text else ""
        return text if command is None else rf"\{command}{{{text}}}"


@dataclass
class Grid:
    """A titled table; `left` counts its left-aligned columns, the others are aligned to the right."""

    title: str
    head: Sequence[str]
    left: int
    rows: list[list[Text]] = field(default_factory=list)
    rules: set[int] = field(default_factory=set)  # a rule above these rows

    def markdown(self) -> str:
        """A Markdown table, padded so that it also reads well in a terminal."""
        lines, widths = self._lines(), self._widths()

        def pad(line: Sequence[str]) -> str:
            cells = [
                text.ljust(width) if column < self.left else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths))
            ]
            return "| " + " | ".join(cells) + " |"

        rule = ["-" * width if column < self.left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join([pad(lines[0]), pad(rule), *map(pad, lines[1:])]) + "\n"

    def folded(self, width: int) -> list[Grid]:
        """The grid in parts of at most `width` characters in Markdown, if the columns allow it.

        Each part begins with the columns that name a row (at most two of the left-aligned ones). A column that is too
        wide even then gets its own part.
        """
        names, widths = min(2, self.left), self._widths()
        taken = sum(cell + 3 for cell in widths[:names]) + 1  # "| " before each cell, " " after it, "|" at the end
        parts: list[list[int]] = []
        room = 0
        for column in range(names, len(self.head)):
            if not parts or widths[column] + 3 > room:
                parts.append([])
                room = width - taken
            parts[-1].append(column)
            room -= widths[column] + 3
        if len(parts) <= 1:
            return [self]
        kept = [[*range(names), *part] for part in parts]
        return [
            Grid(
                self.title,
                [self.head[column] for column in columns],
                sum(column < self.left for column in columns),
                [[row[column] for column in columns] for row in self.rows],
                self.rules,
            )
            for columns in kept
        ]

    def _lines(self) -> list[list[str]]:
        head = [Text(name).markdown() for name in self.head]
        return [head, *([cell.markdown() for cell in row] for row in self.rows)]

    def _widths(self) -> list[int]:
        lines = self._lines()
        return [max(3, *(len(line[column]) for line in lines)) for column in range(len(self.head))]

    def titled(self) -> str:
        """Markdown with the title as its heading."""
        return f"## {self.title}\n\n{self.markdown()}"

    def latex(self, label: str, caption: str, titled: bool = True) -> str:
        """A floating table with booktabs rules; needs the packages booktabs and graphicx."""
        columns = "l" * self.left + "r" * (len(self.head) - self.left)
        lines = [
            r"\begin{table*}[t]",
            r"\centering",
            rf"\caption{{{f'{escape_latex(self.title)}. ' * titled}{caption}}}",
            rf"\label{{tab:{re.sub('[^A-Za-z0-9_.:+-]', '-', label)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(escape_latex, self.head)) + r" \\",
            r"\midrule",
        ]
        for number, row in enumerate(self.rows):
            banner = row[0].mark == "banner"
            if number and (banner or number in self.rules):
                lines.append(r"\midrule")
            if banner:
                lines += [rf"\multicolumn{{{len(self.head)}}}{{c}}{{{row[0].latex()}}} \\", r"\midrule"]
                continue
            lines.append(" & ".join(cell.latex() for cell in row) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def escape_latex(text: str) -> str:
    """Text escaped so that LaTeX prints it unchanged."""
    return "".join(LATEX.get(character, character) for character in printable(text).replace("\n", " "))
