"""Attention by layer: how much of it goes to the image, how sharply, and whether layers look at the same places.

    python run.py -m experiments=attention && python -m analysis figures attention

It reads runs whose boundaries all keep everything: each such layer ranks, nothing is dropped, and three numbers per
layer and head are stored for each sample, with the map (pdrop/engine/study.py). A token that is attended to need not be
needed: redundancy.py removes the tokens.

Shapes: N samples, L layers, H heads, T visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from pdrop.schedule import Schedule

from ..comparison.table_model import Row, Table
from ..statistics import Estimate, FloatArray, interval, replicates
from ..store.load import Run, samples_of
from ..store.samples import Attention, Sample
from .overlap import Overlap, chance

MEASURES = ("mass", "entropy", "top", "best")
BEST = 0.02  # of the visual tokens: a tenth holds nearly all of it in every layer, and tells them apart no more
KEEPS = (0.1, 0.25, 0.5)  # sizes of the top sets that rank stability is asked of
Pairs = dict[float, dict[tuple[int, int], Overlap]]  # keep -> (layer, layer) -> overlap


@dataclass(frozen=True)
class AttentionStudy:
    """The samples of one run that hold attention.

    `places` has each sample's task, `images` its image. `even` is the mass that attention spread evenly over the whole
    prompt would put on the visual tokens.
    """

    row: Row
    layers: tuple[int, ...]
    samples: list[Attention]
    places: list[str]
    images: list[str]
    even: float | None

    def heads(self, measure: str) -> FloatArray:
        """The mean over samples of a measure that is stored for each head, [L, H]."""
        found: FloatArray = np.mean([getattr(sample, measure) for sample in self.samples], axis=0)
        return found

    def layer_means(self, measure: str) -> list[Estimate]:
        """Mean over samples and heads with its 95 % interval over images, one per layer."""
        values = np.array([by_layer(sample, measure) for sample in self.samples])
        draws = replicates(measure, values, self.images)
        return [Estimate(float(mean), *interval(draws[:, n])) for n, mean in enumerate(values.mean(0))]

    def by_task(self, measure: str) -> dict[str, FloatArray]:
        """The mean over heads and a task's samples, [L] per task."""
        return {
            task: np.mean([by_layer(s, measure) for s, place in zip(self.samples, self.places) if place == task], 0)
            for task in dict.fromkeys(self.places)
        }


def by_layer(attention: Attention, measure: str) -> FloatArray:
    """A measure of one sample, mean over heads, [L]; "best": share of the best attended `BEST` of the mean map."""
    if measure == "best":
        maps = np.sort(attention.maps, axis=1)[:, ::-1]
        count = max(1, round(BEST * maps.shape[1]))
        share: FloatArray = maps[:, :count].sum(1) / np.maximum(maps.sum(1), np.finfo(np.float64).tiny)
        return share
    mean: FloatArray = getattr(attention, measure).mean(1)
    return mean


def attention_studies(table: Table) -> list[AttentionStudy]:
    """The runs of a table whose layers all ranked without dropping, one per model.

    Raises:
        ValueError: If a samples file cannot be read.
    """
    found: dict[str, AttentionStudy] = {}
    for row in table.rows:
        if row.status == "done" and ranks_only(row.runs[0]) and row.spec.model not in found:
            study = study_of(row)
            if study is not None:
                found[row.spec.model] = study
    return list(found.values())


def ranks_only(run: Run) -> bool:
    """Whether every boundary keeps everything."""
    stages = Schedule.parse(run.record.spec.schedule).stages
    return bool(stages) and all(stage.keep == 1 for stage in stages)


def study_of(row: Row) -> AttentionStudy | None:
    """The study of a row; None if the run stored no attention, as older ones did."""
    run = row.runs[0]
    held: list[tuple[str, Sample, Attention]] = [
        (task, sample, sample.attention)
        for task in run.record.results
        for sample in samples_of(run, task).values()
        if sample.attention is not None and sample.visual_tokens
    ]
    if not held:
        return None
    cost = run.record.cost
    return AttentionStudy(
        row,
        held[0][2].layers,
        [attention for _, _, attention in held],
        [task for task, _, _ in held],
        [sample.image or f"{task} {sample.doc_id}" for task, sample, _ in held],
        cost.visual_tokens / (cost.visual_tokens + cost.text_tokens) if cost else None,
    )


def top_sets(attention: Attention, keep: float) -> FloatArray:
    """1 for the int(T * keep) best attended visual tokens of each layer, otherwise 0; of equals the earlier, [L, T]."""
    count = int(attention.maps.shape[1] * keep)
    order = np.argsort(-attention.maps, axis=1, kind="stable")[:, :count]
    sets = np.zeros(attention.maps.shape)
    np.put_along_axis(sets, order, 1.0, axis=1)
    return sets


def stability(study: AttentionStudy, keeps: Sequence[float] = KEEPS) -> Pairs:
    """The overlap of the top sets of every two layers: intersection over union, mean over samples."""
    pairs: Pairs = {}
    for keep in keeps:
        shared, level = [], []
        for sample in study.samples:
            sets = top_sets(sample, keep)
            size = int(sets[0].sum())
            if size:
                common = sets @ sets.T
                shared.append(common / (2 * size - common))
                level.append(chance(sets.shape[1], size, size))
        if shared:
            means, expected = np.mean(shared, axis=0), fmean(level)
            pairs[keep] = {
                (first, second): Overlap(Estimate(float(means[a, b])), expected, len(shared))
                for a, first in enumerate(study.layers)
                for b, second in enumerate(study.layers)
                if a < b
            }
    return pairs
