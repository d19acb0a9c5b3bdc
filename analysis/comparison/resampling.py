"""Scores under resampling of their samples, for all kinds of scores: means, F1, MME's pairs, MMBench's circular
accuracy, means of categories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..statistics import FloatArray, quotients, replicates
from ..store.load import Run, Samples

Draws = FloatArray | None  # a score under resampling [draws]; None if the record does not say what the score is made of
ROUNDED = 2e-5  # tolerance between a score and its parts: some tasks round to five digits


def run_draws(runs: Sequence[Run], task: str, metric: str | None = None) -> list[Draws]:
    """A metric of each run under resampling, with the same draws for all: one entry per run.

    Args:
        runs: Runs that answered the same samples of the task.
        task: The task.
        metric: None: the main one.
    """
    samples = [run.samples(task, metric) for run in runs]
    scores = [run.score(task, metric) for run in runs]
    found: list[Draws] = [None] * len(runs)
    parted = [place for place, one in enumerate(samples) if fits(one, scores[place]) and one.parts is not None]
    plain = [place for place, one in enumerate(samples) if fits(one, scores[place]) and one.parts is None]
    if plain:
        values = np.stack([one for place in plain if (one := samples[place].values) is not None], axis=1)
        fill(found, plain, replicates(task, values, samples[plain[0]].clusters))
    if parted:
        parts = [made_of for place in parted if (made_of := samples[place].parts) is not None]
        above, below = (np.stack([getattr(one, side) for one in parts], axis=1) for side in ("above", "below"))
        fill(found, parted, quotients(task, above, below, parts[0].strata, samples[parted[0]].clusters))
    return found


def fill(found: list[Draws], places: Sequence[int], draws: FloatArray) -> None:
    for column, place in enumerate(places):
        found[place] = draws[:, column]


def fits(samples: Samples, score: float) -> bool:
    """Whether the score equals what the samples' parts, or the mean of their values, give."""
    if samples.parts is not None:
        return abs(samples.parts.score - score) <= ROUNDED * max(1.0, abs(score))
    return samples.values is not None and abs(float(samples.values.mean()) - score) <= 1e-6 * max(1.0, abs(score))


def mean_draws(draws: Sequence[Draws]) -> Draws:
    """Mean of the draws of several runs or tasks, which draw their common images together; None if one has none."""
    there = [one for one in draws if one is not None]
    return np.mean(there, axis=0) if there and len(there) == len(draws) else None
