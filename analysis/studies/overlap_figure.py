"""The overlap of kept sets between the layers of a redundancy study, one matrix per kept fraction (overlap.py).

NAME-overlap    layer x layer: intersection over union in %, column width (more layers: page width)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from ..comparison.table_model import Table
from ..drawing import COLUMN, PAGE, SETTINGS
from .overlap import Overlap, kept_sets, overlap
from .redundancy import Study, studies
from .redundancy_figure import stem_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 6  # layers that fit a column
MOST_CELLS = 14  # layers whose cells still have room for a number
FAINTEST = 0.1  # smallest part of the way from chance to equal sets that gets full colour: noise must not stand out
Pairs = dict[float, dict[tuple[int, int], Overlap]]  # keep -> (layer, layer) -> overlap


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figure of each study of the table, with its file's stem."""
    found = studies(table)
    for study in found:
        pairs = stability(study)
        if pairs:
            stem = stem_of(table, study, found).removesuffix("-redundancy")
            yield f"{stem}-overlap", matrices(study.layers, pairs)


def stability(study: Study) -> Pairs:
    """The overlap of every two layers' kept sets, for each keep between nothing and everything."""
    pairs: Pairs = {}
    for keep in study.keeps:
        held = {layer: kept_sets(row.runs[0]) for (layer, of), row in study.ranked.items() if of == keep and 0 < of < 1}
        for first in held:
            for second in held:
                if first < second and (found := overlap(held[first], held[second])) is not None:
                    pairs.setdefault(keep, {})[first, second] = found
    return pairs


def beyond(found: Overlap) -> float:
    """An overlap on the scale from chance, 0, to equal sets, 1; below 0 if it is less than chance."""
    return (found.shared.value - found.chance) / (1 - found.chance)


def matrices(layers: Sequence[int], pairs: Pairs) -> Figure:
    """One triangle per keep, side by side; white is the overlap by chance, the darkest cell the largest overlap."""
    across = len(pairs)
    width = COLUMN if len(layers) <= FEW else PAGE
    size = 6.5 if len(layers) <= FEW else 5.5
    most = max([FAINTEST, *(beyond(found) for shared in pairs.values() for found in shared.values())])
    with plt.rc_context({**SETTINGS, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, grid = plt.subplots(
            1, across, figsize=(width, width / max(2, across) + 0.55), squeeze=False, layout="constrained"
        )
        for axes, (keep, shared) in zip(grid[0], sorted(pairs.items())):
            level = next(iter(shared.values())).chance
            values = np.full((len(layers), len(layers)), np.nan)
            for (first, second), found in shared.items():
                row, column = layers.index(second), layers.index(first)
                values[row, column] = 100 * max(0.0, beyond(found))
                if len(layers) <= MOST_CELLS:
                    colour = "white" if values[row, column] > 55 * most else "black"
                    text = f"{100 * found.shared.value:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
            around = (-0.5, len(layers) - 1.5, len(layers) - 0.5, 0.5)
            shown = axes.imshow(values[1:, :-1], cmap="Blues", vmin=0, vmax=100 * most, extent=around)
            axes.set_title(f"keep {100 * keep:g} %\n(chance {100 * level:.0f})", pad=3)
            step = 1 if len(layers) <= MOST_CELLS else 4
            axes.set_xticks(range(0, len(layers) - 1, step), [str(layer) for layer in layers[:-1:step]])
            axes.set_yticks(range(1, len(layers), step), [str(layer) for layer in layers[1::step]])
            axes.tick_params(length=0)
        bar = figure.colorbar(shown, ax=grid, aspect=22, pad=0.02)
        bar.set_label("from chance (0) to\nthe same set (100)", fontsize=7)
        bar.outline.set_linewidth(0.4)
        figure.supxlabel("ranked at layer", fontsize=8)
        figure.supylabel("ranked at layer", fontsize=8)
        figure.suptitle("tokens kept by both / by either (%)", fontsize=8)
    return figure
