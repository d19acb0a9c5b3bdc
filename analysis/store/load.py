"""Reads runs from a results folder.

    results/runs/<folder>/record.json            one run (pdrop.record.RunRecord)
    results/runs/<folder>/samples.zip            its samples (pdrop/samples.py)
    results/experiments/<name>/<folder>          a marker: experiment <name> asked for this run; holds its overrides

An experiment is a list of runs, and a table shows one experiment. The name "all" is the whole store. A run that was
made again after the weights, the packages or the code changed is another run; the older one stays in the store, but not
in tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pdrop.commands import typed
from pdrop.names import check
from pdrop.record import RunRecord, RunSpec, canonical_json
from pdrop.samples import samples_file

from ..statistics import FloatArray, first_seen
from .samples import Sample, read

ALL = "all"
MEANS = ("exact_match",)  # metrics that are plain means of their samples, for records that do not say it
AGES = ("model_fingerprint", "versions", "code", "task_files", "format")  # what changes without being asked for


@dataclass(frozen=True)
class Parts:
    """The parts of a score that is not a plain mean: numerators and denominators [samples], and their strata."""

    above: FloatArray
    below: FloatArray
    strata: tuple[str, ...]

    @property
    def score(self) -> float:
        """The sum over strata of the quotient of sums."""
        codes = first_seen(self.strata)
        tops, bottoms = np.bincount(codes, self.above), np.bincount(codes, self.below)
        return float(np.divide(tops, bottoms, out=np.zeros_like(tops), where=bottoms != 0).sum())


@dataclass(frozen=True)
class Samples:
    """One task's samples of one run that a metric counts, by rising doc_id.

    Attributes:
        doc_ids: The documents' ids.
        values: Each sample's own number [samples]; None if a single sample has none.
        clusters: What a sample shares with others of any task: its image, its group, or only itself.
        parts: The parts of the score, if it is not the mean of the values.
    """

    doc_ids: tuple[str, ...]
    values: FloatArray | None
    clusters: tuple[str, ...]
    parts: Parts | None = None


@dataclass
class Run:
    """A record, its folder, and the overrides in the experiment's marker."""

    record: RunRecord
    path: Path
    overrides: Mapping[str, str] = field(default_factory=dict)
    _samples: dict[tuple[str, str], Samples] = field(default_factory=dict, repr=False)
    _read: dict[str, list[Sample]] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> str:
        """The folder's name under results/runs/, by which messages name a run."""
        return self.path.name

    @property
    def done(self) -> bool:
        """Whether its numbers may be shown."""
        return self.record.status == "done"

    @property
    def drops(self) -> bool:
        """Whether any visual tokens are dropped."""
        return self.record.spec.schedule != ""

    def score(self, task: str, metric: str | None = None) -> float:
        """A metric of the task, by default the main one; percentages as fractions, points unchanged."""
        result = self.record.results[task]
        return result.share(metric or result.main_metric)

    def samples(self, task: str, metric: str | None = None) -> Samples:
        """The samples of a task with their values of a metric, by default the main one.

        Raises:
            ValueError: If the file is missing, unreadable, or holds other samples than the record counts.
        """
        result = self.record.results[task]
        metric = metric or result.main_metric
        if (task, metric) not in self._samples:
            percentage = result.full(metric) == 100
            found = columns(self.read(task), task, metric, 0.01 if percentage else 1.0)
            self.compare(found, task, metric)
            self._samples[task, metric] = found
        return self._samples[task, metric]

    def compare(self, found: Samples, task: str, metric: str) -> None:
        """Compare a plain mean with its samples.

        Raises:
            ValueError: If the record's value differs.
        """
        said = self.record.results[task].scores[metric]
        known = said.mean if said.mean is not None else metric in MEANS
        if known and found.values is not None and len(found.values):
            mean = float(found.values.mean())
            if not math.isclose(mean, said.value, rel_tol=1e-6, abs_tol=1e-6):
                raise ValueError(
                    f"{self.path / 'record.json'} says {task} {metric} {said.value:.6g}, but the mean of its "
                    f"samples is {mean:.6g}: one of them was edited, or is damaged; run it again with force=true"
                )

    def read(self, task: str) -> list[Sample]:
        """The samples of a task, by rising doc_id.

        Raises:
            ValueError: As for `samples`.
        """
        if task not in self._read:
            found, counted = read(self.path, self.record, task), self.record.results[task].n
            if len(found) != counted or len({sample.doc_id for sample in found}) != counted:
                raise ValueError(
                    f"{samples_file(self.path, task)} holds {len({sample.doc_id for sample in found})} different "
                    f"samples in {len(found)} lines, but the record scored {counted}: run it again with force=true"
                )
            self._read[task] = sorted(
                found, key=lambda one: (1, 0, one.doc_id) if one.number is None else (0, one.number, "")
            )
        return self._read[task]


