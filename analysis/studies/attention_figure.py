"""Attention by layer as figures (attention.py).

    NAME-attention            mass on the image, entropy, concentration by layer, column width; one thin line per head
    NAME-attention-heads      mass and entropy, layer x head, page width
    NAME-attention-tasks      mass and concentration, task x layer, page width
    NAME-attention-stability  layer x layer: overlap of the best attended tokens

Bars are 95 % intervals over images. Dashed grey is what evenly spread attention would give. Concentration is the share
of the best attended hundredths in the map averaged over heads, which is stored for each token.
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
from ..labels import fit
from ..style import LINES, task_names
from .attention import BEST, AttentionStudy, attention_studies, stability
from .overlap_figure import matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD = f"held by the top {100 * BEST:.0f} % of the tokens"
NAMES = {  # measure -> title of its panel, and what 100 % of its axis are
    "mass": ("attention that goes to the image", "% of all"),
    "entropy": ("its entropy among the image's tokens", "% of maximum"),
    "best": (f"its share {HELD} (mean map)", "% of the image's"),
}
SHORT = {"mass": "attention on the image (%)", "entropy": "entropy (%)", "best": f"{HELD} (%)"}
MOST_CELLS = 14  # layers whose cells still have room for a number


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figures of each study of the table, with their files' stems; none without a study."""
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
    """Three panels, one above the other: each measure's mean over heads and samples, and each head."""
    style = LINES["pyramiddrop"]
    even = {"mass": study.even, "entropy": 1.0, "best": BEST}
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(3, 1, figsize=(COLUMN, 4.3), sharex=True, layout="constrained")
        for axes, (measure, (name, unit)) in zip(grid, NAMES.items()):
            heads = 100 * study.heads(measure) if measure != "best" else np.empty((len(study.layers), 0))
            axes.plot(study.layers, heads, color="0.7", linewidth=0.6, zorder=1)
            means = study.layer_means(measure)
            below = [max(0.0, 100 * (m.value - m.low)) if m.low is not None else 0.0 for m in means]
            above = [max(0.0, 100 * (m.high - m.value)) if m.high is not None else 0.0 for m in means]
            values = [100 * mean.value for mean in means]
            axes.errorbar(
                study.layers,
                values,
                yerr=[below, above],
                color=style.colour,
                marker=style.marker,
                markersize=3.2,
                markerfacecolor="none",
                elinewidth=0.8,
                zorder=3,
            )
            level = even[measure]
            reference = [("spread evenly:", 100 * level)] if level is not None else []
            for _, height in reference:
                axes.axhline(height, color="0.35", linewidth=0.8, dashes=(7, 3), zorder=2)
            fit(axes, [*np.subtract(values, below), *np.add(values, above), *heads.ravel()], reference)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(name, fontsize=7, loc="left", pad=3)
            axes.set_ylabel(unit, fontsize=7)
            axes.grid(axis="y", linewidth=0.4, color="0.88")
        grid[-1].set_xlabel("layer")
        figure.align_ylabels()
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [
            Line2D(
                [],
                [],
                color=style.colour,
                marker=style.marker,
                markersize=3.2,
                markerfacecolor="none",
                label="mean over heads",
            ),
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
        figure, grid = plt.subplots(1, 2, figsize=(PAGE, height), sharey=True, layout="constrained")
        for axes, measure in zip(grid, ("mass", "entropy")):
            heat(axes, 100 * study.heads(measure), numbers=heads <= 8 and len(study.layers) <= MOST_CELLS)
            axes.set_title(SHORT[measure], pad=3)
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
    measures = ("mass", "best")
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
    """A heat map of percentages, darker = more, with its numbers if they fit."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values) if numbers else ():
        colour = "white" if value > 60 else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
