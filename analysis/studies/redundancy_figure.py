"""The redundancy study as figures, in the style of PyramidDrop's Fig. 1 (arXiv 2410.17247).

    NAME-redundancy          score against the kept fraction, one line per layer, column width
    NAME-redundancy-tasks    the same for each task, page width
    NAME-redundancy-map      layer x kept fraction: what is lost, and what the ranking gains over chance

Solid lines are rankings by attention (or by the method's score), dashed ones are random. Bars are paired 95 % intervals
of the difference to dropping nothing, drawn around the score. At 100 % is the run that drops nothing, which a cut that
keeps everything equals to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from ..comparison.table_model import Cell, Row, Table
from ..drawing import COLUMN, PAGE, SETTINGS, hide_the_rest
from ..labels import Named, name_curves
from ..statistics import Estimate
from ..style import layer_lines, method_name, task_names
from ..tables.text import minus
from .redundancy import Place, Study, studies
from .tradeoff_figure import averaged, half_lengths

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = 100.0  # percent of the visual tokens
FAINTEST = 10.0  # smallest difference in points with full colour: small ones must not stand out
SEEN_THROUGH = 0.5  # opacity of bars and joining lines, so that what is below shows
KEPT = "visual tokens kept at the cut (%)"
Pick = Callable[[Row], Cell | None]


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """Every figure of the table's studies with its file's stem; none without a study."""
    found = studies(table)
    for study in found:
        stem = stem_of(table, study, found)
        for suffix, figure in (("", curves(table, study)), ("-tasks", by_task(table, study)), ("-map", heat(study))):
            if figure is not None:
                yield stem + suffix, figure


def stem_of(table: Table, study: Study, among: list[Study]) -> str:
    """The file name of a study's figures: the table's name, what distinguishes the study, and "redundancy"."""
    names = ("model", "method", "positions")
    apart = [getattr(study, name) for name in names if len({getattr(other, name) for other in among}) > 1]
    alike = [other for other in among if all(getattr(other, name) == getattr(study, name) for name in names)]
    if len(alike) > 1:  # they differ in the method's arguments
        apart.append(str(alike.index(study) + 1))
    return "-".join([table.name, *apart, *([] if table.name == "redundancy" and not apart else ["redundancy"])])


def curves(table: Table, study: Study) -> Figure | None:
    """The average over the tasks, at column width; None without tasks to average."""
    if not table.averaged:
        return None
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
        draw(axes, study, lambda row: row.average, table.floor)
        axes.set_xlabel(KEPT)
        axes.set_ylabel(averaged(table))
        handles = keys(study, table.floor)[len(study.layers) :]  # the layers are named next to their curves
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, columnspacing=1.0)
        others = named_layers(study, study.blind)
        if study.none is not None and study.none.average is not None:
            top = 100 * study.none.average.score.value
            others.append(Named("none", "black", [(0, top), (FULL, top)]))
            tails = [*named_layers(study, study.ranked), *named_layers(study, study.blind)]
            others += [Named("", one.colour, [one.points[-1], (FULL, top)]) for one in tails]
        name_curves(axes, named_layers(study, study.ranked), others)
    return figure


def named_layers(study: Study, rows: Mapping[Place, Row]) -> list[Named]:
    """The curves of the averages, by the layer of the cut."""
    found = []
    for layer, style in zip(study.layers, layer_lines(len(study.layers))):
        held = [(FULL * keep, row.average) for (at, keep), row in sorted(rows.items()) if at == layer]
        points = [(x, 100 * cell.score.value) for x, cell in held if cell is not None]
        if points:
            found.append(Named(f"layer {layer}", style.colour, points))
    return found


def by_task(table: Table, study: Study) -> Figure | None:
    """One panel per task, at page width; None without tasks."""
    if not table.tasks:
        return None
    names = task_names(list(table.tasks))
    across = len(names) if len(names) <= 3 else min(5, math.ceil(len(names) / 2))
    down = math.ceil(len(names) / across)
    with plt.rc_context({**SETTINGS, "lines.markersize": 3.2, "lines.linewidth": 0.9}):
        figure, grid = plt.subplots(
            down,
            across,
            figsize=(PAGE, 1.6 * down + 0.6),
            sharex=True,
            sharey=all(task.fraction for task in table.tasks.values()),  # points of different tasks share no axis
            squeeze=False,
            layout="constrained",
        )
        for axes, (name, task) in zip(grid.flat, table.tasks.items()):
            scale = 100 if task.fraction else 1
            draw(axes, study, of_task(name), table.floors.get(name), scale)
            axes.set_title(names[name] + ("" if task.fraction else " (points)"), pad=3)
        hide_the_rest(grid, len(names))
        figure.supxlabel(KEPT, fontsize=8)
        figure.supylabel("score (%)", fontsize=8)
        floor = next(iter(table.floors.values()), None)
        handles = keys(study, floor)
        columns = len(handles) if len(handles) < 7 else math.ceil(len(handles) / 2)
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def of_task(name: str) -> Pick:
    """A row's cell of this task."""
    return lambda row: row.cells.get(name)