def columns(samples: Sequence[Sample], task: str, metric: str, scale: float = 1.0) -> Samples:
    """The data of a task's samples that statistics need for a metric.

    Args:
        samples: The samples by rising doc_id.
        task: Their task.
        metric: Samples that it does not count are left out (such as MME's cognition questions for perception).
        scale: The factor of the parts.
    """
    parted = any(metric in sample.parts for sample in samples)
    counted = [one for one in samples if metric in (one.parts if parted else one.scores)]
    values = [one.scores[metric] for one in counted if metric in one.scores]
    parts = None
    if parted:
        above, below, strata = zip(*(one.parts[metric] for one in counted))
        parts = Parts(scale * np.array(above), np.array(below), strata)
    elif not counted:
        counted = list(samples)
    return Samples(
        doc_ids=tuple(one.doc_id for one in counted),
        values=np.array(values) if len(values) == len(counted) else None,
        clusters=tuple(clusters_of(counted, task)),
        parts=parts,
    )


def clusters_of(samples: Sequence[Sample], task: str) -> list[str]:
    """The name of each sample's cluster, which is drawn as one: its image, with the images of its group."""
    images = [f"{task} {one.doc_id}" if one.image is None else one.image for one in samples]
    first: dict[str, str] = {}  # image or group -> another image of its cluster

    def root(name: str) -> str:
        while first.get(name, name) != name:
            name = first[name]
        return name

    for one, image in zip(samples, images):
        if one.group is not None:
            mine, group = root(image), f"group {task} {one.group}"
            other = root(first.setdefault(group, mine))
            first[max(mine, other)] = min(mine, other)
    return [root(image) for image in images]


def samples_of(run: Run, task: str) -> dict[str, Sample]:
    """The samples of a task by doc_id, in the file's order.

    Raises:
        ValueError: If the run has no such task, or its file is missing or holds something else.
    """
    return {sample.doc_id: sample for sample in read(run.path, run.record, task)}


@dataclass
class Experiment:
    """The runs that an experiment asked for: those with a record, and the folders of those without."""

    name: str
    results: Path
    runs: list[Run]
    superseded: int = 0  # runs left out because they were made again
    missing: list[str] = field(default_factory=list)


def experiments(results: Path) -> list[str]:
    """Names of the experiments of a results folder, sorted."""
    folder = results / "experiments"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def load_runs(results: Path, unreadable: list[str] | None = None) -> list[Run]:
    """All runs of a results folder, by folder name.

    Args:
        results: The folder.
        unreadable: Gets the messages about records that cannot be read; the others are then loaded all the same.

    Raises:
        ValueError: If a record cannot be read, and `unreadable` is not given.
    """
    found = []
    for path in sorted(results.glob("runs/*/record.json")):
        try:
            found.append(Run(RunRecord.read(path.parent), path.parent))
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))
    return found


def load_experiment(results: Path, name: str, unreadable: list[str] | None = None) -> Experiment:
    """The runs that an experiment asked for; of runs that were made again with other weights or code, the newest.

    Args:
        results: The results folder.
        name: The experiment, or "all".
        unreadable: As for `load_runs`.

    Raises:
        ValueError: If there is no such experiment, nothing was run, or a record or marker cannot be read.
    """
    if name == ALL:
        runs = load_runs(results, unreadable)
        if not runs:
            raise ValueError(f"no run under {results / 'runs'}: start with {typed('run')}")
        return Experiment(name, results, *newest(runs))
    folder = results / "experiments" / check("an experiment", name)
    if not folder.is_dir():
        known = ", ".join([*experiments(results), ALL])
        raise ValueError(f"no experiment {name!r} under {results / 'experiments'}; there are: {known}")
    found, missing = [], []
    for marker in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        path = results / "runs" / marker.name.removesuffix(".json")
        if not (path / "record.json").is_file():
            missing.append(path.name)
            continue
        try:
            found.append(Run(RunRecord.read(path), path, read_overrides(marker)))
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))
    if not found:
        raise ValueError(f"experiment {name!r} has no run with a record yet ({len(missing)} asked for)")
    return Experiment(name, results, *newest(found), missing)


def newest(runs: Sequence[Run]) -> tuple[list[Run], int]:
    """Of runs whose specs differ only in `AGES`, the one that was started last; and the number of others."""
    latest: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.record.started_at, run.folder)):
        latest[without(run.record.spec, AGES)] = run
    kept = {id(run) for run in latest.values()}
    return [run for run in runs if id(run) in kept], len(runs) - len(kept)


def without(spec: RunSpec, names: Iterable[str]) -> str:
    """The spec as canonical JSON without some of its fields."""
    return canonical_json({name: value for name, value in asdict(spec).items() if name not in names})


def read_overrides(marker: Path) -> dict[str, str]:
    """A marker's overrides: JSON, either a list of "key=value" or an object; an empty file has none.

    Raises:
        ValueError: If it is neither.
    """
    text = marker.read_text(encoding="utf8").strip()
    try:
        data: Any = json.loads(text) if text else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{marker} is not JSON ({error})") from error
    if isinstance(data, dict):
        data = data.get("overrides", data)
    if isinstance(data, dict):
        return {str(key): str(value) for key, value in data.items()}
    if isinstance(data, list):
        return {key: value for key, _, value in (str(entry).partition("=") for entry in data)}
    raise ValueError(f"{marker} holds neither a list of overrides nor an object")


def timing(run: Run) -> dict[str, Any]:
    """What a run measured in addition to its prefill; empty without such measurements."""
    cost = run.record.cost
    return cost.timing or {} if cost is not None else {}


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Task -> the runs that have it, tasks in the order they are first seen."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        for task in run.record.results:
            found.setdefault(task, []).append(run)
    return found
