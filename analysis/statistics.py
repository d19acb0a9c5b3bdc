"""Which differences between runs are real: paired bootstrap over samples, exact McNemar test on flips.

All runs of a table answered the same samples, so they are compared sample by sample. One draw of the bootstrap picks
samples (whole images, if several questions share one) with replacement and scores EVERY run on that draw; differences
between runs are taken within the draw, which pairs them. An image has one count per draw, whichever task asks about it:
tasks that share images are resampled together, as an average over them needs. The tasks themselves are fixed.

    draws = replicates("gqa", values, images)       # [draws, runs]
    interval(draws[:, 1] - draws[:, 0])             # 95 % interval of run 1 minus run 0

A score that is not a mean over samples (F1, MME's pairs, MMBench's circular accuracy, a mean of categories) is
recomputed on every draw, from its numerators and denominators (`quotients`).

The counts are Poisson numbers of mean 1; given their sum they have the multinomial distribution of drawing with
replacement.

Sources: Efron and Tibshirani 1993, chapter 13 (percentile interval); Koehn 2004 (paired); Hanley and MacGibbon 2006
(Poisson counts); McNemar 1947 (exact form); DiCiccio, DiCiccio and Romano 2020 (twice the median of p values).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
DRAWS = 5000
SEED = 0
LEVEL = 0.95
BLOCK = 4_000_000  # counts held at once: bounds the memory for tasks of ten thousand samples
# number of a cluster by 16 random bits: Poisson of mean 1, exact to 2**-17
POISSON = np.searchsorted(
    np.cumsum([math.exp(-1) / math.factorial(k) for k in range(9)]), (np.arange(2**16) + 0.5) / 2**16
).astype(np.uint8)


@dataclass(frozen=True)
class Estimate:
    """A value, mostly a difference, with its evidence.

    Attributes:
        value: The value.
        low, high: Its 95 % interval; None if no interval can be given.
        p: p-value of the exact test of the same difference, if samples are right or wrong and each row is one run.
        anecdote: Whether it rests on a single seed of something random, and so is no evidence.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    anecdote: bool = False

    @property
    def clear(self) -> bool:
        """Whether it is distinguishable from zero: the one criterion of every verdict, arrow and mark.

        The interval must be on one side of zero, and the exact test, if there is one, must agree (p < 0.05). A
        percentile interval alone is overconfident with few flips: four lost and none gained are below zero in 98 % of
        the draws, and have p = 0.125.
        """
        if self.anecdote or self.low is None or self.high is None:
            return False
        return (self.low > 0 or self.high < 0) and (self.p is None or self.p < 1 - LEVEL)

    @property
    def sign(self) -> int:
        """-1 or 1 if the value is distinguishable from zero, otherwise 0."""
        return 0 if not self.clear else (1 if self.value > 0 else -1)


@dataclass(frozen=True)
class Flips:
    """Samples that one run gets right and the other wrong: `lost` right -> wrong, `gained` wrong -> right.

    `net` is gained - lost of each image, if images are known: flips of one image are not independent evidence.
    """

    lost: int
    gained: int
    net: Mapping[Hashable, int] | None = None

    @property
    def p(self) -> float:
        """Exact two-sided McNemar test: how likely so uneven a split is if both directions are equally likely.

        Where images are known, those of one image change direction together.
        """
        return mcnemar(self.lost, self.gained) if self.net is None else sign_flips(list(self.net.values()))

    def __add__(self, other: Flips) -> Flips:
        net = None
        if self.net is not None and other.net is not None:
            net = dict(Counter(self.net))
            for image, number in other.net.items():
                net[image] = net.get(image, 0) + number
        return Flips(self.lost + other.lost, self.gained + other.gained, net)


def replicates(
    name: str, values: FloatArray, clusters: Sequence[Hashable] | None = None, draws: int = DRAWS
) -> FloatArray:
    """Means of every run under resampling of the samples, the same draw for all runs and for all calls.

    How often a draw takes a cluster depends only on the cluster's name (`counts`). So calls with different tasks draw
    their common images equally often, and an interval does not change when another run or task joins the table.

    Args:
        name: What is resampled, such as the task.
        values: Per-sample values [samples, runs], no NaN.
        clusters: The image of each sample [samples]; samples of one image are drawn together. None: each on its own.
        draws: Number of draws.

    Returns:
        Means [draws, runs]. A draw that would take no cluster takes each once.

    Raises:
        ValueError: If there is no sample, or a value is not a number.
    """
    samples, runs = values.shape
    if samples == 0:
        raise ValueError(f"{name}: no sample to resample")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: a sample's value is not a finite number")
    labels = [f"{name} {number}" for number in range(samples)] if clusters is None else clusters
    codes, different = first_seen(labels), list(dict.fromkeys(labels))
    sums = np.zeros((len(different), runs))
    np.add.at(sums, codes, values)
    sizes = np.bincount(codes).astype(float)
    totals, taken = np.zeros((draws, runs)), np.zeros(draws)
    for those, drawn in drawn_counts(different, draws):
        totals += drawn @ sums[those]
        taken += drawn @ sizes[those]
    totals[taken == 0], taken[taken == 0] = sums.sum(axis=0), float(samples)
    return totals / taken[:, None]


