"""Costs and results of trainings, from their records: one row per training, compared with the one that drops nothing.

    python -m analysis trainings    results/tables/trainings.md and figures, from results/trainings/*/training.json

Trainings in one grid differ only in method, schedule or seed: they have the same start, data, order of data, steps,
rates, precision and device. The scores of the trained models follow (trained.py); task by task they are in the
experiment's own table.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from pdrop import names
from pdrop.commands import typed
from pdrop.record import LATER, TRAINING_VARIES

from ..grid import DASH, Grid, Text
from ..neutral import in_page
from ..style import method_name, schedule_text
from . import trained

LAST = 20  # the mean loss of this many last steps is shown: single steps are noise

READING = f"""How to read the trainings: **loss** is the mean of the last {LAST} logged steps. **CPU s** is the median
CPU time of a step, which other programs of the machine disturb less than the clock; **CPU %** and **FLOPs %** are
ratios to the trainings of the same grid that drop nothing. They are not interleaved timings: differences of a few
percent in time mean nothing. FLOPs are the closed form for the mean record, forward and backward; the optimizer and
reading data are in the time and not in the FLOPs.
"""


class Training(NamedTuple):
    """A finished training: its folder's name, training.json, and the rows of curve.csv."""

    folder: str
    record: Mapping[str, Any]
    curve: Sequence[Mapping[str, str]]


def read(results: Path) -> list[Training]:
    """Every finished training, in the order of the folders' names.

    Raises:
        ValueError: If there is none, or a file is not a record.
    """
    found = []
    for path in sorted((results / "trainings").glob("*/training.json")):
        try:
            record = json.loads(path.read_text(encoding="utf8"))
            whole = {"spec", "status", "cost"} <= set(record) and set(TRAINING_VARIES) <= set(record["spec"])
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): move its folder away") from error
        if not whole:
            raise ValueError(f"{path} is not a training record: move it away")
        for name in ("recipe", "model", "method"):
            names.check(f"{path}: spec.{name}", record["spec"][name])
        if record["status"] == "done":
            with (path.parent / "curve.csv").open(newline="") as file:
                found.append(Training(path.parent.name, record, list(csv.DictReader(file))))
    if not found:
        raise ValueError(
            f"no finished training under {results / 'trainings'}: {typed('train')} output={results}/trainings"
        )
    return found


def groups(results: Path) -> list[list[Training]]:
    """The finished trainings in groups; those of a group differ only in method, schedule and seed."""
    found: dict[str, list[Training]] = defaultdict(list)
    for one in read(results):
        same = {name: value for name, value in (LATER | one.record["spec"]).items() if name not in TRAINING_VARIES}
        found[json.dumps([same, one.record["environment"].get("processor")], sort_keys=True)].append(one)
    return list(found.values())


def page(results: Path) -> str:
    """Markdown of all trainings of a store."""
    parts = ["# trainings\n"]
    for group in groups(results):
        spec, made = group[0].record["spec"], group[0].record["environment"]
        commits = sorted({str(one.record["environment"].get("git_commit"))[:10] for one in group})
        dirty = any(one.record["environment"].get("git_dirty") for one in group)
        parts += [
            grid(group).titled(),
            f"Recipe {spec['recipe']} from {spec['model']} (weights {spec['model_fingerprint'][:12]}), "
            f"{spec['records']} records (data {spec['data_fingerprint'][:12]}), batch {spec['batch_size']}, "
            f"{spec['dtype']}, {spec['attn_implementation']} attention; {made.get('processor')}; commit "
            f"{', '.join(commits)}{' + uncommitted changes' if dirty else ''}. {abreast(group)}\n",
            trained.page(results, {one.folder: one.record for one in group}),
        ]
    return in_page("\n".join([*parts, READING]))


def grid(group: Sequence[Training]) -> Grid:
    """One grid; the trainings that drop nothing come first, then by method and schedule."""
    spec = group[0].record["spec"]
    head = ["method", "schedule", "seed", "tokens", "loss", "CPU s", "CPU %", "FLOPs %", "training"]
    table = Grid(f"{spec['recipe']}, {spec['steps']} steps of {spec['batch_size']}", head, left=2)
    whole = [cpu(one.curve) for one in group if not one.record["spec"]["schedule"]]
    order = sorted(group, key=place)
    for _, record, curve in order:
        cost, layers = record["cost"], record["cost"]["visual_tokens_per_layer"]
        flops = cost.get("step_flops"), cost.get("step_flops_unpruned")
        cells = [
            method_name(record["spec"]["method"]),
            schedule_text(record["spec"]["schedule"]) or DASH,
            str(record["spec"]["seed"]),
            f"{fmean(layers):.1f}",
            f"{fmean(float(row['loss']) for row in curve[-LAST:]):.3f}",
            f"{cpu(curve):.2f}",
            f"{100 * cpu(curve) / fmean(whole):.1f}" if whole else DASH,
            f"{100 * flops[0] / flops[1]:.1f}" if flops[0] and flops[1] else DASH,
            record["training_id"],
        ]
        table.rows.append([Text(cell) for cell in cells])
    return table


def abreast(group: Sequence[Training]) -> str:
    """A sentence on how many of the trainings ran at the same time, from their starts and durations."""
    spans = []
    for one in group:
        start = datetime.fromisoformat(one.record["started_at"])
        spans.append((start, start + timedelta(seconds=one.record["cost"]["wall_s"])))
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    return "They ran one after the other." if most == 1 else f"Up to {most} of them ran side by side."


def place(one: Training) -> tuple[bool, str, str, int]:
    """Sorts what drops nothing first, then by method, schedule and seed."""
    spec = one.record["spec"]
    return spec["schedule"] != "", spec["method"], spec["schedule"], spec["seed"]


def cpu(curve: Sequence[Mapping[str, str]]) -> float:
    """Median CPU seconds of a step, without the first, which sets up, if there are others."""
    return median(float(row["step_cpu_s"]) for row in curve[1:] or curve)
