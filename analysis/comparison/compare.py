"""Builds a table of one experiment's runs whose rows may be compared: scores, and which differences are real.

Each row is compared with the row of the same model that drops nothing, and against random dropping on the same
schedule; within one budget the best rows are marked. Every difference is paired (analysis/statistics.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from ..statistics import Estimate, Flips, FloatArray, flips
from ..store.load import Run
from .against_random import hold_against_random
from .answers import describe, estimated
from .comparable import Part
from .resampling import Draws, mean_draws, run_draws
from .table_model import Cell, Row, Table, describe_tasks, in_all, mean_or_none, pool

FLOORS = Path(str(files("pdrop"))) / "embedded" / "data"


def compare(part: Part, superseded: int = 0, floors_from: Path = FLOORS) -> Table:
    """Build a table. Its runs must have passed `comparable.refuse_mixtures`, or be a part of the store.

    Raises:
        ValueError: If runs of one task answered different samples.
    """
    runs = part.runs
    tasks = describe_tasks([run for run in runs if run.done])
    known = read_floors(floors_from)
    floors = {task: known[task] for task in tasks if task in known}
    times = part.times and any(run.done and run.record.cost and run.record.cost.prefill_time_ratio for run in runs)
    table = Table(part.stem, pool(runs), tasks, floors, list(part.missing), times, part.title, superseded)
    for model in table.models:
        rows = [row for row in table.rows if row.spec.model == model and row.status == "done"]
        score(rows, table)
    return table


def read_floors(folder: Path) -> dict[str, float]:
    """The scores of the best guess without an image, for the embedded tasks: floors.json, written with their data."""
    path = folder / "floors.json"
    if not path.is_file():
        return {}
    families = json.loads(path.read_text(encoding="utf8"))["families"]
    return {f"embedded_{family}": float(entry["floor"]) for family, entry in families.items()}


def score(rows: list[Row], table: Table) -> None:
    """Fill in scores, intervals, differences and marks of the finished rows of one model."""
    values = {task: sample_values(rows, task) for task in table.tasks}
    draws = {task: resample(rows, task) for task in table.tasks}
    averages = [mean_draws([draws[task][number] for task in table.averaged]) for number in range(len(rows))]
    for number, row in enumerate(rows):
        for task in table.tasks:
            if in_all(row, task):
                row.cells[task] = Cell(estimated(fmean(run.score(task) for run in row.runs), draws[task][number]))
        average = mean_or_none([row.cells[task].score.value if task in row.cells else None for task in table.averaged])
        if average is not None:
            row.average = Cell(estimated(average, averages[number]))
            if len(row.runs) > 1:
                row.spread = stdev(fmean(run.score(task) for task in table.averaged) for run in row.runs)
        row.time = time_ratio(row) if table.times else None
    for number, row in enumerate(rows):
        base = baseline(rows, row)
        if base is not None and number != base:
            for task in row.cells.keys() & rows[base].cells.keys():
                cell, flipped = row.cells[task], flips_between(rows, task, values[task], base, number)
                cell.delta = difference(cell, rows[base].cells[task], draws[task], number, base, flipped)
                cell.flips = flipped
            if row.average and (full := rows[base].average):
                row.average.flips = total([row.cells[task].flips for task in table.averaged])
                row.average.delta = difference(row.average, full, averages, number, base, row.average.flips)
        if base is not None and row.average and (full := rows[base].average):
            value, top, floor = row.average.score.value, full.score.value, floor_of(rows, row, table)
            row.share_of_none = value / top if top else None
            if floor is not None and top > floor:
                row.floor_to_full = (value - floor) / (top - floor)
    hold_against_random(rows, table, averages)
    describe(rows, [baseline(rows, row) for row in rows], table)

    def flipped_between(base: int, number: int, tasks: Sequence[str]) -> Flips | None:
        return total([flips_between(rows, task, values[task], base, number) for task in tasks])

    for task, column in table.tasks.items():
        sign = 1 if column.higher_is_better else -1
        mark(rows, [row.cells.get(task) for row in rows], draws[task], partial(flipped_between, tasks=[task]), sign)
    mark(rows, [row.average for row in rows], averages, partial(flipped_between, tasks=table.averaged))


def sample_values(rows: list[Row], task: str) -> list[FloatArray | None]:
    """Each row's per-sample values [samples], mean over its seeds; None without the task or a numeric metric.

    Raises:
        ValueError: If two runs answered different samples.
    """
    found: list[FloatArray | None] = []
    first: Run | None = None
    for row in rows:
        if not in_all(row, task):
            found.append(None)
            continue
        for run in row.runs:
            first = first or run
            if run.samples(task).doc_ids != first.samples(task).doc_ids:
                raise ValueError(f"{task}: {first.folder} and {run.folder} answered different samples")
        values = [run.samples(task).values for run in row.runs]
        numbers = [value for value in values if value is not None]
        found.append(np.mean(numbers, axis=0) if len(numbers) == len(values) else None)
    return found


def resample(rows: list[Row], task: str) -> list[Draws]:
    """Each row's score under resampling [draws], mean over its seeds; None if no interval can be given."""
    having = [run for row in rows if in_all(row, task) for run in row.runs]
    drawn = iter(run_draws(having, task))
    return [mean_draws([next(drawn) for _ in row.runs]) if in_all(row, task) else None for row in rows]


