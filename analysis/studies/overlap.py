"""Do two rankings keep the same tokens? Overlap of kept sets between layers and between methods, against chance.

    python -m analysis figures redundancy       NAME-overlap: how stable a ranking is from layer to layer
    python -m analysis diff RUN_A RUN_B         how far two runs agree, at each of their boundaries

The measure is the intersection over union of what two runs keep of a sample, averaged over samples; the interval
resamples images. `chance` is the expectation for two independent random sets of the same sizes: only overlap above it
is agreement. It is not from a paper; the question is that of PyramidDrop's reviewers (why rank again at every stage?).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ..statistics import Estimate, interval, replicates
from ..store.load import Run, samples_of
from ..store.samples import BoolArray

Sets = Mapping[tuple[str, str], tuple[BoolArray, str]]  # (task, doc_id) -> kept [visual_tokens], image


@dataclass(frozen=True)
class Overlap:
    """Mean intersection over union with its 95 % interval, its expectation by chance, and the number of samples."""

    shared: Estimate
    chance: float
    samples: int


def kept_sets(run: Run, stage: int = 0) -> Sets:
    """The set that a run keeps of each sample after boundary number `stage` (from 0); samples without it are left out.

    Raises:
        ValueError: If a samples file cannot be read.
    """
    return {
        (task, sample.doc_id): (sample.kept[stage], sample.image or f"{task} {sample.doc_id}")
        for task in run.record.results
        for sample in samples_of(run, task).values()
        if len(sample.kept) > stage
    }


def overlap(ours: Sets, theirs: Sets) -> Overlap | None:
    """The overlap over the samples that both have; None without any, or if nothing is kept.

    Raises:
        ValueError: If a sample's numbers of visual tokens differ: then its tokens are not the same.
    """
    values, expected, images = [], [], []
    for key in ours:
        if key not in theirs:
            continue
        (a, image), (b, _) = ours[key], theirs[key]
        if len(a) != len(b):
            raise ValueError(f"{key[0]}, sample {key[1]}: {len(a)} visual tokens in one run, {len(b)} in the other")
        union = int((a | b).sum())
        if union:
            values.append(int((a & b).sum()) / union)
            expected.append(chance(len(a), int(a.sum()), int(b.sum())))
            images.append(image)
    if not values:
        return None
    draws = replicates("overlap", np.array(values)[:, None], images)[:, 0]
    return Overlap(Estimate(fmean(values), *interval(draws)), fmean(expected), len(values))


@functools.cache
def chance(tokens: int, first: int, second: int) -> float:
    """Expected intersection over union of random subsets, `first` and `second` of `tokens` (hypergeometric)."""
    ways = math.comb(tokens, second)
    common = range(max(0, first + second - tokens), min(first, second) + 1)
    return sum(
        math.comb(first, k) * math.comb(tokens - first, second - k) / ways * k / (first + second - k)
        for k in common
        if k
    )
