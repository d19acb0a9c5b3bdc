"""The grids about answers: similarity to the answers without dropping, invalid answers, scores by other rules."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison.table_model import Likeness, Row, Table
from ..grid import DASH, Grid, Text
from ..statistics import Estimate
from ..style import task_names
from .text import bounds, percent


def answer_grid(table: Table, head: Sequence[str], starts: Sequence[Sequence[str]]) -> Grid:
    """Score, equal answers and chrF of each task; empty if answers were not generated.

    Args:
        table: The table.
        head: Heads of the columns that every grid begins with.
        starts: The cells of these columns, one row each.
    """
    names, tasks = task_names(list(table.tasks)), list(table.tasks)
    ends = ["same % [95 %]", "chrF", "invalid", *(f"{names[task]}: score, same %, chrF" for task in tasks)]
    grid = Grid("Answers", [*head, *ends], left=len(head))
    for row, start in zip(table.rows, starts):
        cells = [*likeness_cells(row.likeness_mean), invalid_text(row, tasks)]
        cells += [task_text(row, task, table) for task in tasks]
        grid.rows.append([Text(cell) for cell in (*start, *cells)])
    return grid


def likeness_cells(likeness: Likeness | None) -> list[str]:
    if likeness is None:
        return [DASH, DASH]
    return [f"{percent(likeness.same.value)} {bounds(likeness.same)}".strip(), percent(likeness.chrf)]


def task_text(row: Row, task: str, table: Table) -> str:
    """A task's score with the similarity of its answers."""
    cell, likeness = row.cells.get(task), row.likeness.get(task)
    if cell is None:
        return DASH
    score = percent(cell.score.value) if table.tasks[task].fraction else f"{cell.score.value:.1f}"
    alike = (DASH, DASH) if likeness is None else (percent(likeness.same.value), percent(likeness.chrf))
    return " · ".join((score, *alike))


def invalid_text(row: Row, tasks: Sequence[str]) -> str:
    """Invalid answers of all answers; a dash if they were not counted for each task."""
    there = [task for task in tasks if task in row.cells]
    counts = [found for task in there if (found := row.invalid(task)) is not None]
    if not there or len(counts) < len(there):
        return DASH
    asked = sum(row.runs[0].record.results[task].n for task in there)
    return f"{sum(counts):.4g} of {asked}"


def rule_grid(table: Table, head: Sequence[str], starts: Sequence[Sequence[str]]) -> Grid | None:
    """Scores by the benchmarks' own rules and passes, in addition to the table's; None without any."""
    found = dict.fromkeys(key for row in table.rows for key in row.rules)
    if not found:
        return None
    names = task_names(list(table.tasks))
    ends = [f"{names[task]}: {metric}" for task, metric in found]
    grid = Grid("Scores by the benchmarks' own rules", [*head, *ends], left=len(head))
    for row, start in zip(table.rows, starts):
        cells = [rule_text(row.rules.get(key), key[1]) for key in found]
        grid.rows.append([Text(cell) for cell in (*start, *cells)])
    return grid


def rule_text(estimate: Estimate | None, metric: str) -> str:
    if estimate is None:
        return DASH
    if metric.startswith("mme_"):  # points
        limits = "" if estimate.low is None else f" [{estimate.low:.0f}, {estimate.high:.0f}]"
        return f"{estimate.value:.1f}{limits}"
    return f"{percent(estimate.value)} {bounds(estimate)}".strip()