def quotients(
    name: str,
    above: FloatArray,
    below: FloatArray,
    strata: Sequence[Hashable],
    clusters: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
) -> FloatArray:
    """Scores of every run under resampling of the samples: the sum over strata of a quotient of sums.

    Args:
        name: What is resampled, such as the task.
        above, below: Each sample's part of numerator and denominator [samples, runs], no NaN.
        strata: The stratum of each sample [samples].
        clusters: As for `replicates`.
        draws: Number of draws.

    Returns:
        Scores [draws, runs]. A draw that takes nothing from a stratum has the quotient over all its samples there.

    Raises:
        ValueError: If there is no sample, or a part is not a number.
    """
    if not len(above) or not np.isfinite(above).all() or not np.isfinite(below).all():
        raise ValueError(f"{name}: no sample to resample, or a sample's part is not a finite number")
    labels = np.array([f"{name} {place}" if clusters is None else str(clusters[place]) for place in range(len(above))])
    found, runs = np.zeros((draws, above.shape[1])), above.shape[1]
    of_stratum = first_seen(strata)
    for stratum in range(of_stratum.max() + 1):
        inside = of_stratum == stratum
        columns, mine = np.hstack([above[inside], below[inside]]), labels[inside].tolist()
        sums = np.zeros((len(set(mine)), 2 * runs))
        np.add.at(sums, first_seen(mine), columns)
        totals = np.zeros((draws, 2 * runs))
        for those, drawn in drawn_counts(list(dict.fromkeys(mine)), draws):
            totals += drawn @ sums[those]
        tops, bottoms, whole = totals[:, :runs], totals[:, runs:], sums.sum(axis=0)
        empty = bottoms == 0
        tops = np.where(empty, whole[:runs], tops)
        bottoms = np.where(empty, whole[runs:], bottoms)
        found += np.divide(tops, bottoms, out=np.zeros_like(tops), where=bottoms != 0)
    return found


def drawn_counts(clusters: Sequence[Hashable], draws: int) -> Iterator[tuple[slice, FloatArray]]:
    """Yield, block by block, which clusters, and how often each draw takes them [draws, clusters]."""
    block = max(1, BLOCK // draws)
    for start in range(0, len(clusters), block):
        those = slice(start, start + block)
        yield those, drawn_together(tuple(clusters[those]), draws).astype(float)


@functools.lru_cache(maxsize=32)  # every run and every table asks for the same images again
def drawn_together(clusters: tuple[Hashable, ...], draws: int) -> npt.NDArray[np.uint8]:
    """How often each draw takes each cluster [draws, clusters]."""
    return np.stack([counts(label, draws) for label in clusters], axis=1)


def counts(label: Hashable, draws: int = DRAWS) -> npt.NDArray[np.uint8]:
    """How often each draw takes the cluster of this name [draws]: independent Poisson numbers of mean 1.

    They are read from a hash of the name, so they are the same on every machine and in every table.
    """
    stream = hashlib.shake_128(f"{SEED} {label}".encode()).digest(2 * draws)
    drawn: npt.NDArray[np.uint8] = POISSON[np.frombuffer(stream, dtype="<u2")]
    return drawn


def first_seen(labels: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Number the labels 0, 1, ... in the order they are first seen [samples]."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def over_seeds(draws: FloatArray) -> FloatArray:
    """Means over seeds that are resampled with replacement in each draw: [draws, seeds] -> [draws]."""
    chosen: npt.NDArray[np.int64] = np.random.default_rng(SEED).integers(draws.shape[1], size=draws.shape)
    found: FloatArray = np.take_along_axis(draws, chosen, axis=1).mean(axis=1)
    return found


def interval(draws: FloatArray, level: float = LEVEL) -> tuple[float, float]:
    """The 95 % percentile interval of the draws [draws]."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # equal answers give differences of 1e-17 instead of 0, which must not count as a clear difference
    return round(float(low), 12), round(float(high), 12)


def flips(before: FloatArray, after: FloatArray, clusters: Sequence[Hashable] | None = None) -> Flips | None:
    """Count flips between two runs' right/wrong values [samples]; None if the values are not all 0 or 1.

    Args:
        before, after: The values.
        clusters: The image of each sample; None: each is on its own.
    """
    if not (np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()):
        return None
    net: Counter[Hashable] | None = None
    if clusters is not None:
        net = Counter()
        for image, change in zip(clusters, (after - before).astype(int).tolist()):
            net[image] += change
    return Flips(int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum()), net)


def sign_flips(nets: Collection[int]) -> float:
    """Two-sided p of the exact sign-flip test on sums of clusters; if all are 1 or -1, the exact McNemar test.

    It is the probability of a total this far from 0 if each cluster's sum has either sign with equal chance.
    """
    sizes = [abs(net) for net in nets if net]
    chances = np.zeros(2 * sum(sizes) + 1)
    middle = sum(sizes)
    chances[middle] = 1.0
    for size in sizes:  # the total moves up or down by it
        before, chances = chances, np.zeros_like(chances)
        chances[size:] = before[:-size]
        chances[:-size] += before[size:]
        chances *= 0.5
    far = abs(sum(nets))
    return min(1.0, float(chances[: middle - far + 1].sum() + chances[middle + far :].sum())) if far else 1.0


def twice_the_median(values: Sequence[float]) -> float:
    """A p value for several tests of one hypothesis, such as over seeds, however they depend on each other."""
    return min(1.0, 2 * float(np.median(values))) if len(values) > 1 else values[0]


def holm(values: Sequence[float]) -> list[float]:
    """The p values of several hypotheses, corrected: the chance of any false finding stays what one's would be.

    Holm (1979), "A simple sequentially rejective multiple test procedure", which holds however the tests depend on each
    other.
    """
    corrected, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        least = max(least, min(1.0, (len(values) - rank) * values[at]))
        corrected[at] = least
    return corrected


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of the exact McNemar test: the probability that fair coins fall at least as unevenly.

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
