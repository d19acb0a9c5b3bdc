"""The parts of a table: columns (tasks), rows (runs that differ only in the seed), cells. A missing value stays None.

compare.py fills the cells; analysis/tables and analysis/studies show them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from pdrop.record import RunSpec

from ..statistics import Estimate, Flips
from ..store.load import AGES, Run, by_task, without
from .budgets import budgets

Mark = Literal["", "best", "second"]


@dataclass
class Cell:
    """A row's score on one task, or its average: fractions 0..1 for most metrics, points for some (MME)."""

    score: Estimate
    delta: Estimate | None = None  # to the row that drops nothing
    flips: Flips | None = None  # to the same; None for metrics that are not right or wrong, and for pooled seeds
    mark: Mark = ""


@dataclass(frozen=True)
class Likeness:
    """How similar two rows' answers are: the share of equal ones, and the overlap of character n-grams, 0 to 1."""

    same: Estimate
    chrf: float
    n: int


@dataclass
class Row:
    """One row: the runs it pools and their results. Cost fields are means over the pooled runs."""

    runs: list[Run]
    budget: str  # "" where nothing is dropped
    status: str
    cells: dict[str, Cell] = field(default_factory=dict)
    average: Cell | None = None
    spread: float | None = None  # standard deviation of the average over seeds
    # difference to the average of its random twin's seeds, which are drawn too; its p: twice the median over the seeds
    against_random: Estimate | None = None
    random_seeds: int = 0  # how many those are
    random_band: tuple[float, float] | None = None  # their lowest and highest average
    share_of_none: float | None = None  # average / average of the row that drops nothing
    floor_to_full: float | None = None  # 0: no image (or else the blind guess), 1: nothing dropped
    time: Estimate | None = None  # prefill time ratio
    likeness: dict[str, Likeness] = field(default_factory=dict)  # by task, to the answers without dropping
    likeness_mean: Likeness | None = None
    rules: dict[tuple[str, str], Estimate] = field(default_factory=dict)  # by task and metric other than its main one

    @property
    def spec(self) -> RunSpec:
        """The first run's; the others differ in the seed alone."""
        return self.runs[0].record.spec

    @property
    def drops(self) -> bool:
        """Whether visual tokens are dropped."""
        return self.runs[0].drops

    @property
    def told_from_random(self) -> Literal["", "above", "below", "not distinguishable", "no verdict"]:
        """The verdict on the difference to the random twin; "" without twin or interval; one seed is no verdict."""
        if self.against_random is None or self.against_random.low is None:
            return ""
        if self.against_random.anecdote:
            return "no verdict"
        words: dict[int, Literal["above", "below", "not distinguishable"]]
        words = {1: "above", -1: "below", 0: "not distinguishable"}
        return words[self.against_random.sign]

    @property
    def blind(self) -> bool:
        """Whether no visual token enters the decoder: the measured floor."""
        return self.spec.schedule in ("0:0", "0:0t")

    def invalid(self, task: str) -> float | None:
        """The number of answers that no rule of the task reads, mean over seeds; None if they were not counted."""
        counts = [run.record.results[task].invalid if task in run.record.results else None for run in self.runs]
        return mean_or_none(counts)

    def cost(self, name: str) -> float | None:
        """Mean over the pooled runs of a field of `pdrop.record.Cost`; None if a run has no cost."""
        values = [getattr(run.record.cost, name) for run in self.runs if run.record.cost is not None]
        return fmean(values) if len(values) == len(self.runs) else None

    @property
    def visual_tokens(self) -> float | None:
        """The mean number of visual tokens that enter a layer."""
        layers = [run.record.cost.visual_tokens_per_layer for run in self.runs if run.record.cost is not None]
        return fmean(fmean(tokens) for tokens in layers) if layers and all(layers) else None


@dataclass(frozen=True)
class Task:
    """A column: one task, one metric, over `n` samples of `n_total`."""

    name: str
    metric: str
    n: int
    n_total: int
    fraction: bool  # every score is a fraction of a full score, and so is shown in %
    higher_is_better: bool

    @property
    def averaged(self) -> bool:
        """Whether the task enters the average: points and errors do not mix with fractions."""
        return self.fraction and self.higher_is_better


