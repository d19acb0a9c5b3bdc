"""The effect of training with dropping on scores: models of one way of training, pooled over seeds, against those
trained with nothing dropped.

Part of `python -m analysis trainings` if the trained models were scored (experiments/training.yaml). A model belongs to
the training whose folder is in its path. Differences are paired: the same samples, the same seeds of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from ..comparison.resampling import run_draws
from ..grid import DASH, Grid, Text
from ..statistics import Estimate, FloatArray, interval, over_seeds
from ..store.load import Run, experiments, load_experiment
from ..style import method_name, schedule_text
from ..tables.text import percent, signed

EXPERIMENT = "training"


class Way(NamedTuple):
    """One way of dropping, in training or when scored."""

    method: str
    schedule: str = ""
    positions: str = ""
    method_args: str = ""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Way:
        """The way in a run's or a training's settings; everything that drops nothing is one way."""
        if not spec["schedule"]:
            return WHOLE
        told = {name: value for name, value in json.loads(spec["method_args"]).items() if name != "seed"}
        return cls(spec["method"], spec["schedule"], spec["positions"], json.dumps(told, sort_keys=True))


WHOLE = Way("none")
ALIKE = f"score them alike (python -m pdrop.training.commands), or delete one of them in experiments/{EXPERIMENT}"
START = Way("not fine-tuned")  # not a way of training: the model that all started from

READING = """**whole** is the average over the tasks with nothing dropped, **± sd** its standard deviation over seeds,
**Δ whole** the difference to the models of the same seeds trained with nothing dropped. **dropped** is the average when
the model drops as it was trained, **plain** that of the models of the same seeds trained with nothing dropped when they
drop so, and **gain** what having been trained that way adds. **start** is the model that all began with when it drops
so, and **over start** what the training adds to that. In points, with 95 % intervals (paired bootstrap over images, and
over seeds where there are several: three say little of others; rows of a single seed show nothing of them).
"""


@dataclass
class Trained:
    """One way of training: seed -> (way of scoring -> run)."""

    way: Way
    seeds: dict[int, dict[Way, Run]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The scores of one way of training, as fractions pooled over its seeds; None if they were not measured.

    Attributes:
        way: Method and schedule it was trained with.
        seeds: How many of its models were scored with nothing dropped.
        whole: Average over the tasks with nothing dropped.
        deviation: Standard deviation of `whole` over seeds; None for a single one.
        loss: `whole` minus that of the models of the same seeds trained with nothing dropped.
        dropped: Average when the model drops as it was trained.
        plain: Average of the models trained with nothing dropped when they drop so.
        gain: `dropped` minus `plain`, over the seeds that have both.
        start: Average of the model that all started from when it drops this way.
        over_start: `dropped` minus `start`.
    """

    way: Way
    seeds: int
    whole: float | None
    deviation: float | None = None
    loss: Estimate | None = None
    dropped: float | None = None
    plain: float | None = None
    gain: Estimate | None = None
    start: float | None = None
    over_start: Estimate | None = None


