"""The break-even figure: speed-up of a whole answer over its length; one curve per batch size, one
panel per number of images.

NAME (NAME-MODEL if there are several)    one row of panels per method; the line at 1 is where dropping stops paying
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from ..drawing import PAGE, SETTINGS
from ..store.load import Experiment
from ..style import layer_lines
from .break_even import Curve, curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def files(experiment: Experiment) -> Iterable[tuple[str, Figure]]:
    """The figure of each model, with its file's stem."""
    found = curves(experiment.runs)
    models = sorted({curve.run.record.spec.model for curve in found})
    for model in models:
        stem = experiment.name if len(models) == 1 else f"{experiment.name}-{model}"
        those = [curve for curve in found if curve.run.record.spec.model == model]
        yield stem, panels(those)


def panels(found: list[Curve]) -> Figure:
    """One row per method, one column per number of images; invalid runs are dotted."""
    names, images = list(dict.fromkeys(c.name for c in found)), sorted({c.images for c in found})
    batches = sorted({c.batch for c in found})
    looks = dict(zip(batches, layer_lines(len(batches))))
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(
            len(names),
            len(images),
            figsize=(PAGE, 1.9 * len(names) + 0.5),
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        for down, name in enumerate(names):
            for across, count in enumerate(images):
                axes = grid[down][across]
                axes.axhline(1, color="black", linewidth=0.8)
                for curve in (c for c in found if (c.name, c.images) == (name, count)):
                    look = looks[curve.batch]
                    axes.fill_between(curve.lengths, curve.low, curve.high, color=look.colour, alpha=0.15, linewidth=0)
                    axes.plot(
                        curve.lengths,
                        curve.speedup,
                        color=look.colour,
                        marker=look.marker,
                        linestyle="-" if curve.valid else ":",
                        label=f"batch {curve.batch}" + ("" if curve.valid else " (invalid)"),
                    )
                axes.set_xscale("log", base=2)
                lengths = sorted({n for c in found for n in c.lengths})
                axes.set_xticks(lengths, [str(n) for n in lengths])
                axes.minorticks_off()
                axes.set_title(f"{name}, {count} image{'s' if count > 1 else ''}", pad=3)
        handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
        grid[0][-1].legend(handles.values(), handles.keys(), frameon=False)
        figure.supxlabel("tokens of the answer", fontsize=8)
        figure.supylabel("speed-up over dropping nothing", fontsize=8)
    return figure
