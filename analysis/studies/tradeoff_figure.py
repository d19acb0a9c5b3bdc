"""Trade-off figures: score against prefill FLOPs, one line per method, for a paper's column and for each task.

Error bars are the 95 % intervals of the paired difference to dropping nothing, drawn around the score: if a bar reaches
the horizontal line of `none`, a loss cannot be distinguished. Every point is drawn where it was measured; markers are
open and bars translucent, so that what is below shows. Budgets of two kinds (equal tokens, equal FLOPs) are two curves.
With many methods, a front joins those that no other one beats at lower cost. Grids of single cuts have their own figure
(redundancy_figure.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pdrop.schedule import Schedule

from ..comparison.budgets import kind
from ..comparison.table_model import Cell, Row, Table, seedless
from ..drawing import COLUMN, PAGE, SETTINGS, hide_the_rest
from ..labels import Named, fit, name_curves
from ..style import LINES, SPARE_LINES, Line, another_way, lines, method_name, task_names
from .attention import ranks_only
from .redundancy import studies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROWEST = 20  # percentage points of FLOPs: a smaller range would exaggerate differences that mean nothing
MANY = 7  # methods from which on the front is drawn
SEEN_THROUGH = 0.55  # opacity of bars, so that what is below shows
FRONT = "Pareto front"
EQUAL = {  # kinds of budgets in words
    "avg_tokens": "equal average tokens",
    "keep": "equal mean keep",
    "flops": "equal prefill FLOPs",
    "kv": "equal KV cache",
    "prefill_ms": "equal prefill time",
}
Point = tuple[float, Cell]  # prefill FLOPs in % of none, score


def tradeoff(table: Table, model: str) -> Figure | None:
    """The average against prefill FLOPs, at column width; None without a finished run that drops tokens."""
    rows = drawable(table, model)
    if not rows:
        return None
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
        cells = [row.average for row in rows]
        draw(axes, rows, cells)
        axes.set_xlabel("prefill FLOPs (% of none)")
        axes.set_ylabel(averaged(table))
        direct(axes, rows, cells, table.floor)
    return figure


def averaged(table: Table) -> str:
    """The label of an axis of averages: over how many tasks, or of which one."""
    tasks = table.averaged
    return (
        f"average score of {len(tasks)} tasks (%)" if len(tasks) != 1 else f"score of {task_names(tasks)[tasks[0]]} (%)"
    )


def direct(axes: Axes, rows: list[Row], cells: list[Cell | None], floor: float | None) -> None:
    """Axis ranges that fit the measured values, and names next to the curves instead of a legend."""
    held = {label: points(rows, cells, numbers) for label, (_, numbers) in curves(rows).items()}
    if len(held) >= MANY:
        draw_front(axes, rows, cells)
    if floor is not None:
        axes.axhline(100 * floor, color="0.35", linewidth=0.8, dashes=(7, 3), zorder=1)
    ends = [end for there in held.values() for _, cell in there for end in ends_of(cell, 100)]
    whole = [100 * c.score.value for row, c in zip(rows, cells) if c is not None and not row.drops]
    guess = [("blind guess", 100 * floor)] if floor is not None else []
    fit(axes, [*ends, *whole], guess)
    named = []
    for label, (style, numbers) in curves(rows).items():
        there = points(rows, cells, numbers)
        if there:
            places = [(flops, 100 * cell.score.value) for flops, cell in there]
            bars = [ends_of(cell, 100) for _, cell in there]
            named.append(Named(label, style.colour, places, bars, joined=not one_kind_each(rows, numbers)))
    left, right = axes.get_xlim()
    levels = [("none", "black", value) for value in whole[:1]]
    levels += [(name, "0.35", value) for name, value in guess if axes.get_ylim()[0] < value < axes.get_ylim()[1]]
    for name, colour, value in levels:  # a horizontal is named anywhere along it
        steps = [(left + (right - left) * share, value) for share in (0.06, 0.2, 0.35, 0.5, 0.65, 0.8, 0.94)]
        named.append(Named(name, colour, steps))
    name_curves(axes, named)
    kinds_key(axes, rows)


def kinds_key(axes: Axes, rows: list[Row]) -> None:
    """Say above the panel what open and filled markers mean, where budgets are of several kinds."""
    if handles := kind_handles(rows):
        axes.figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, handletextpad=0.2)


def kind_handles(rows: list[Row]) -> list[Line2D]:
    """Of a legend: open and filled markers with the kind of budget that they mean; none if there is one kind."""
    kinds = kinds_of(rows)
    faces = ["white", *["0.45"] * (len(kinds) - 1)]
    return [
        Line2D(
            [], [], linestyle="", marker="o", color="0.45", markerfacecolor=face, label=EQUAL.get(name, name or "ratio")
        )
        for name, face in zip(kinds, faces)
        if len(kinds) > 1
    ]


def kinds_of(rows: list[Row]) -> list[str]:
    """The kinds of budgets of the rows that drop, sorted."""
    return sorted({kind(row.runs[0]) for row in rows if row.drops})


def one_kind_each(rows: list[Row], numbers: list[int]) -> bool:
    """Whether no two points of a curve have the same kind of budget, so that no line joins them."""
    found = [kind(rows[number].runs[0]) for number in numbers]
    return len(set(found)) == len(found)


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
            floor = table.floors.get(name)
            if floor is not None:
                look = {"linewidth": 0.8, "dashes": (7, 3), "label": "blind guess", "zorder": 1}
                axes.axhline((100 if task.fraction else 1) * floor, color="0.35", **look)
            draw(axes, rows, cells, 100 if task.fraction else 1)
            axes.set_title(names[name] + ("" if task.fraction else " (points)"), pad=3)
        hide_the_rest(grid, len(table.tasks))
        figure.supxlabel("prefill FLOPs (% of none)", fontsize=8)
        figure.supylabel("score (%)", fontsize=8)
        legend(figure, grid[0][0], columns=6, more=kind_handles(rows))
    return figure


def curves(rows: list[Row]) -> dict[str, tuple[Line, list[int]]]:
    """Label -> how it is drawn, and its rows' numbers: one curve per method, more if it was run in several ways.

    Rows of one curve differ only in the fractions. Another choice of layers, positions or arguments is another curve,
    labelled with what distinguishes it.
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
    """The finished rows of a model that have a cost; none unless one of them drops tokens outside of a study."""
    rows = [r for r in table.rows if r.spec.model == model and r.status == "done" and r.cost("prefill_flops_ratio")]
    studied = {id(row) for study in studies(table) for row in (*study.ranked.values(), *study.blind.values())}
    studied |= {id(row) for row in rows if ranks_only(row.runs[0])}
    return rows if any(row.drops and id(row) not in studied for row in rows) else []