def difference(cell: Cell, other: Cell, draws: list[Draws], number: int, base: int, flipped: Flips | None) -> Estimate:
    """`cell` minus `other`, paired, with the exact test of their flips."""
    mine, theirs = draws[number], draws[base]
    pairs = None if mine is None or theirs is None else mine - theirs
    found = estimated(cell.score.value - other.score.value, pairs)
    return replace(found, p=None if flipped is None else flipped.p)


def between(first: Row, second: Row, tasks: Sequence[str]) -> tuple[Estimate, Flips | None]:
    """The average of `first` over tasks minus that of `second`, paired, and the flips from the second to the first.

    Raises:
        ValueError: If their runs answered different samples.
    """
    rows = [second, first]
    values = {task: sample_values(rows, task) for task in tasks}
    draws = {task: resample(rows, task) for task in tasks}
    averages = [mean_draws([draws[task][number] for task in tasks]) for number in range(2)]
    old, new = (Cell(Estimate(fmean(run.score(task) for task in tasks for run in row.runs))) for row in rows)
    flipped = total([flips_between(rows, task, values[task], 0, 1) for task in tasks])
    return difference(new, old, averages, 1, 0, flipped), flipped


def flips_between(rows: list[Row], task: str, values: list[FloatArray | None], base: int, number: int) -> Flips | None:
    """Flips between two single runs; None for pooled seeds, which are not independent samples."""
    before, after = values[base], values[number]
    if before is None or after is None or len(rows[base].runs) > 1 or len(rows[number].runs) > 1:
        return None
    return flips(before, after, rows[base].runs[0].samples(task).clusters)


def baseline(rows: Sequence[Row], row: Row) -> int | None:
    """The number of the row that drops nothing, preferably one with the same tasks; None if there is none."""
    those = [number for number, other in enumerate(rows) if not other.drops]
    return min(those, key=lambda number: rows[number].spec.tasks != row.spec.tasks, default=None)


def floor_of(rows: Sequence[Row], row: Row, table: Table) -> float | None:
    """The zero of the scale: the average of the run without visual tokens, or without such a run the blind guess."""
    blind = [other for other in rows if other.blind and other.average and other.spec.tasks == row.spec.tasks]
    return blind[0].average.score.value if blind and blind[0].average else table.floor


def total(parts: list[Flips | None]) -> Flips | None:
    """Flips over several tasks; None if one task has none."""
    there = [part for part in parts if part is not None]
    return sum(there, Flips(0, 0, {})) if there and len(there) == len(parts) else None


def time_ratio(row: Row) -> Estimate | None:
    """Prefill time / the unpruned model's: the median's mean over seeds, with the widest of their intervals."""
    ratios = [run.record.cost.prefill_time_ratio for run in row.runs if run.record.cost]
    there = [ratio for ratio in ratios if ratio is not None]
    if not there or len(there) < len(row.runs):
        return None
    return Estimate(fmean(r.median for r in there), min(r.low for r in there), max(r.high for r in there))


def mark(
    rows: list[Row],
    cells: Sequence[Cell | None],
    draws: list[Draws],
    flipped: Callable[[int, int], Flips | None],
    sign: int = 1,
) -> None:
    """Mark, within each budget, the best row and those not distinguishable from it, and the best of the rest as second.

    Nothing is marked if no two rows are distinguishable, or if a row has no interval: a bold figure is a claim.

    Args:
        rows: The rows of one model.
        cells: Their scores.
        draws: The scores' draws.
        flipped: Gives the flips between two rows, by the rows' numbers.
        sign: -1 if lower is better.
    """
    for budget in {row.budget for row in rows if row.drops}:
        those = [n for n, row in enumerate(rows) if row.budget == budget and cells[n] is not None]
        held = [(n, cell, drawn) for n in those if (cell := cells[n]) and (drawn := draws[n]) is not None]
        if len(held) < len(those) or len(held) < 2:
            continue
        held.sort(key=lambda entry: -sign * entry[1].score.value)
        top, best, _ = held[0]
        leads = ((cell, difference(best, cell, draws, top, n, flipped(n, top))) for n, cell, _ in held[1:])
        worse = [cell for cell, lead in leads if sign * lead.sign > 0]
        if worse:
            for _, cell, _ in held:
                cell.mark = "best" if all(cell is not other for other in worse) else ""
            worse[0].mark = "second"