@dataclass
class Table:
    """An experiment, or a part of one, ready to be shown. `name` is the stem of its files."""

    name: str
    rows: list[Row]
    tasks: dict[str, Task]
    floors: dict[str, float]  # blind guesses, of those tasks that have one
    missing: list[str]  # folders the experiment asked for, without a record
    times: bool
    title: str = ""
    superseded: int = 0  # runs left out because they were made again

    @property
    def averaged(self) -> list[str]:
        """The tasks that the average is over."""
        return [name for name, task in self.tasks.items() if task.averaged]

    @property
    def floor(self) -> float | None:
        """The average of the blind guesses; None if an averaged task has none."""
        return mean_or_none([self.floors.get(task) for task in self.averaged])

    @property
    def scaled(self) -> bool:
        """Whether any row is placed between floor and full."""
        return any(row.floor_to_full is not None for row in self.rows)

    @property
    def models(self) -> list[str]:
        """The models, in the order of the rows."""
        return list(dict.fromkeys(row.spec.model for row in self.rows))

    @property
    def runs(self) -> list[Run]:
        """All runs of the rows."""
        return [run for row in self.rows for run in row.runs]


def pool(runs: Sequence[Run]) -> list[Row]:
    """Rows with pooled seeds: nothing dropped first, then from the mildest budget to the hardest, methods by name.

    Runs that were asked with different seeds and otherwise alike are pooled.
    """
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.record.spec.seed):
        spec = run.record.spec
        asked = without(spec, {"seed", "method_args", *AGES})
        groups.setdefault((asked, seedless(spec), "" if run.done else run.folder), []).append(run)
    rows = []
    for model in sorted({run.record.spec.model for run in runs}):
        those = [pooled for pooled in groups.values() if pooled[0].record.spec.model == model]
        rows += in_order(those)
    return rows


def in_order(pooled: Sequence[list[Run]]) -> list[Row]:
    """The rows of one model."""
    named = [(Row(runs, budget, runs[0].record.status), at) for runs, (budget, at) in zip(pooled, budgets(pooled))]
    mildness: dict[str, float] = {}
    for row, _ in named:
        mildness[row.budget] = max(mildness.get(row.budget, 0.0), row.cost("mean_keep") or 0.0)

    def order(entry: tuple[Row, tuple[int, ...]]) -> tuple[object, ...]:
        row, at = entry
        ratio = float(row.budget) if row.budget.replace(".", "", 1).isdigit() else -1.0
        return (row.drops, at, -ratio, -mildness[row.budget], row.budget, row.spec.method, str(row.runs[0].path))

    return [row for row, _ in sorted(named, key=order)]


def seedless(spec: RunSpec) -> str:
    """The method's arguments without its seed, as JSON."""
    arguments = json.loads(spec.method_args or "{}")
    return json.dumps({name: value for name, value in arguments.items() if name != "seed"}, sort_keys=True)


def describe_tasks(runs: Sequence[Run]) -> dict[str, Task]:
    """The columns, in the order in which the runs asked for them."""
    found = {}
    for name, having in by_task(runs).items():
        result = having[0].record.results[name]
        metric = result.main_metric
        score = result.scores[metric]
        found[name] = Task(name, metric, score.n, result.n_total, is_fraction(having, name), score.higher_is_better)
    return found


def is_fraction(runs: Sequence[Run], task: str) -> bool:
    """Whether a task's main score is a fraction of a full score.

    A record says what a full score is. If none does (older ones, a user's task without a right answer), values from 0
    to 1 are taken for fractions, unless all are 0: these may as well be percentages or points.
    """
    known = {full for run in runs if (full := run.record.results[task].full(run.record.results[task].main_metric))}
    if known:
        return known <= {1.0, 100.0}
    values = [run.score(task) for run in runs]
    return all(0 <= value <= 1 for value in values) and any(values)


def in_all(row: Row, task: str) -> bool:
    """Whether every pooled run has the task."""
    return all(task in run.record.results for run in row.runs)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean; None if there is no value or one is missing: a mean over fewer tasks is another quantity."""
    there = [value for value in values if value is not None]
    return fmean(there) if there and len(there) == len(values) else None
