"""Overlays: the image with the patches that stayed, after each boundary, several runs below each other.

    python -m analysis overlay RUN_ID [RUN_ID ...] [--sample TASK:DOC_ID ...] [--images PATH]

The style of PyramidDrop's Fig. 4 (arXiv 2410.17247). Without --sample, each task shows its first sample that the runs
answer differently, or else its first. PATH is a parquet file with columns `image_id` and `image`, or a folder of images
named by image id; default: the embedded tasks' test split. Models whose visual tokens are one square grid an image
only: with tiles (anyres), several images or other grids, a token's place in the picture is not known here.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

import pdrop.record
from analysis.figure import PAGE, SETTINGS, saved
from analysis.kept import BoolArray, Sample, samples_of
from analysis.load import Run
from analysis.style import method_name
from pdrop.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EMBEDDED = Path(pdrop.record.__file__).parent / "embedded" / "data" / "test.parquet"
PANEL = 1.15  # inches
MOST_RUNS = 8
Pixels = npt.NDArray[np.float64]


def files(runs: Sequence[Run], wanted: Sequence[str], images: Path | None) -> Iterator[tuple[str, bytes]]:
    """One figure a sample as (file name, content), PDF and PNG.

    Args:
        runs: Finished runs of one model, drawn below each other in this order.
        wanted: Samples as "TASK:DOC_ID"; none: one of each task that all runs have.
        images: Where the images are; None: the embedded test split.

    Raises:
        ValueError: If the runs or the sample cannot be shown so; the message says why.
    """
    check(runs)
    for task, doc_id in choose(runs, wanted):
        samples = [samples_of(run, task)[doc_id] for run in runs]
        picture = read_image(images or EMBEDDED, samples[0].image, f"{task}:{doc_id}")
        figure = overlay(runs, samples, as_seen(picture, runs[0].record.spec.image_mode))
        name = "-".join(["overlay", task, doc_id, *(run.record.run_id[:6] for run in runs)])
        yield from saved(figure, name)


def check(runs: Sequence[Run]) -> None:
    """Refuse runs that do not belong into one figure.

    Raises:
        ValueError: Saying which.
    """
    if len(runs) > MOST_RUNS:
        raise ValueError(f"an overlay shows {MOST_RUNS} runs at most, not {len(runs)}")
    for run in runs:
        if not run.done:
            raise ValueError(f"{run.folder} is {run.record.status}: only finished runs can be shown")
        for name in ("model", "model_fingerprint", "image_mode"):
            ours, first = getattr(run.record.spec, name), getattr(runs[0].record.spec, name)
            if ours != first:
                raise ValueError(f"{run.folder} and {runs[0].folder} differ in {name}: {ours} and {first}")


def choose(runs: Sequence[Run], wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(task, doc_id) of the samples to show.

    Raises:
        ValueError: If a sample is not there, or the runs scored other data.
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
        apart = (key for key in held[0] if len({samples[key].answer for samples in held}) > 1)
        chosen.append((task, doc_id if pairs else next(apart, next(iter(held[0])))))
    if not chosen:
        raise ValueError("the runs share no task")
    return chosen


def read_image(source: Path, image: str | None, what: str) -> Image.Image:
    """The image with this id, RGB.

    Raises:
        ValueError: If there is none.
    """
    if image is None:
        raise ValueError(f"{what} names no image")
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.stem == image)
        if not paths:
            raise ValueError(f"{what}: no image named {image} in {source}")
        return Image.open(paths[0]).convert("RGB")
    if not source.is_file():
        raise ValueError(f"{source} is neither a parquet file nor a folder of images: give --images")
    frame = pd.read_parquet(source, columns=["image_id", "image"], filters=[("image_id", "==", image)])
    if frame.empty:
        raise ValueError(f"{what}: no image_id {image} in {source}; give --images")
    return Image.open(io.BytesIO(frame.iloc[0]["image"]["bytes"])).convert("RGB")


def as_seen(image: Image.Image, mode: str) -> Image.Image:
    """The square that the vision tower saw: padded with grey ("pad"), or the middle ("crop", CLIP's processing)."""
    width, height = image.size
    side = max(width, height) if mode == "pad" else min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, (-left, -top))
    return square


def patches(image: Image.Image, kept: BoolArray, prompt: str = "") -> Pixels:
    """The image with dropped patches faded to grey, [height, width, 3] in 0..1.

    Raises:
        ValueError: If the tokens are no square grid over one image.
    """
    side = math.isqrt(len(kept))
    if side * side != len(kept) or side == 0 or prompt.count("<image>") > 1:
        raise ValueError(
            f"{len(kept)} visual tokens of {max(1, prompt.count('<image>'))} image(s) are no square grid over one "
            "image (tiles, newline tokens, several images): overlays need one"
        )
    scale = max(1, round(336 / side))
    pixels = np.asarray(image.resize((side * scale, side * scale)), dtype=np.float64) / 255
    mask = np.kron(kept.reshape(side, side), np.ones((scale, scale)))[..., None]
    faded = 0.22 * pixels.mean(axis=2, keepdims=True) + 0.78 * 0.58
    return mask * pixels + (1 - mask) * faded


def overlay(runs: Sequence[Run], samples: Sequence[Sample], image: Image.Image) -> Figure:
    """The figure of one sample: a row a run, the image and then a column a boundary."""
    across = 1 + max(len(sample.kept) for sample in samples)
    width = min(PAGE, PANEL * across + 1.2)
    head = textwrap.wrap(f"{samples[0].question.strip()}  (right: {samples[0].target})", int(15 * width))
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
            show(row[0], patches(image, everything, sample.prompt), f"all {sample.visual_tokens}")
            label = f"{method_name(run.record.spec.method)}\n{textwrap.shorten(sample.answer, 24)}\n{verdict(sample)}"
            row[0].set_ylabel(label, rotation=0, ha="right", va="center", parse_math=False)
            layers = Schedule.parse(run.record.spec.schedule).layers
            for axes, layer, kept in zip(row[1:], layers, sample.kept):
                title = f"from layer {layer}: {kept.sum()} of {len(kept)}"
                show(axes, patches(image, kept, sample.prompt), title)
            for axes in row[1 + len(sample.kept) :]:
                axes.set_visible(False)
        figure.suptitle("\n".join(head), fontsize=8, parse_math=False)
    return figure


def show(axes: Axes, pixels: Pixels, title: str) -> None:
    """One panel."""
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
