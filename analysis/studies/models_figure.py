"""The redundancy study of several models side by side: does training with dropping make layers need fewer tokens?

    NAME-redundancy-models    one panel per layer, score against the kept fraction, one curve per model

The style is that of PyramidDrop's Fig. 3 (arXiv 2410.17247): a model trained without dropping and one trained with it,
cut once at the same layers. Drawn if a table has the study of two models or more. Bars are paired 95 % intervals of the
difference to the same model without dropping. Each panel has its own vertical scale: models are compared at one layer,
layers in the figures of each model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from ..comparison.table_model import Table
from ..drawing import PAGE, SETTINGS, hide_the_rest
from ..style import SPARE_LINES, model_name
from .redundancy import Study, studies
from .redundancy_figure import KEPT
from .tradeoff_figure import averaged, half_lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = 100.0  # percent of the visual tokens
SEEN_THROUGH = 0.5  # opacity of bars, so that what is below shows
MOST = len(SPARE_LINES)  # lines of models that can be distinguished; a method's own line would mean something else


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figure of each method that was studied with several models, with its file's stem."""
    ways: dict[tuple[str, str], list[Study]] = {}
    for study in studies(table):
        ways.setdefault((study.method, study.positions), []).append(study)
    several = {way: found for way, found in ways.items() if 1 < len({study.model for study in found}) <= MOST}
    for (method, positions), found in several.items():
        apart = [] if len(several) == 1 else [method, positions]
        stem = [table.name, *apart, *([] if table.name == "redundancy" and not apart else ["redundancy"])]
        if table.averaged:
            yield "-".join([*stem, "models"]), side_by_side(table, found)


def side_by_side(table: Table, found: list[Study]) -> Figure:
    """One panel per layer that all models were cut at."""
    layers = [layer for layer in found[0].layers if all(layer in study.layers for study in found)]
    across = min(4, len(layers))
    down = math.ceil(len(layers) / across)
    with plt.rc_context({**SETTINGS, "lines.markersize": 3.6}):
        figure, grid = plt.subplots(
            down,
            across,
            figsize=(PAGE, 1.75 * down + 0.5),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, layer in zip(grid.flat, layers):
            for study, style in zip(found, SPARE_LINES):
                cells = {FULL * keep: row.average for (at, keep), row in sorted(study.ranked.items()) if at == layer}
                if study.none is not None:
                    cells[FULL] = study.none.average
                points = [(keep, cell) for keep, cell in sorted(cells.items()) if cell is not None]
                drawn = axes.errorbar(
                    [keep for keep, _ in points],
                    [100 * cell.score.value for _, cell in points],
                    yerr=list(zip(*(half_lengths(cell, 100) for _, cell in points))),
                    color=style.colour,
                    marker=style.marker,
                    markerfacecolor="none",
                    markeredgewidth=0.9,
                    linestyle=style.dashes,
                    elinewidth=0.7,
                    label=model_name(study.model),
                )
                for bars in drawn.lines[2]:
                    bars.set_alpha(SEEN_THROUGH)
            axes.set_title(f"cut at layer {layer}", pad=3)
            axes.grid(axis="y", linewidth=0.4, color="0.88")
            axes.set_xticks([0, 25, 50, 75, 100])
        hide_the_rest(grid, len(layers))
        figure.supxlabel(KEPT, fontsize=8)
        figure.supylabel(averaged(table), fontsize=8)
        handles, names = grid[0][0].get_legend_handles_labels()
        figure.legend(
            [handle[0] for handle in handles], names, loc="outside upper center", ncols=len(names), frameon=False
        )
    return figure
