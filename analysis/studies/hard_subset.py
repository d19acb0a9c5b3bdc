"""The hard subset: scores on the samples that need the detail that a cheap control discards. No run is made again.

    python -m analysis hard demo --control uniform

Of each task, group A are the samples that the full model gets right and the control gets wrong, group B those that
both get right (Liao et al., VTC-Bench, whose control is a smaller image; any finished run of the experiment can be the
control here: uniform, pool, no_image, random, ...). On B a method has nothing to prove. It reads the stored scores of
each sample; tasks whose samples are not right or wrong are left out, and named.

Both groups are chosen by the full model's answers, so it scores 100 on them by construction, and the control 0 and 100.
"""

from __future__ import annotations

import csv as formats
import io
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..comparison.table_model import Row, Table
from ..grid import DASH, Grid, Text
from ..neutral import in_cell, in_page
from ..statistics import Estimate, FloatArray, interval, replicates
from ..store.load import Run
from ..tables.table import labels
from ..tables.text import bounds, percent

BoolArray = npt.NDArray[np.bool_]


@dataclass
class Hard:
    """The result: one line per row, and how many samples it is from."""

    control: str
    rows: list[tuple[Row, str, Estimate | None, Estimate | None]]  # with its label, on A and on B
    sizes: tuple[int, int, int]  # samples of A, of B, and of all tasks counted
    left_out: list[str] = field(default_factory=list)


def hard(table: Table, control: str) -> Hard:
    """Score the rows of a table of one model on both groups.

    Args:
        table: The table, with a row that drops nothing.
        control: Method or run id of the control; of a method's rows or seeds the first is used.

    Raises:
        ValueError: If there is no such row, or no sample is left.
    """
    done = [row for row in table.rows if row.status == "done"]
    full = next((row.runs[0] for row in done if not row.drops), None)
    runs = [run for row in done for run in row.runs if control in (run.record.spec.method, run.record.run_id)]
    cheap = runs[0] if runs else None
    if full is None or cheap is None:
        known = ", ".join(sorted({row.spec.method for row in done}))
        raise ValueError(f"{table.name}: no finished run of method={control if full else 'none'}; there are: {known}")
    groups: dict[str, tuple[BoolArray, BoolArray]] = {}
    left_out = []
    for task in table.tasks:
        right, wrong = verdicts(full, task), verdicts(cheap, task)
        if right is None or wrong is None:
            left_out.append(task)
        else:
            groups[task] = (right == 1) & (wrong == 0), (right == 1) & (wrong == 1)
    sizes = [sum(int(group[n].sum()) for group in groups.values()) for n in (0, 1)]
    if not sizes[0]:
        raise ValueError(f"{table.name}: {control} is right wherever the full model is: there is no hard sample")
    rows = [
        (row, label, on(row, {t: g[0] for t, g in groups.items()}), on(row, {t: g[1] for t, g in groups.items()}))
        for row, label in zip(table.rows, labels(table))
        if row.status == "done"
    ]
    everything = sum(len(group[0]) for group in groups.values())
    spec = cheap.record.spec
    return Hard(f"{spec.method} [{spec.schedule}]", rows, (sizes[0], sizes[1], everything), left_out)


def verdicts(run: Run, task: str) -> FloatArray | None:
    """Each sample as right (1) or wrong (0); None without the task, or for other scores."""
    values = run.samples(task).values if task in run.record.results else None
    return values if values is not None and np.isin(values, (0.0, 1.0)).all() else None


def on(row: Row, chosen: dict[str, BoolArray]) -> Estimate | None:
    """The share of the chosen samples that a row gets right, over all tasks and seeds; None if it lacks a task."""
    values, clusters = [], []
    for task, mask in chosen.items():
        found = [verdicts(run, task) for run in row.runs]
        there = [verdict for verdict in found if verdict is not None]
        if len(there) < len(found):
            return None
        values.append(np.mean(there, axis=0)[mask])
        clusters += [image for image, taken in zip(row.runs[0].samples(task).clusters, mask) if taken]
    right = np.concatenate(values) if values else np.zeros(0)
    if not len(right):
        return None
    return Estimate(float(right.mean()), *interval(replicates("hard", right[:, None], clusters)[:, 0]))


def markdown(table: Table, found: Hard) -> str:
    grid = Grid("Hard subset", ["budget", "method", "tokens", "hard (A) %", "easy (B) %"], left=2)
    for row, label, on_a, on_b in found.rows:
        tokens = row.visual_tokens
        cells = [f"{percent(e.value)} {bounds(e)}" if e else DASH for e in (on_a, on_b)]
        start = [row.budget or DASH, label, DASH if tokens is None else f"{tokens:.1f}"]
        grid.rows.append([Text(cell) for cell in (*start, *cells)])
    a, b, all_of_them = found.sizes
    out = f" Left out, for their samples are not right or wrong: {', '.join(found.left_out)}." if found.left_out else ""
    return in_page(
        f"# {table.title}: hard subset\n\n{grid.markdown()}\n"
        f"A: {a} of {all_of_them} samples that the full model gets right and {found.control} gets wrong; B: {b} that "
        f"both get right. The full model scores 100 on both by construction.{out} 95 % intervals by bootstrap over "
        "images.\n"
    )


def csv(found: Hard) -> str:
    """One line per row, fractions unrounded."""
    buffer = io.StringIO()
    writer = formats.writer(buffer, lineterminator="\n")
    names = "method,schedule,run_ids,control,hard,hard_low,hard_high,easy,easy_low,easy_high,hard_n,easy_n"
    writer.writerow(names.split(","))
    for row, _, on_a, on_b in found.rows:
        numbers: list[float | None] = []
        for estimate in (on_a, on_b):
            numbers += [estimate.value, estimate.low, estimate.high] if estimate else [None] * 3
        ids = " ".join(run.record.run_id for run in row.runs)
        cells = [row.spec.method, row.spec.schedule, ids, found.control]
        cells += ["" if number is None else f"{number:.10g}" for number in numbers]
        writer.writerow([*map(in_cell, cells), *found.sizes[:2]])
    return buffer.getvalue()
