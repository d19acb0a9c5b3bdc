"""What training with dropping does to scores: models of one way of training pooled over their seeds, against those
trained with nothing dropped.

Part of `python -m analysis trainings` where the trained models were scored (experiments/training.yaml). A model belongs
to the training whose folder its path names. Differences are paired: the same samples, the same seeds of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from analysis.grid import DASH, Grid, Text
from analysis.load import Run, experiments, load_experiment
from analysis.statistics import FloatArray, interval, replicates
from analysis.style import method_name, schedule_text

EXPERIMENT = "training"
Way = tuple[str, str]  # method, schedule; ("none", "") drops nothing
WHOLE: Way = ("none", "")

READING = """**whole** is the average over the tasks with nothing dropped, **± sd** its standard deviation over seeds,
**Δ whole** the difference to the models of the same seeds trained with nothing dropped. **dropped** is the average when
the model drops as it was trained, **untrained** that of the models trained with nothing dropped when they drop so, and
**gain** what having been trained that way adds. In points, with 95 % intervals over images (paired bootstrap; they do
not cover the choice of seeds).
"""


@dataclass
class Trained:
    """One way of training: seed -> (way of scoring -> run)."""

    way: Way
    seeds: dict[int, dict[Way, Run]] = field(default_factory=dict)


def page(results: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the scores; empty where none of the trained models was scored.

    Args:
        results: The store.
        records: Folder -> training record, of trainings that differ in method, schedule and seed alone.
    """
    found = ways(results, records)
    if WHOLE not in found or not any(found[WHOLE].seeds.values()):
        return ""
    head = ["method", "schedule", "seeds", "whole", "± sd", "Δ whole [95 %]", "dropped", "untrained", "gain [95 %]"]
    table = Grid("what they score", head, left=2)
    for trained in sorted(found.values(), key=lambda one: (one.way != WHOLE, one.way)):
        if any(trained.seeds.values()):
            table.rows.append([Text(cell) for cell in cells(trained, found[WHOLE])])
    return f"{table.titled()}\n{READING}"


def ways(results: Path, records: Mapping[str, Mapping[str, Any]]) -> dict[Way, Trained]:
    """The ways of training and what their models scored."""
    scored: dict[str, dict[Way, Run]] = {}
    for run in load_experiment(results, EXPERIMENT).runs if EXPERIMENT in experiments(results) else ():
        if run.done:
            spec = run.record.spec
            scored.setdefault(Path(spec.model_path).parent.name, {})[(spec.method, spec.schedule)] = run
    found: dict[Way, Trained] = {}
    for folder, record in records.items():
        spec = record["spec"]
        way = (spec["method"], spec["schedule"]) if spec["schedule"] else WHOLE
        found.setdefault(way, Trained(way)).seeds[spec["seed"]] = scored.get(folder, {})
    return found


def cells(trained: Trained, plain: Trained) -> list[str]:
    """A row of the table."""
    whole = {seed: runs[WHOLE] for seed, runs in trained.seeds.items() if WHOLE in runs}
    row = [method_name(trained.way[0]), schedule_text(trained.way[1]) or DASH, str(len(whole))]
    row += [points(average(list(whole.values()))[0]) if whole else DASH, spread(list(whole.values()))]
    if trained is plain:
        return [*row, *4 * [DASH]]
    before = {seed: runs[WHOLE] for seed, runs in plain.seeds.items() if WHOLE in runs}
    dropped = {seed: runs[trained.way] for seed, runs in trained.seeds.items() if trained.way in runs}
    alike = {seed: runs[trained.way] for seed, runs in plain.seeds.items() if trained.way in runs}
    row += [difference(whole, before), points(average(list(dropped.values()))[0]) if dropped else DASH]
    both = [alike[seed] for seed in alike if seed in dropped]
    return [*row, points(average(both)[0]) if both else DASH, difference(dropped, alike)]


def average(runs: Sequence[Run]) -> tuple[float, FloatArray]:
    """Mean over tasks, runs and samples, and its draws [draws].

    Raises:
        ValueError: If the runs answered different samples, or a metric is no number of each sample.
    """
    tasks = sorted(runs[0].record.results)
    values, draws = [], []
    for task in tasks:
        samples = [run.samples(task) for run in runs]
        if any(one.doc_ids != samples[0].doc_ids for one in samples) or any(one.values is None for one in samples):
            raise ValueError(f"{task}: {', '.join(run.folder for run in runs)} cannot be averaged sample by sample")
        column = np.mean([one.values for one in samples if one.values is not None], axis=0)
        values.append(float(column.mean()))
        draws.append(replicates(task, column[:, None], samples[0].clusters)[:, 0])
    return fmean(values), np.mean(draws, axis=0)


def difference(mine: Mapping[int, Run], theirs: Mapping[int, Run]) -> str:
    """Mine minus theirs over the seeds that both have."""
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return DASH
    value, draws = average([mine[seed] for seed in seeds])
    other, others = average([theirs[seed] for seed in seeds])
    low, high = interval(draws - others)
    return f"{signed(value - other)} [{signed(low)}, {signed(high)}]"


def spread(runs: Sequence[Run]) -> str:
    """Standard deviation over seeds, in points."""
    return f"{100 * stdev(average([run])[0] for run in runs):.1f}" if len(runs) > 1 else DASH


def points(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    """A difference in points, with a real minus."""
    return f"{100 * value:+.1f}".replace("-", "−")
