r"""Tables for a paper: floats with captions, with all columns, five or those named; numbers as LaTeX commands.

    python -m analysis tables NAME --compact                          budget, method, FLOPs, average, difference
    python -m analysis tables NAME --columns "method,tokens,average"  those, by their heads in NAME.md
    python -m analysis tables NAME --caption "Ours against others."   instead of the caption that is made
    python -m analysis tables NAME --macros                           NAME-macros.tex: \newcommand for each number

Needs the packages booktabs and graphicx.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pdrop.commands import typed

from ..comparison.table_model import Row, Table
from ..grid import DASH, Grid, Text, escape_latex
from ..style import budget_words
from .footnotes import asked
from .table import grids, labels
from .text import percent

COMPACT = ("budget", "method", "FLOPs %", "average", "Δ none [95 %]")
SPELLED = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Point", "To")
DIGITS = dict(zip("0123456789.-", SPELLED))


@dataclass(frozen=True)
class Wishes:
    """The options of a paper's tables.

    Attributes:
        columns: Heads of the columns that are shown; empty: all of the first two grids.
        caption: Plain text; empty: one is made.
    """

    columns: tuple[str, ...] = ()
    caption: str = ""


def latex(tables: Sequence[Table], wishes: Wishes | None = None) -> str:
    r"""Floats of each table; \usepackage{booktabs,graphicx}.

    Raises:
        ValueError: If no table has a column that was asked for.
    """
    head = f"% made by {typed('analysis')} tables; needs booktabs and graphicx\n"
    return head + "\n".join(floats(table, wishes or Wishes()) for table in tables)


def floats(table: Table, wishes: Wishes) -> str:
    """The first two grids of a table as floats, or one float of the columns that were asked for."""
    main, by_task, *_ = (in_words(grid) for grid in grids(table)[:2])
    caption = escape_latex(wishes.caption) or made_caption(table)
    if wishes.columns:
        return chosen(main, by_task, wishes.columns).latex(table.name, caption, titled=not wishes.caption)
    arrows = "" if wishes.caption else r" $\downarrow$, $\uparrow$: clearly below or above dropping nothing."
    return (
        main.latex(table.name, caption, titled=not wishes.caption)
        + "\n"
        + by_task.latex(f"{table.name}-tasks", caption + arrows, titled=not wishes.caption)
    )


def made_caption(table: Table) -> str:
    """A caption: what was scored, what intervals and marks mean."""
    samples = sum(task.n for task in table.tasks.values())
    tasks = len(table.tasks)
    return (
        f"{samples} samples of {tasks} task{'s' * (tasks != 1)}; FLOPs and KV cache in \\% of dropping nothing; "
        "differences in points, with 95\\,\\% intervals by paired bootstrap over images. Bold: best of its budget or "
        "not distinguishable from it; underlined: best of the rest." + by_protocol(table)
    )


def by_protocol(table: Table) -> str:
    """The protocol by which questions were asked, for a caption; nothing for the checkpoint's own."""
    if not asked(table):
        return ""
    protocols = dict.fromkeys(run.record.spec.protocol for row in table.rows for run in row.runs)
    return f" Asked by the {escape_latex(' and '.join(protocols))} protocol."


def in_words(grid: Grid) -> Grid:
    """The grid with its budgets in words."""
    place = list(grid.head).index("budget")
    rows = [
        [Text(budget_words(cell.text), cell.mark) if n == place else cell for n, cell in enumerate(row)]
        for row in grid.rows
    ]
    return Grid(grid.title, grid.head, grid.left, rows, set(grid.rules))


def chosen(main: Grid, by_task: Grid, columns: Sequence[str]) -> Grid:
    """The columns with these heads, from both grids.

    Raises:
        ValueError: If there is no column with one of the heads.
    """
    known = list(dict.fromkeys([*main.head, *by_task.head]))
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"no column {unknown[0]!r}; there are: {', '.join(known)}")
    rows = []
    for first, second in zip(main.rows, by_task.rows):
        held = dict(zip(by_task.head, second)) | dict(zip(main.head, first))
        rows.append([held[name] for name in columns])
    words = [*main.head[: main.left], "schedule"]
    left = next((n for n, name in enumerate(columns) if name not in words), len(columns))
    return Grid(main.title, list(columns), left, rows, set(main.rules))


def macros(tables: Sequence[Table]) -> str:
    r"""A \newcommand for each row's numbers: \<table><method><budget>Average and so on; a comment says which row."""
    lines, used = [f"% made by {typed('analysis')} tables --macros"], set()
    for table in tables:
        for row, label in zip(table.rows, labels(table)):
            lines.append(f"% {table.name}: {label}, {budget_words(row.budget) or 'nothing dropped'}".replace("\n", " "))
            for what, value in numbers(row).items():
                stem = command(f"{table.name} {label} {row.budget} {what}")
                name, again = stem, 1
                while name in used:
                    again += 1
                    name = f"{stem}{command(str(again))}"
                used.add(name)
                lines.append(rf"\newcommand{{\{name}}}{{{escape_latex(value)}}}")
    return "\n".join(lines) + "\n"


def numbers(row: Row) -> dict[str, str]:
    """The numbers of a row that a text may quote; unknown ones are left out."""
    average, tokens = row.average, row.visual_tokens
    delta = average.delta if average else None
    found = {
        "Average": percent(average.score.value if average else None),
        "Delta": percent(delta.value if delta else None),
        "Low": percent(delta.low if delta else None),
        "High": percent(delta.high if delta else None),
        "Tokens": DASH if tokens is None else f"{tokens:.1f}",
        "Flops": percent(row.cost("prefill_flops_ratio")),
        "Cache": percent(row.cost("kv_ratio")),
    }
    return {name: value for name, value in found.items() if value != DASH}


def command(text: str) -> str:
    """Words as the name of a LaTeX command: only letters, digits spelled out."""
    spelled = re.sub(r"[0-9]|(?<=\d)[.-](?=\d)", lambda match: f" {DIGITS[match.group()]} ", text)
    words = re.findall(r"[A-Za-z]+", spelled)
    return "".join([word[0].upper() + word[1:] for word in words])
