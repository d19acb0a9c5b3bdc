"""Which differences between runs are real: paired bootstrap over samples, exact McNemar test on flips.

All runs of a table answered the same samples, so they are compared sample by sample. One draw of the bootstrap picks
samples (whole images, where several questions share one) with replacement and re-scores EVERY run on that draw; any
difference between two runs is then taken within the draw, which pairs it. An average over tasks draws within each
task, because the tasks are fixed and only their samples are a random choice.

    draws = replicates("pope", values, groups)      # [draws, runs]
    interval(draws[:, 1] - draws[:, 0])             # 95 % interval of run 1 minus run 0

Sources: Efron and Tibshirani 1993, chapter 13 (percentile interval); Koehn 2004 (paired); McNemar 1947 (exact form).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
DRAWS = 5000
SEED = 0
LEVEL = 0.95
BLOCK = 4_000_000  # numbers drawn at once: bounds the memory for tasks of ten thousand samples


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; `low` and `high` are None where no interval can be given."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval lies on one side of zero (never for an interval that cannot be given)."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval is clear of zero, otherwise 0."""
        return 0 if not self.clear else (1 if self.value > 0 else -1)


@dataclass(frozen=True)
class Flips:
    """Samples that one run gets right and the other wrong: `lost` right -> wrong, `gained` wrong -> right."""

    lost: int
    gained: int

    @property
    def p(self) -> float:
        """Exact two-sided McNemar test: how likely so uneven a split is if both directions are equally likely."""
        return mcnemar(self.lost, self.gained)

    def __add__(self, other: Flips) -> Flips:
        return Flips(self.lost + other.lost, self.gained + other.gained)


def replicates(
    task: str,
    values: FloatArray,
    groups: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> FloatArray:
    """Means of every run under resampling of the samples, the same draw for all runs.

    The draws depend on the task's name, the number of groups and the seed alone: an interval does not change because
    another run joined the table.

    Args:
        task: Name of the task.
        values: Per-sample values [samples, runs], no NaN.
        groups: The image of each sample [samples]; samples of one image are drawn together. None: each on its own.
        draws: Number of draws.
        seed: Seed.

    Returns:
        Means [draws, runs].

    Raises:
        ValueError: If there is no sample, or a value is no number.
    """
    samples, runs = values.shape
    if samples == 0:
        raise ValueError(f"task {task}: no sample to resample")
    if not np.isfinite(values).all():
        raise ValueError(f"task {task}: a sample's value is no finite number")
    codes = first_seen(groups) if groups is not None else np.arange(samples)
    clusters = int(codes.max()) + 1
    sums = np.zeros((clusters, runs))
    np.add.at(sums, codes, values)
    sizes = np.bincount(codes, minlength=clusters).astype(float)
    generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
    means = np.empty((draws, runs))
    block = max(1, BLOCK // clusters)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        picked = generator.integers(0, clusters, (size, clusters))
        rows = np.arange(size)[:, None] * clusters
        counts = np.bincount((picked + rows).ravel(), minlength=size * clusters).reshape(size, clusters).astype(float)
        means[start : start + size] = (counts @ sums) / (counts @ sizes)[:, None]
    return means


def first_seen(labels: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Number the labels 0, 1, ... in the order they are first seen [samples]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def interval(draws: FloatArray, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the draws [draws]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # equal answers give differences of 1e-17, not 0: they must not look like a clear difference
    return round(float(low), 12), round(float(high), 12)


def flips(before: FloatArray, after: FloatArray) -> Flips | None:
    """Count flips between two runs' right/wrong values [samples]; None if the values are not all 0 or 1."""
    if not (np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()):
        return None
    return Flips(int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum()))


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of the exact McNemar test, that is of a fair coin falling at least so unevenly.

    Raises:
        ValueError: If a count is negative.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"flips are counts, not {lost} and {gained}")
    total, fewer = lost + gained, min(lost, gained)
    if total == 0:
        return 1.0
    term = tail = 1
    for k in range(1, fewer + 1):
        term = term * (total - k + 1) // k
        tail += term
    return (
        min(1.0, 2 * tail / 2**total) if total < 1000 else min(1.0, math.exp(math.log(2 * tail) - total * math.log(2)))
    )
