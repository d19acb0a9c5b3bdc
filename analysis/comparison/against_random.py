"""Rows against their random twins: the same number of tokens at the same layers and positions, chosen at random.

One twin may serve several methods whose numbers of tokens are equal up to one (all those before the decoder).

A method that cannot be distinguished from its twin has shown nothing by its ranking. If the twin has several seeds, the
difference is taken to their mean, and its interval covers the choice of images AND of seeds, both redrawn in each draw
of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from pdrop.schedule import Schedule

from ..statistics import Estimate, Flips, FloatArray, flips, interval, over_seeds, twice_the_median
from .resampling import run_draws
from .table_model import Row, Table

ONE_TOKEN = 1.0  # tokens per layer: two methods with one budget of FLOPs differ, as their ranking costs do


def hold_against_random(rows: list[Row], table: Table, averages: Sequence[FloatArray | None]) -> None:
    """Fill in the comparison with the random twin, for the finished rows of one model.

    Args:
        averages: Each row's average under resampling of the images [draws]; None if it has no interval.
    """
    for row, own in zip(rows, averages):
        twin = twin_of(row, rows)
        if twin is None or row.average is None or twin.average is None:
            continue
        means = [fmean(run.score(task) for task in table.averaged) for run in twin.runs]
        row.random_seeds, row.random_band = len(means), (min(means), max(means))
        value = row.average.score.value - fmean(means)
        band = band_draws(twin, table.averaged) if own is not None else None
        low, high = interval(own - band) if band is not None and own is not None else (None, None)
        p = against_each(row, twin, table.averaged)
        row.against_random = Estimate(value, low, high, p, anecdote=len(means) < 2)


def twin_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row's random twin: one made as such (twin=true) before one that happens to fit; of several the nearest."""
    found = [other for other in rows if is_random_twin(other, row)]

    def order(other: Row) -> tuple[bool, bool, float]:
        return (
            other.spec.method != f"random_{row.spec.method}",
            other.spec.schedule != row.spec.schedule,
            tokens_apart(other, row) or 0.0,
        )

    return min(found, key=order, default=None)


def is_random_twin(other: Row, row: Row) -> bool:
    """Whether `other` drops at random: as many tokens, give or take one, at the same layers and positions."""
    same = (
        row.drops
        and other.drops
        and all(getattr(other.spec, n) == getattr(row.spec, n) for n in ("positions", "tasks"))
    )
    if not same or not is_random(other) or is_random(row):
        return False
    if other.spec.schedule == row.spec.schedule:
        return True
    layers = [Schedule.parse(one.spec.schedule).layers for one in (other, row)]
    apart = tokens_apart(other, row) if layers[0] == layers[1] else None
    return apart is not None and apart <= ONE_TOKEN


def tokens_apart(other: Row, row: Row) -> float | None:
    """The largest difference between the mean numbers of visual tokens that enter a layer; None without costs."""
    lists = [one.runs[0].record.cost.visual_tokens_per_layer for one in (other, row) if one.runs[0].record.cost]
    if len(lists) < 2 or not lists[0] or len(lists[0]) != len(lists[1]):
        return None
    return float(max(abs(a - b) for a, b in zip(*lists)))


def is_random(row: Row) -> bool:
    """Whether the row is a control: random, random_fastv, ..."""
    return row.spec.method.split("_")[0] == "random"


def band_draws(twin: Row, tasks: Sequence[str]) -> FloatArray | None:
    """Average of the twin under resampling of images and of seeds [draws]; None if a task has no draws."""
    by_task = []
    for task in tasks:
        found = run_draws(twin.runs, task)
        there = [one for one in found if one is not None]
        if len(there) < len(found):
            return None
        by_task.append(np.stack(there, axis=1))
    return over_seeds(np.mean(by_task, axis=0)) if by_task else None


def against_each(row: Row, twin: Row, tasks: Sequence[str]) -> float | None:
    """McNemar's p on flips against each seed of the twin, combined; None for pooled rows and other metrics."""
    if len(row.runs) > 1:
        return None
    values = []
    for run in twin.runs:
        total = Flips(0, 0, {})
        for task in tasks:
            before, after = run.samples(task).values, row.runs[0].samples(task).values
            found = None if before is None or after is None else flips(before, after, run.samples(task).clusters)
            if found is None:
                return None
            total += found
        values.append(total.p)
    return twice_the_median(values)