def draw(axes: Axes, study: Study, pick: Pick, floor: float | None, scale: float = 100) -> None:
    """One panel: for each layer the ranked curve and the random one, `none` and the blind guess as horizontals."""
    top = pick(study.none) if study.none is not None else None
    if top is not None:
        axes.axhline(scale * top.score.value, color="black", linewidth=0.8, zorder=1)
    if floor is not None:
        axes.axhline(scale * floor, color="0.35", linewidth=0.8, dashes=(7, 3), zorder=1)
    layers = study.layers
    for layer, style in zip(layers, layer_lines(len(layers))):
        for rows, dashes, face in ((study.ranked, "-", style.colour), (study.blind, (0, (3, 1.6)), "none")):
            points = [
                (FULL * keep, cell)
                for (at, keep), row in sorted(rows.items())
                if at == layer and (cell := pick(row)) is not None
            ]
            if not points:
                continue
            drawn = axes.errorbar(
                [x for x, _ in points],
                [scale * cell.score.value for _, cell in points],
                yerr=list(zip(*(half_lengths(cell, scale) for _, cell in points))),
                color=style.colour,
                marker=style.marker,
                markerfacecolor=face,
                markeredgewidth=0.7,
                linestyle=dashes,
                elinewidth=0.6,
                zorder=3,
            )
            for bars in drawn.lines[2]:
                bars.set_alpha(SEEN_THROUGH)
            if top is not None and points[-1][0] < FULL:
                end, cell = points[-1]
                axes.plot(
                    [end, FULL],
                    [scale * cell.score.value, scale * top.score.value],
                    color=style.colour,
                    linestyle=dashes,
                    linewidth=0.6,
                    zorder=2,
                )
    axes.grid(axis="y", linewidth=0.4, color="0.88")
    axes.set_xlim(-4, FULL + 3)
    axes.set_xticks([0, 25, 50, 75, 100])


def keys(study: Study, floor: float | None) -> list[Artist]:
    """The legend: layers by colour and marker, rankings by line style."""
    found: list[Artist] = [
        Line2D([], [], color=style.colour, marker=style.marker, label=f"cut at layer {layer}")
        for layer, style in zip(study.layers, layer_lines(len(study.layers)))
    ]
    found.append(Line2D([], [], color="0.3", label=ranking(study)))
    if study.blind:
        found.append(Line2D([], [], color="0.3", linestyle=(0, (3, 1.6)), label="at random"))
    if study.none is not None:
        found.append(Line2D([], [], color="black", linewidth=0.8, label="none"))
    if floor is not None:
        found.append(Line2D([], [], color="0.35", linewidth=0.8, dashes=(7, 3), label="blind guess"))
    return found


def ranking(study: Study) -> str:
    """The study's way of ranking, for a legend."""
    return "by attention" if study.method in ("pyramiddrop", "fastv") else f"by {method_name(study.method)}"


def heat(study: Study) -> Figure | None:
    """Layer x keep: ranked minus none, random minus none, ranked minus random; None if nothing can be compared."""
    panels = [
        (f"{ranking(study)}, minus none", differences(study.ranked, against_none)),
        ("at random, minus none", differences(study.blind, against_none)),
        (f"{ranking(study)}, minus at random", differences(study.ranked, lambda row: row.against_random)),
    ]
    panels = [(title, held) for title, held in panels if held]
    if not panels:
        return None
    layers, keeps = study.layers, study.keeps
    losses, worth = panels[:-1], panels[-1:]  # the gain of a ranking is smaller than the losses: it has its own scale
    if len(panels) < 3:
        losses, worth = panels, []
    limits = [limit_of(losses)] * len(losses) + [limit_of(worth)] * len(worth)
    with plt.rc_context({**SETTINGS, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, grid = plt.subplots(
            len(panels),
            1,
            figsize=(COLUMN, (0.19 * len(layers) + 0.3) * len(panels) + 0.5),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, (title, held), limit in zip(grid.flat, panels, limits):
            values = np.full((len(layers), len(keeps)), np.nan)
            for (layer, keep), change in held.items():
                values[layers.index(layer), keeps.index(keep)] = 100 * change.value
            axes.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
            annotate(axes, held, layers, keeps, limit)
            axes.set_title(title + (" (points)" if axes is grid[0][0] else ""), pad=3)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.tick_params(length=0)
        grid[-1][0].set_xticks(range(len(keeps)), [f"{100 * keep:g}" for keep in keeps])
        grid[-1][0].set_xlabel(KEPT)
        figure.supylabel("cut at layer", fontsize=8)
    return figure


def limit_of(panels: list[tuple[str, dict[Place, Estimate]]]) -> float:
    """The difference, in points, that gets full colour."""
    return max([FAINTEST, *(abs(100 * change.value) for _, held in panels for change in held.values())])


def against_none(row: Row) -> Estimate | None:
    """The average minus that of dropping nothing."""
    return row.average.delta if row.average else None


def differences(rows: Mapping[Place, Row], pick: Callable[[Row], Estimate | None]) -> dict[Place, Estimate]:
    """The known differences, by layer and keep."""
    return {place: change for place, row in rows.items() if (change := pick(row)) is not None}


def annotate(axes: Axes, held: Mapping[Place, Estimate], layers: list[int], keeps: list[float], limit: float) -> None:
    """Each cell's value in points; bold where it is distinguishable from zero (`Estimate.clear`)."""
    for (layer, keep), change in held.items():
        value = 100 * change.value
        axes.text(
            keeps.index(keep),
            layers.index(layer),
            minus(f"{value:+.1f}") if abs(value) >= 0.05 else "0",
            ha="center",
            va="center",
            fontsize=6.5,
            fontweight="bold" if change.clear else "normal",
            color="white" if abs(value) > 0.62 * limit else "black",
        )
