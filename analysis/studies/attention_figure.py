"""Attention by layer as figures (analysis/attention.py).

    NAME-attention            mass on the image, entropy, concentration by layer, column width; one thin line per head
    NAME-attention-heads      the same, layer x head, page width
    NAME-attention-tasks      mass and concentration, task x layer, page width
    NAME-attention-stability  layer x layer: overlap of the best attended tokens

Bars are 95 % intervals over images. Dashed grey is what attention spread evenly would give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..comparison.table_model import Table
from ..drawing import COLUMN, PAGE, SETTINGS
from ..style import LINES, task_names
from .attention import AttentionStudy, attention_studies, stability
from .overlap_figure import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "mass": "attention that goes to the image",
    "entropy": "its entropy among the image's tokens, of the maximum",
    "top": "its share that the best attended tenth of the tokens holds",
}
SHORT = {"mass": "attention on the image (%)", "entropy": "entropy (%)", "top": "held by the top tenth (%)"}
MOST_CELLS = 14  # layers whose cells still have room for a number


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figures of each study of the table, with their files' stems; nothing where there is none."""
    found = attention_studies(table)
    for study in found:
        stem = table.name if len(found) == 1 else f"{table.name}-{study.row.spec.model}"
        stem += "" if table.name == "attention" else "-attention"
        yield stem, by_layer(study)
        yield f"{stem}-heads", by_head(study)
        yield f"{stem}-tasks", tasks(study)
        pairs = stability(study)
        if pairs:
            yield f"{stem}-stability", matrices(list(study.layers), pairs)


def by_layer(study: AttentionStudy) -> Figure:
    """Three panels above each other: each measure's mean over heads and samples, and each head."""
    style = LINES["pyramiddrop"]
    even = {"mass": study.even, "entropy": 1.0, "top": 0.1}
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(3, 1, figsize=(COLUMN, 4.3), sharex=True, layout="constrained")
        for axes, (measure, name) in zip(grid, NAMES.items()):
            axes.plot(study.layers, 100 * study.heads(measure), color="0.7", linewidth=0.6, zorder=1)
            means = study.layer_means(measure)
            axes.errorbar(
                study.layers,
                [100 * mean.value for mean in means],
                yerr=np.array(
                    [
                        (max(0.0, 100 * (m.value - m.low)), max(0.0, 100 * (m.high - m.value)))
                        for m in means
                        if m.low is not None and m.high is not None
                    ]
                ).T,
                color=style.colour,
                marker=style.marker,
                markersize=3.2,
                elinewidth=0.8,
                capsize=1.5,
                zorder=3,
            )
            level = even[measure]
            if level is not None:
                axes.axhline(100 * level, color="0.35", linewidth=0.8, dashes=(7, 3), zorder=2)
            axes.set_title(name, fontsize=7, loc="left", pad=3)
            axes.set_ylim(-4, 104)
            axes.set_yticks([0, 50, 100])
            axes.grid(axis="y", linewidth=0.4, color="0.88")
        grid[-1].set_xlabel("layer")
        figure.supylabel("%", fontsize=8)
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [
            Line2D([], [], color=style.colour, marker=style.marker, markersize=3.2, label="mean over heads [95 %]"),
            Line2D([], [], color="0.7", linewidth=0.6, label="a head"),
            Line2D([], [], color="0.35", linewidth=0.8, dashes=(7, 3), label="spread evenly"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, columnspacing=1.0)
    return figure


def by_head(study: AttentionStudy) -> Figure:
    """Layer x head of each measure, side by side, one colour scale."""
    with plt.rc_context({**SETTINGS, "axes.spines.left": False, "axes.spines.bottom": False}):
        heads = study.heads("mass").shape[1]
        height = min(6.0, 0.9 + 0.16 * len(study.layers))
        figure, grid = plt.subplots(1, 3, figsize=(PAGE, height), sharey=True, layout="constrained")
        for axes, (measure, name) in zip(grid, SHORT.items()):
            heat(axes, 100 * study.heads(measure), numbers=heads <= 8 and len(study.layers) <= MOST_CELLS)
            axes.set_title(name, pad=3)
            axes.set_xlabel("head")
            axes.set_xticks(range(0, heads, 1 if heads <= 8 else 4))
        ticks = range(0, len(study.layers), 1 if len(study.layers) <= MOST_CELLS else 4)
        grid[0].set_yticks(ticks, [str(study.layers[tick]) for tick in ticks])
        grid[0].set_ylabel("layer")
        figure.colorbar(grid[-1].images[0], ax=grid, aspect=30, pad=0.01)
    return figure


def tasks(study: AttentionStudy) -> Figure:
    """Task x layer of mass and concentration."""
    names = task_names(list(dict.fromkeys(study.places)))
    measures = ("mass", "top")
    with plt.rc_context({**SETTINGS, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, grid = plt.subplots(1, 2, figsize=(PAGE, 0.8 + 0.19 * len(names)), sharey=True, layout="constrained")
        for axes, measure in zip(grid, measures):
            found = study.by_task(measure)
            values = 100 * np.array([found[task] for task in names])
            heat(axes, values, numbers=len(study.layers) <= MOST_CELLS)
            axes.set_title(SHORT[measure], pad=3)
            axes.set_xlabel("layer")
            ticks = range(0, len(study.layers), 1 if len(study.layers) <= MOST_CELLS else 4)
            axes.set_xticks(ticks, [str(study.layers[tick]) for tick in ticks])
        grid[0].set_yticks(range(len(names)), list(names.values()))
        figure.colorbar(grid[-1].images[0], ax=grid, aspect=20, pad=0.01)
    return figure


def heat(axes: Axes, values: np.ndarray, numbers: bool) -> None:
    """A heat map of percentages, darker = more, with its numbers where they have room."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        colour = "white" if value > 60 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
