"""Overlays: the image with the patches kept after each boundary, several runs below each other; attention maps.

    python -m analysis overlay RUN_ID [RUN_ID ...] [--sample TASK:DOC_ID ...] [--images PATH]

More than eight runs are spread over several figures.

The style is that of PyramidDrop's Fig. 4 (arXiv 2410.17247); for a run whose layers all rank without dropping it is the
map of each layer, as in its Fig. 1 (right). An experiment's name means its runs. Without --sample, each task shows the
first sample that the runs answer differently, or its first one. pictures.py says where images come from, and how tiles,
several images and frames are arranged.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from pdrop import thumbnails
from pdrop.names import as_name
from pdrop.schedule import Schedule

from ..drawing import PAGE, SETTINGS
from ..statistics import FloatArray
from ..store.load import Run, samples_of
from ..store.samples import Sample
from ..studies.attention import ranks_only
from ..style import method_name
from .pictures import PictureView, heat_panel, kept_panel, read_images, views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 1.15  # inches
MOST_RUNS = 8
MAPS_ACROSS = 7


def files(runs: Sequence[Run], wanted: Sequence[str], images: Path | None) -> Iterator[tuple[str, Figure]]:
    """One figure per sample, with its file's stem.

    Args:
        runs: Finished runs of one model, drawn below each other in this order.
        wanted: Samples as "TASK:DOC_ID"; none: one of each task that all runs have.
        images: Where the images are; None: in the store, or in the embedded test split.

    Raises:
        ValueError: If the runs or the sample cannot be shown together; the message says why.
    """
    check(runs)
    dropping = [run for run in runs if not ranks_only(run)]
    for task, doc_id in choose(runs, wanted, images):
        held = {run.folder: samples_of(run, task)[doc_id] for run in runs}
        first = held[runs[0].folder]
        number = len(first.layout) if first.layout else 1
        kept = kept_pictures(runs[0], task, images).get(doc_id, ())
        pictures = read_images(images, first.image, f"{task}:{doc_id}", number, kept)
        seen = views(first, pictures, runs[0].record.spec.image_mode)
        for start in range(0, len(dropping), MOST_RUNS):
            some = dropping[start : start + MOST_RUNS]
            figure = overlay(some, [held[run.folder] for run in some], seen)
            yield "-".join(["overlay", task, as_name(doc_id), *(run.record.run_id[:6] for run in some)]), figure
        for run in runs:
            if ranks_only(run) and held[run.folder].attention is not None:
                figure = maps(held[run.folder], seen)
                yield "-".join(["attention", task, as_name(doc_id), run.record.run_id[:6]]), figure


def check(runs: Sequence[Run]) -> None:
    """Refuse runs that do not belong in one figure.

    Raises:
        ValueError: If there are such runs; names them.
    """
    for run in runs:
        if not run.done:
            raise ValueError(f"{run.folder} is {run.record.status}: only finished runs can be shown")
        for name in ("model", "model_fingerprint", "image_mode"):
            ours, first = getattr(run.record.spec, name), getattr(runs[0].record.spec, name)
            if ours != first:
                raise ValueError(f"{run.folder} and {runs[0].folder} differ in {name}: {ours} and {first}")


def kept_pictures(run: Run, task: str, images: Path | None) -> dict[str, list[bytes]]:
    """The pictures that the store keeps of a task, by doc_id; none if others are given."""
    return {} if images is not None else thumbnails.read(run.path, task, run.record.results[task].data_hash)


def choose(runs: Sequence[Run], wanted: Sequence[str], images: Path | None = None) -> list[tuple[str, str]]:
    """(task, doc_id) of the samples to show; if the store keeps pictures of some, these are chosen from.

    Raises:
        ValueError: If a sample does not exist, or the runs scored different data.
    """
    shared = [task for task in runs[0].record.results if all(task in run.record.results for run in runs)]
    pairs = [(task, doc_id) for task, _, doc_id in (text.rpartition(":") for text in wanted)]
    chosen: list[tuple[str, str]] = []
    for task, doc_id in pairs or [(task, "") for task in shared]:
        held = [samples_of(run, task) for run in runs]
        for run in runs[1:]:
            if run.record.results[task].data_hash != runs[0].record.results[task].data_hash:
                raise ValueError(f"{task}: {run.folder} and {runs[0].folder} were scored on other data")
        if pairs and not all(doc_id in samples for samples in held):
            raise ValueError(f"{task} has no sample {doc_id!r}; it has {', '.join(list(held[0])[:5])}, ...")
        if pairs:
            chosen.append((task, doc_id))
            continue
        kept = kept_pictures(runs[0], task, images)
        shown = [key for key in held[0] if key in kept] or list(held[0])
        apart = (key for key in shown if len({samples[key].answer for samples in held}) > 1)
        chosen.append((task, next(apart, shown[0])))
    if not chosen:
        raise ValueError("the runs share no task")
    return chosen


def overlay(runs: Sequence[Run], samples: Sequence[Sample], seen: Sequence[PictureView]) -> Figure:
    """The figure of one sample: one row per run; the image, then one column per boundary."""
    across = 1 + max(len(sample.kept) for sample in samples)
    width = min(PAGE, PANEL * across + 1.2)
    head = heading(samples[0], width)
    with plt.rc_context({**SETTINGS, "axes.titlesize": 7}):
        figure, grid = plt.subplots(
            len(runs),
            across,
            figsize=(width, (width - 1.2) / across * 1.22 * len(runs) + 0.14 * len(head) + 0.1),
            squeeze=False,
            layout="constrained",
        )
        for row, run, sample in zip(grid, runs, samples):
            everything = np.ones(sample.visual_tokens, dtype=np.bool_)
            show(row[0], kept_panel(seen, everything), f"all {sample.visual_tokens}")
            label = f"{method_name(run.record.spec.method)}\n{textwrap.shorten(sample.answer, 24)}\n{verdict(sample)}"
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", parse_math=False)
            layers = Schedule.parse(run.record.spec.schedule).layers
            for axes, layer, kept in zip(row[1:], layers, sample.kept):
                title = f"from layer {layer}: {kept.sum()} of {len(kept)}"
                show(axes, kept_panel(seen, kept), title)
            for axes in row[1 + len(sample.kept) :]:
                axes.set_visible(False)
        figure.suptitle("\n".join(head), fontsize=8, parse_math=False)
    return figure


def maps(sample: Sample, seen: Sequence[PictureView]) -> Figure:
    """The figure of one sample of an attention study: the image, then each layer's map, its largest value brightest,
    with the share of attention that the image gets."""
    held = sample.attention
    assert held is not None
    panels = 1 + len(held.layers)
    across = min(MAPS_ACROSS, panels)
    down = math.ceil(panels / across)
    head = heading(sample, PAGE)
    with plt.rc_context({**SETTINGS, "axes.titlesize": 7}):
        figure, grid = plt.subplots(
            down,
            across,
            figsize=(PAGE, PAGE / across * 1.18 * down + 0.14 * len(head) + 0.1),
            squeeze=False,
            layout="constrained",
        )
        for axes in grid.flat[panels:]:
            axes.set_visible(False)
        show(grid.flat[0], kept_panel(seen, np.ones(sample.visual_tokens, dtype=np.bool_)), "image")
        for axes, layer, weights, mass in zip(grid.flat[1:], held.layers, held.maps, held.mass):
            show(axes, heat_panel(seen, weights), f"layer {layer}: {100 * mass.mean():.0f} %")
        figure.suptitle("\n".join(head), fontsize=8, parse_math=False)
    return figure


def heading(sample: Sample, width: float) -> list[str]:
    """Question and expected answer, in lines of a figure `width` inches wide."""
    return textwrap.wrap(f"{sample.question.strip()}  (right: {sample.target})", int(15 * width))


def show(axes: Axes, pixels: FloatArray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def verdict(sample: Sample) -> str:
    """Right, wrong, or the sample's score."""
    if sample.score in (0.0, 1.0):
        return "(right)" if sample.score else "(wrong)"
    return "" if sample.score is None else f"(score {sample.score:.2f})"