def crowded(rows: Sequence[Row]) -> bool:
    """Whether there are more methods than lines that can be distinguished; front_figure.py draws those."""
    return len({row.spec.method for row in rows if row.drops} - set(LINES)) > len(SPARE_LINES)


def points(rows: list[Row], cells: list[Cell | None], numbers: list[int]) -> list[Point]:
    """(FLOPs in %, cell) of a curve's rows that have both, the cheapest first."""
    there = ((rows[number].cost("prefill_flops_ratio"), cells[number]) for number in numbers)
    known = [(100 * flops, cell) for flops, cell in there if flops is not None and cell is not None]
    return sorted(known, key=lambda point: point[0])


def draw(axes: Axes, rows: list[Row], cells: list[Cell | None], scale: float = 100) -> None:
    """One panel: one curve per method and kind of budget through its budgets, `none` as a horizontal line."""
    for row, cell in zip(rows, cells):
        if cell is not None and not row.drops:
            axes.axhline(scale * cell.score.value, color="black", linewidth=0.9, label="none", zorder=1)
    drawn, kinds = curves(rows), kinds_of(rows)
    for label, (style, numbers) in drawn.items():
        for name in kinds:
            of_kind = [number for number in numbers if kind(rows[number].runs[0]) == name]
            if there := points(rows, cells, of_kind):
                filled = len(kinds) > 1 and name != kinds[0]
                draw_curve(axes, there, style, label, filled, scale)
    axes.grid(axis="y", linewidth=0.4, color="0.88")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    left, right = axes.get_xlim()
    if right - left < NARROWEST:
        middle = (left + right) / 2
        axes.set_xlim(middle - NARROWEST / 2, middle + NARROWEST / 2)


def draw_curve(axes: Axes, there: list[Point], style: Line, label: str | None, filled: bool, scale: float) -> None:
    """Draw open markers, with translucent bars below them."""
    places = [flops for flops, _ in there]
    scores = [scale * cell.score.value for _, cell in there]
    held = axes.errorbar(
        places,
        scores,
        yerr=list(zip(*(half_lengths(cell, scale) for _, cell in there))),
        color=style.colour,
        marker=style.marker,
        linestyle=style.dashes,
        markerfacecolor=style.colour if filled else "none",
        markeredgewidth=0.9,
        elinewidth=0.8,
        label=label,
        zorder=3,
    )
    for bars in held.lines[2]:
        bars.set_alpha(SEEN_THROUGH)


def draw_front(axes: Axes, rows: list[Row], cells: list[Cell | None]) -> None:
    """Draw a broad grey line through the points that no other one beats at the same cost or less."""
    known = [
        (100 * flops, 100 * cell.score.value)
        for row, cell in zip(rows, cells)
        if row.drops and cell is not None and (flops := row.cost("prefill_flops_ratio")) is not None
    ]
    best: list[tuple[float, float]] = []
    for flops, score in sorted(known, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((flops, score))
    if len(best) > 1:
        axes.plot(*zip(*best), color="0.86", linewidth=4, solid_capstyle="round", label=FRONT, zorder=0.5)


def ends_of(cell: Cell, scale: float) -> tuple[float, float]:
    """The ends of a score's bar, below and above."""
    below, above = half_lengths(cell, scale)
    return scale * cell.score.value - below, scale * cell.score.value + above


def half_lengths(cell: Cell, scale: float) -> tuple[float, float]:
    """The lengths of the error bar below and above the score; none without an interval."""
    delta = cell.delta
    if delta is None or delta.low is None or delta.high is None:
        return 0.0, 0.0
    # rounding may put a bound slightly beyond its value; a bar has no negative length
    below, above = max(0.0, scale * (delta.value - delta.low)), max(0.0, scale * (delta.high - delta.value))
    value = scale * cell.score.value
    above = min(above, max(0.0, 100 - value)) if scale == 100 else above
    return min(below, value), above  # no score is below zero, and no fraction above 100 %


def legend(figure: Figure, axes: Axes, columns: int, more: Sequence[Line2D] = ()) -> None:
    """One legend above all panels, outside of them, so that it hides nothing; as many columns as fit the width."""
    handles, every = axes.get_legend_handles_labels()
    names = list(dict.fromkeys(every))  # a curve of several kinds of budget is drawn in parts
    handles = [handles[every.index(name)] for name in names]
    shown = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
    shown, names = [*shown, *more], [*names, *(str(handle.get_label()) for handle in more)]
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

    If some of several models were run with several budgets, those with one budget per method are left out: a single
    point is no trade-off.
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
