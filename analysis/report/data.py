"""The report's data on runs and experiments, as plain values for JSON (report.js shows them)."""

from __future__ import annotations

import base64
import glob
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pdrop.schedule import Schedule

from ..captions import caption
from ..comparison.comparable import parts, refuse_mixtures
from ..comparison.compare import compare
from ..comparison.table_model import Row, Table
from ..grid import DASH, Grid
from ..store.load import Experiment, Run, load_experiment
from ..studies.attention import ranks_only
from ..style import method_name, task_names
from ..tables import footnotes
from ..tables.table import grids
from ..tables.text import percent

LINE_HEAD = [
    "experiment",
    "average of none",
    "best that drops",
    "runs",
    "not done",
    "tasks",
    "questions a run",
    "models",
]
RUN_HEAD = ["run", "status", "method", "schedule", "mean score", "keep %", "FLOPs %", "tasks", "seed", "positions"]
RUN_HEAD += ["model", "started", "code"]
SCORES = ("average", "Δ none [95 %]")
WIDE = 1300  # pixels of a PNG as wide as the page
Cells = list[tuple[str, str]]


@dataclass
class Shown:
    """An experiment on the page: its tables, and why others were refused."""

    name: str
    experiment: Experiment | None
    tables: list[Table]
    refused: list[str]


def show(results: Path, name: str) -> Shown:
    """The tables of an experiment; for runs that may not be in one table, a message."""
    found = Shown(name, None, [], [])
    try:
        found.experiment = load_experiment(results, name, found.refused)
    except ValueError as error:
        found.refused.append(f"{name}: {error}")
        return found
    for part in parts(found.experiment):
        try:
            refuse_mixtures(found.experiment, part.runs, times=part.times)
            found.tables.append(compare(part, found.experiment.superseded))
        except ValueError as error:
            found.refused.append(f"{part.title}: {error}")
    return found


def totals(runs: Sequence[Run], shown: Sequence[Shown]) -> list[tuple[str, str]]:
    """The counts at the top of the page, as (number, what it counts)."""
    done = [run for run in runs if run.done]
    counts = [
        (len(done), "finished runs"),
        (len(runs) - len(done), "failed or unfinished"),
        (len(shown), "experiments"),
        (len({run.record.spec.model for run in runs}), "models"),
        (len({run.record.spec.method for run in runs}), "methods"),
        (len({task for run in done for task in run.record.results}), "tasks"),
        (sum(result.n for run in done for result in run.record.results.values()), "answers scored"),
    ]
    return [(f"{number:,}", name) for number, name in counts]


def failures(runs: Sequence[Run]) -> list[str]:
    """One line per run that is not done, and one for uncommitted changes."""
    lines = []
    for run in runs:
        if not run.done:
            error = (run.record.error or "no error recorded").strip().split("\n")[-1]
            lines.append(f"{run.record.status}: {run.folder}: {error}")
    dirty = sum(1 for run in runs if run.done and run.record.environment.get("git_dirty"))
    if dirty:
        lines.append(f"{dirty} of {len(runs)} runs were made with uncommitted changes")
    return lines