def page(results: Path, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the scores; empty if none of the trained models was scored.

    Args:
        results: The store.
        records: Folder -> training record, of trainings that differ only in method, schedule and seed.
    """
    found = outcomes(results, records)
    if not found:
        return ""
    head = ["method", "schedule", "seeds", "whole", "± sd", "Δ whole [95 %]", "dropped", "plain", "gain [95 %]"]
    head += ["start", "over start [95 %]"]
    table = Grid("what they score", head, left=2)
    for one in found:
        deviation = DASH if one.deviation is None else f"{100 * one.deviation:.1f}"
        several = len({other.way.positions for other in found if other.way[:2] == one.way[:2]}) > 1
        kind = f"{method_name(one.way.method)}, {one.way.positions}" if several else method_name(one.way.method)
        cells = [kind, schedule_text(one.way.schedule) or DASH, str(one.seeds or DASH), percent(one.whole)]
        cells += [deviation, signed(one.loss), percent(one.dropped), percent(one.plain), signed(one.gain)]
        cells += [percent(one.start), signed(one.over_start)]
        table.rows.append([Text(cell) for cell in cells])
    return f"{table.titled()}\n{READING}"


def outcomes(results: Path, records: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    """One per way of training, nothing dropped first; empty if none of the trained models was scored.

    Raises:
        ValueError: If models that are compared answered different samples.
    """
    found, start = ways(results, records)
    if WHOLE not in found or not any(found[WHOLE].seeds.values()):
        return []
    order = sorted(found.values(), key=lambda one: (one.way != WHOLE, one.way))
    before = [Outcome(START, 0, mean([start[WHOLE]]))] if WHOLE in start else []
    return before + [outcome(one, found[WHOLE], start) for one in order if any(one.seeds.values())]


def ways(results: Path, records: Mapping[str, Mapping[str, Any]]) -> tuple[dict[Way, Trained], dict[Way, Run]]:
    """The scores of each way of training, and those of the model that all started from."""
    scored: dict[str, dict[Way, Run]] = {}
    start: dict[Way, Run] = {}
    begun = {record["spec"]["model_fingerprint"] for record in records.values()}
    for run in load_experiment(results, EXPERIMENT).runs if EXPERIMENT in experiments(results) else ():
        spec = run.record.spec
        if not run.done:
            continue
        if Path(spec.model_path).parent.name in records:
            into = scored.setdefault(Path(spec.model_path).parent.name, {})
        elif spec.model_fingerprint in begun:
            into = start
        else:
            continue
        other = into.setdefault(Way.of(vars(spec)), run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {run.folder} score one model in one way: delete one in experiments/{EXPERIMENT}"
            )
    found: dict[Way, Trained] = {}
    for folder, record in records.items():
        spec = record["spec"]
        way = Way.of(spec)
        found.setdefault(way, Trained(way)).seeds[spec["seed"]] = scored.get(folder, {})
    return found, start


def outcome(trained: Trained, plain: Trained, start: Mapping[Way, Run]) -> Outcome:
    """One way of training against the one with nothing dropped, and against the model that both started from."""
    whole = {seed: runs[WHOLE] for seed, runs in trained.seeds.items() if WHOLE in runs}
    alone = [averages([run])[0][0] for run in whole.values()]
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
        mean([start[trained.way]]) if trained.way in start else None,
        difference(dropped, dict.fromkeys(dropped, start[trained.way])) if trained.way in start else None,
    )


def mean(runs: Iterable[Run]) -> float | None:
    """Mean over tasks, runs and samples; None without a run."""
    found = list(runs)
    return fmean(averages(found)[0]) if found else None


def averages(runs: Sequence[Run]) -> tuple[list[float], FloatArray]:
    """Each run's mean over tasks and samples [runs], and its draws [draws, runs].

    Raises:
        ValueError: If the runs answered different samples, or a metric is not a number for each sample.
    """
    first, tasks = runs[0], sorted(runs[0].record.results)
    values, draws = [], []
    for run in runs[1:]:
        if sorted(run.record.results) != tasks:
            raise ValueError(f"{first.folder} and {run.folder} answered different tasks: {ALIKE}")
    for task in tasks:
        samples = [run.samples(task) for run in runs]
        for run, one in zip(runs, samples):
            if one.doc_ids != samples[0].doc_ids:
                raise ValueError(f"{task}: {first.folder} and {run.folder} answered different samples: {ALIKE}")
        drawn = run_draws(runs, task)
        for run, found in zip(runs, drawn):
            if found is None:
                raise ValueError(f"{task}: {run.folder} does not say what its score is made of")
        values.append([run.score(task) for run in runs])
        draws.append(np.stack([one for one in drawn if one is not None], axis=1))
    return [float(value) for value in np.mean(values, axis=0)], np.mean(draws, axis=0)


def difference(mine: Mapping[int, Run], theirs: Mapping[int, Run]) -> Estimate | None:
    """Mine minus theirs over the seeds that both have; None without such a seed. Images and seeds are resampled.

    Raises:
        ValueError: If they answered different samples.
    """
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    values, draws = averages([mine[seed] for seed in seeds] + [theirs[seed] for seed in seeds])
    number = len(seeds)
    found = over_seeds(draws[:, :number] - draws[:, number:])
    return Estimate(fmean(values[:number]) - fmean(values[number:]), *interval(found))
