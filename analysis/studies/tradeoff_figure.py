"""Trade-off figures: score against prefill FLOPs, one line per method, for a paper's column and for each task.

Error bars are the 95 % intervals of the paired difference to dropping nothing, drawn around the score: where
a bar reaches the horizontal line of `none`, no loss is shown. Curves are moved sideways a little, so that bars of
equal cost do not hide each other. Grids of single cuts have a figure of their own (analysis/redundancy_figure.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.container import ErrorbarContainer
from matplotlib.ticker import MaxNLocator

from pdrop.schedule import Schedule

from ..comparison.table_model import Cell, Row, Table, seedless
from ..drawing import BARS, COLUMN, PAGE, SETTINGS
from ..style import LINES, SPARE_LINES, Line, another_way, lines, method_name, task_names
from .attention import ranks_only
from .redundancy import studies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROWEST = 20  # percentage points of FLOPs: less would blow up differences that mean nothing
# percentage points of FLOPs: how far apart neighbouring curves stand, which would hide each other where they are flat,
# and the farthest that one stands from its place
DODGE, DODGE_BY_TASK = 0.7, 1.0


def tradeoff(table: Table, model: str) -> Figure | None:
    """The average against prefill FLOPs, at column width; None without a finished run that drops tokens."""
    rows = drawable(table, model)
    if not rows:
        return None
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(COLUMN, 2.7), layout="constrained")
        draw(axes, rows, [row.average for row in rows], table.floor)
        axes.set_xlabel(f"prefill FLOPs (% of none; moved by {DODGE} at most)\n{BARS}")
        axes.set_ylabel(f"average score of {len(table.averaged)} tasks (%)")
        legend(figure, axes, columns=3)
    return figure


def tradeoff_by_task(table: Table, model: str) -> Figure | None:
    """One small panel per task, at page width, the score axis shared by the fractions."""
    rows = drawable(table, model)
    if not rows or not table.tasks:
        return None
    names = task_names(list(table.tasks))
    across = min(5, max(3, math.ceil(len(table.tasks) / 2))) if len(table.tasks) > 3 else len(table.tasks)
    down = math.ceil(len(table.tasks) / across)
    with plt.rc_context({**SETTINGS, "lines.markersize": 3.5, "lines.linewidth": 1.0}):
        figure, grid = plt.subplots(
            down,
            across,
            figsize=(PAGE, 1.55 * down + 0.5),
            sharex=True,
            sharey=all(task.fraction for task in table.tasks.values()),  # points of different tasks share no axis
            squeeze=False,
            layout="constrained",
        )
        for number, (name, task) in enumerate(table.tasks.items()):
            axes = grid[number // across][number % across]
            cells = [row.cells.get(name) for row in rows]
            draw(axes, rows, cells, table.floors.get(name), 100 if task.fraction else 1, DODGE_BY_TASK)
            axes.set_title(names[name] + ("" if task.fraction else " (points)"), pad=3)
        for axes in grid.flat[len(table.tasks) :]:
            axes.set_visible(False)
        figure.supxlabel(f"prefill FLOPs (% of none; moved by {DODGE_BY_TASK:.0f} at most); {BARS}", fontsize=8)
        figure.supylabel("score (%)", fontsize=8)
        legend(figure, grid[0][0], columns=6)
    return figure


def curves(rows: list[Row]) -> dict[str, tuple[Line, list[int]]]:
    """Label -> how it is drawn, and its rows' numbers: one curve per method, more where it was run in several ways.

    Rows of one curve differ in the fractions alone. Another choice of layers, positions or arguments is another curve,
    labelled with what sets it apart.
    """
    ways: dict[str, dict[tuple[str, str, str], list[int]]] = {}
    for number, row in enumerate(rows):
        if row.drops:
            layers = "/".join(map(str, Schedule.parse(row.spec.schedule).layers))
            way = (f"at {layers}", row.spec.positions, seedless(row.spec))
            ways.setdefault(row.spec.method, {}).setdefault(way, []).append(number)
    styles = lines(list(ways))
    found = {}
    for method, by_way in sorted(ways.items()):
        for place, (way, numbers) in enumerate(sorted(by_way.items(), key=lambda item: (-len(item[1]), item[0]))):
            apart = [part for n, part in enumerate(way) if len({other[n] for other in by_way}) > 1]
            label = method_name(method) + (f" ({', '.join(apart)})" if apart else "")
            found[label] = (another_way(styles[method], place), numbers)
    return found


def drawable(table: Table, model: str) -> list[Row]:
    """Finished rows of a model that have a cost, if any of them drops tokens and is not part of a study."""
    rows = [r for r in table.rows if r.spec.model == model and r.status == "done" and r.cost("prefill_flops_ratio")]
    studied = {id(row) for study in studies(table) for row in (*study.ranked.values(), *study.blind.values())}
    studied |= {id(row) for row in rows if ranks_only(row.runs[0])}
    return rows if any(row.drops and id(row) not in studied for row in rows) else []


def crowded(rows: Sequence[Row]) -> bool:
    """Whether there are more methods than lines that can be told apart; front_figure.py draws those."""
    return len({row.spec.method for row in rows if row.drops} - set(LINES)) > len(SPARE_LINES)


def beside(number: int, curves: int, dodge: float) -> float:
    """How far curve `number` of `curves` stands from its place, in points of FLOPs: at most `dodge`, however many."""
    return min(dodge, 2 * dodge / max(1, curves - 1)) * (number - (curves - 1) / 2)


def draw(
    axes: Axes,
    rows: list[Row],
    cells: list[Cell | None],
    floor: float | None,
    scale: float = 100,
    dodge: float = DODGE,
) -> None:
    """One panel: one curve per method through its budgets, `none` and the blind guess as horizontal lines."""
    for row, cell in zip(rows, cells):
        if cell is not None and not row.drops:
            axes.axhline(scale * cell.score.value, color="black", linewidth=0.9, label="none", zorder=1)
    if floor is not None:
        axes.axhline(scale * floor, color="0.35", linewidth=0.8, dashes=(7, 3), label="blind guess", zorder=1)
    drawn = curves(rows)
    costs = {
        label: fmean(rows[n].cost("prefill_flops_ratio") or 0 for n in numbers) for label, (_, numbers) in drawn.items()
    }
    by_cost = sorted(drawn, key=lambda label: round(costs[label], 6))  # the cheaper left: no difference is undone
    for label, (style, numbers) in drawn.items():
        shift = beside(by_cost.index(label), len(drawn), dodge)
        there = ((rows[number].cost("prefill_flops_ratio"), cells[number]) for number in numbers)
        points = sorted(
            ((100 * flops, cell) for flops, cell in there if flops is not None and cell is not None),
            key=lambda point: point[0],
        )
        if not points:
            continue
        axes.errorbar(
            [flops + shift for flops, _ in points],
            [scale * cell.score.value for _, cell in points],
            yerr=list(zip(*(half_lengths(cell, scale) for _, cell in points))),
            color=style.colour,
            marker=style.marker,
            linestyle=style.dashes,
            markerfacecolor=style.face or style.colour,
            markeredgecolor=style.colour if style.face else "white",
            markeredgewidth=0.9 if style.face else 0.5,
            elinewidth=0.8,
            capsize=1.8,
            label=label,
            zorder=3,
        )
    axes.grid(axis="y", linewidth=0.4, color="0.88")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left, right = axes.get_xlim()
    if right - left < NARROWEST:
        middle = (left + right) / 2
        axes.set_xlim(middle - NARROWEST / 2, middle + NARROWEST / 2)


def half_lengths(cell: Cell, scale: float) -> tuple[float, float]:
    """Lengths of the error bar below and above the score; none where no interval is known."""
    delta = cell.delta
    if delta is None or delta.low is None or delta.high is None:
        return 0.0, 0.0
    # rounding may put a bound a hair beyond its value; a bar has no negative length
    below, above = max(0.0, scale * (delta.value - delta.low)), max(0.0, scale * (delta.high - delta.value))
    value = scale * cell.score.value
    above = min(above, max(0.0, 100 - value)) if scale == 100 else above
    return min(below, value), above  # no score lies below zero, nor a fraction above 100 %


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend above all panels, outside of them, so that it hides nothing; as many columns as fit the width."""
    handles, names = axes.get_legend_handles_labels()
    shown = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
    for number in range(min(columns, len(names)), 0, -1):
        if number == 3 and len(names) == 4:
            continue  # two and two, not three and one
        box = figure.legend(
            shown,
            names,
            loc="outside upper center",
            ncols=number,
            frameon=False,
            handlelength=2.2,
            columnspacing=1.2,
        )
        figure.draw_without_rendering()
        if number == 1 or box.get_window_extent().width <= figure.bbox.width:
            break
        box.remove()


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """Every figure of a table with its file's stem; one set per model.

    Where some of several models were run with several budgets, those with one budget a method are left out: a point is
    no trade-off.
    """
    models = [model for model in table.models if not crowded(drawable(table, model))]
    longest = {model: max((len(n) for _, n in curves(drawable(table, model)).values()), default=0) for model in models}
    for model in models:
        if longest[model] == 1 < max(longest.values()):
            continue
        stem = table.name if len(table.models) == 1 else f"{table.name}-{model}"
        for suffix, figure in (("", tradeoff(table, model)), ("-tasks", tradeoff_by_task(table, model))):
            if figure is not None:
                yield f"{stem}-tradeoff{suffix}", figure