def experiment_data(one: Shown, figures: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """An experiment for the page, its runs in the order of its tables, those without a table last."""
    runs = one.experiment.runs if one.experiment else []
    ordered = [run for table in one.tables for run in table.runs]
    meaning = footnotes.meaning(one.tables).strip("\n").split("\n")[2:] if one.tables else []
    return {
        "name": one.name,
        "line": line(one, runs),
        "runs": list(dict.fromkeys(run.record.run_id for run in [*ordered, *runs])),
        "tables": [table_data(table) for table in one.tables],
        "refused": one.refused,
        "meaning": [text.removeprefix("- ").replace("**", "").replace("*", "") for text in meaning],
        "figures": figure_data(one.name, figures, names),
    }


def shortened(words: Iterable[str], most: int = 3) -> str:
    """The first entries, and how many more there are: a line of the summary has little room."""
    listed = list(words)
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return ", ".join([*listed[:most], *more]) or DASH


def line(one: Shown, runs: Sequence[Run]) -> list[str]:
    """The experiment in a line of the summary, LINE_HEAD its columns."""
    rows = [row for table in one.tables for row in table.rows]
    done = [run for run in runs if run.done]
    whole = [row for row in rows if not row.drops and row.average]
    dropping = [row for row in rows if row.drops and row.average and not ranks_only(row.runs[0])]
    best = max(dropping, key=lambda row: row.average.score.value if row.average else 0.0, default=None)
    tasks = {task for run in done for task in run.record.results}
    questions = [sum(result.n for result in run.record.results.values()) for run in done]
    return [
        one.name,
        shortened([average(row) for row in whole]),
        f"{average(best)} {method_name(best.spec.method)}, {best.spec.schedule}" if best else DASH,
        str(len(runs)),
        str(len(runs) - len(done)),
        str(len(tasks)),
        f"{fmean(questions):.0f}" if questions else DASH,
        shortened(dict.fromkeys(run.record.spec.model for run in runs)),
    ]


def average(row: Row) -> str:
    return percent(row.average.score.value if row.average else None)


def table_data(table: Table) -> dict[str, Any]:
    """The grids of a table for the page."""
    return {
        "title": table.title,
        "warnings": footnotes.warnings(table),
        "grids": [grid_data(table, grid) for grid in grids(table)],
    }


def grid_data(table: Table, grid: Grid) -> dict[str, Any]:
    """A grid for the page: each row with the runs that it comes from; the blind guess has none."""
    names = task_names(list(table.tasks))
    rows = []
    # scores first, so that no sideways scrolling is needed for them
    scores = [n for n, name in enumerate(grid.head) if n >= grid.left and name in SCORES]
    order = [*range(grid.left), *scores, *(n for n in range(grid.left, len(grid.head)) if n not in scores)]
    for number, cells in enumerate(grid.rows):
        runs = [run.record.run_id for run in table.rows[number].runs] if number < len(table.rows) else []
        texts = [(cells[n].text, cells[n].mark) for n in order]
        rows.append({"cells": texts, "runs": runs, "rule": number in grid.rules})
    by_head = {head: task for task, head in names.items() if head in grid.head}
    return {
        "title": grid.title,
        "head": [grid.head[n] for n in order],
        "left": grid.left,
        "rows": rows,
        "tasks": by_head,
    }


def run_data(run: Run) -> dict[str, Any]:
    """A run for the page: its whole record, its label, and the layers of its slider."""
    spec = run.record.spec
    study = ranks_only(run)
    layers = list(Schedule.parse(spec.schedule).layers)
    extra = [spec.schedule or "nothing dropped", *([spec.positions] if spec.schedule else [])]
    extra += [f"seed {spec.seed}"] if spec.seed else []
    return {
        "id": run.record.run_id,
        "folder": run.folder,
        "label": f"{method_name(spec.method)}, {'attention by layer' if study else ', '.join(extra)}",
        "layers": layers,
        "study": [0, *layers] if study else [],
        "record": json.loads(run.record.to_json()),
    }


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """One line per run, newest first."""
    rows = []
    for run in sorted(runs, key=lambda run: (run.record.started_at, run.folder), reverse=True):
        spec, cost = run.record.spec, run.record.cost
        scores = [run.score(task) for task in run.record.results]
        mean = fmean(scores) if run.done and scores and all(0 <= score <= 1 for score in scores) else None
        texts = [run.record.run_id, run.record.status, method_name(spec.method), spec.schedule or DASH, percent(mean)]
        texts += [percent(cost.mean_keep if cost else None), percent(cost.prefill_flops_ratio if cost else None)]
        texts += [str(len(spec.tasks)), str(spec.seed), spec.positions, spec.model]
        texts += [run.record.started_at, footnotes.commit(run)]
        rows.append({"cells": [(text, "") for text in texts], "runs": [run.record.run_id], "rule": False})
    return {"title": "Runs", "head": RUN_HEAD, "left": 4, "rows": rows, "tasks": {}}


def figure_data(name: str, folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, Any]]:
    """The experiment's PNGs, narrow ones first. A figure belongs to the experiment with the longest matching prefix."""
    found = []
    there = {path.name: path for folder in reversed(folders) for path in folder.glob(f"{glob.escape(name)}*.png")}
    for path in sorted(there.values(), key=lambda path: path.name):
        owners = [other for other in names if path.stem == other or path.stem.startswith(f"{other}-")]
        if max(owners, key=len, default="") != name:
            continue
        content = path.read_bytes()
        (width,) = struct.unpack(">I", content[16:20])  # of the PNG's first chunk
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        told = f"{caption(path.stem)} ({path.stem})".lstrip()
        found.append({"source": source, "caption": told, "wide": width > WIDE})
    return sorted(found, key=lambda one: bool(one["wide"]))
