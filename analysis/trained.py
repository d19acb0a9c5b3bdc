"""What training with dropping does to scores: models of one way of training pooled over their seeds, against those
trained with nothing dropped.

Part of `python -m analysis trainings` where the trained models were scored (experiments/training.yaml). A model belongs
to the training whose folder its path names. Differences are paired: the same samples, the same seeds of training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from analysis.grid import DASH, Grid, Text
from analysis.load import Run, experiments, load_experiment
from analysis.statistics import Estimate, FloatArray, interval, replicates
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


@dataclass(frozen=True)
class Outcome:
    """What one way of training came to, as fractions pooled over its seeds; None where it was not scored so.

    Attributes:
        way: Method and schedule it was trained with.
        seeds: How many of its models were scored with nothing dropped.
        whole: Average over the tasks with nothing dropped.
        deviation: Standard deviation of `whole` over seeds; None for a single one.
        loss: `whole` minus that of the models of the same seeds trained with nothing dropped.
        dropped: Average when the model drops as it was trained.
        untrained: Average of the models trained with nothing dropped when they drop so.
        gain: `dropped` minus `untrained`, over the seeds that have both.
    """

    way: Way
    seeds: int
    whole: float | None
    deviation: float | None = None
    loss: Estimate | None = None
    dropped: float | None = None
    untrained: float | None = None
    gain: Estimate | None = None


def page(results: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the scores; empty where none of the trained models was scored.

    Args:
        results: The store.
        records: Folder -> training record, of trainings that differ in method, schedule and seed alone.
    """
    found = outcomes(results, records)
    if not found:
        return ""
    head = ["method", "schedule", "seeds", "whole", "± sd", "Δ whole [95 %]", "dropped", "untrained", "gain [95 %]"]
    table = Grid("what they score", head, left=2)
    for one in found:
        deviation = DASH if one.deviation is None else f"{100 * one.deviation:.1f}"
        cells = [method_name(one.way[0]), schedule_text(one.way[1]) or DASH, str(one.seeds), points(one.whole)]
        cells += [deviation, signed(one.loss), points(one.dropped), points(one.untrained), signed(one.gain)]
        table.rows.append([Text(cell) for cell in cells])
    return f"{table.titled()}\n{READING}"


def outcomes(results: Path, records: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """One a way of training, what drops nothing first; empty where none of the trained models was scored.

    Raises:
        ValueError: If models that are held against each other answered different samples.
    """
    found = ways(results, records)
    if WHOLE not in found or not any(found[WHOLE].seeds.values()):
        return []
    order = sorted(found.values(), key=lambda one: (one.way != WHOLE, one.way))
    return [outcome(one, found[WHOLE]) for one in order if any(one.seeds.values())]


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


def outcome(trained: Trained, plain: Trained) -> Outcome:
    """One way of training against that with nothing dropped."""
    whole = {seed: runs[WHOLE] for seed, runs in trained.seeds.items() if WHOLE in runs}
    alone = [average([run])[0] for run in whole.values()]
    deviation = stdev(alone) if len(alone) > 1 else None
    if trained is plain:
        return Outcome(trained.way, len(whole), mean(whole.values()), deviation)
    before = {seed: runs[WHOLE] for seed, runs in plain.seeds.items() if WHOLE in runs}
    dropped = {seed: runs[trained.way] for seed, runs in trained.seeds.items() if trained.way in runs}
    alike = {seed: runs[trained.way] for seed, runs in plain.seeds.items() if trained.way in runs}
    return Outcome(
        trained.way,
        len(whole),
        mean(whole.values()),
        deviation,
        difference(whole, before),
        mean(dropped.values()),
        mean(run for seed, run in alike.items() if seed in dropped),
        difference(dropped, alike),
    )


def mean(runs: Iterable[Run]) -> float | None:
    """Mean over tasks, runs and samples; None without a run."""
    found = list(runs)
    return average(found)[0] if found else None


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


def difference(mine: Mapping[int, Run], theirs: Mapping[int, Run]) -> Estimate | None:
    """Mine minus theirs over the seeds that both have; None without such a seed."""
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    value, draws = average([mine[seed] for seed in seeds])
    other, others = average([theirs[seed] for seed in seeds])
    return Estimate(value - other, *interval(draws - others))


def points(value: float | None) -> str:
    """A fraction in percent."""
    return DASH if value is None else f"{100 * value:.1f}"


def signed(found: Estimate | None) -> str:
    """A difference in points with its interval, with real minuses."""
    if found is None:
        return DASH
    value, low, high = (f"{100 * (number or 0.0):+.1f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]".replace("-", "−")
