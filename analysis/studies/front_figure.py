"""Many methods at equal budgets: their scores next to chance, and the Pareto front of score against cost.

    NAME-front      one panel per budget, a line per method; and all of them against prefill FLOPs

Drawn if a table has more methods than lines can show distinctly (tradeoff_figure.py draws fewer). Bars are paired 95 %
intervals of the difference to dropping nothing, drawn around the score. A method is on the front if no other one scores
more for the same cost or less; between two that are not distinguishable, that means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from ..comparison.against_random import is_random, twin_of
from ..comparison.table_model import Row, Table
from ..drawing import PAGE, SETTINGS
from ..style import budget_words, method_name
from .tradeoff_figure import averaged, crowded, drawable, half_lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRONT, INSIDE, CHANCE = "#0072B2", "#D55E00", "0.55"  # before the decoder, inside it, at random
NEAR = 1e-6  # shares of FLOPs this near count as one


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figure of each model with many methods, with its file's stem."""
    for model in table.models:
        rows = drawable(table, model)
        if crowded(rows):
            stem = table.name if len(table.models) == 1 else f"{table.name}-{model}"
            yield f"{stem}-front", front_figure(table, rows)


def front_figure(table: Table, rows: list[Row]) -> Figure:
    """A panel per budget, and the front."""
    held = [row for row in rows if row.drops and row.average is not None and not is_random(row)]
    budgets = list(dict.fromkeys(row.budget for row in held))
    methods = by_score(held)
    with plt.rc_context({**SETTINGS, "lines.markersize": 3.6}):
        figure, grid = plt.subplots(
            1, len(budgets) + 1, figsize=(PAGE, 0.155 * len(methods) + 1.5), squeeze=False, layout="constrained",
            width_ratios=[1.0] * len(budgets) + [1.3],
        )  # fmt: skip
        panels = list(grid[0])
        for axes in panels[1:-1]:
            axes.sharex(panels[0])
        for number, (axes, budget) in enumerate(zip(panels, budgets)):
            one_budget(axes, [row for row in held if row.budget == budget], rows, methods)
            level(axes.axvline, table, rows)
            axes.set_title(budget_words(budget), pad=4)
            axes.set_xlabel("average score (%)" if number else averaged(table))
            axes.set_yticks(range(len(methods)), [method_name(name) for name in methods] if not number else [])
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.grid(axis="both", linewidth=0.4, color="0.9")
        against_cost(panels[-1], held)
        level(panels[-1].axhline, table, rows)
        handles, names = panels[0].get_legend_handles_labels()
        known = dict(zip(names, handles))
        figure.legend(known.values(), known, loc="outside upper center", ncols=len(known), frameon=False)
    return figure


def by_score(rows: Sequence[Row]) -> list[str]:
    """The methods, the highest mean of their averages first."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.average is not None:
            scores.setdefault(row.spec.method, []).append(row.average.score.value)
    return sorted(scores, key=lambda name: (-sum(scores[name]) / len(scores[name]), name))


def one_budget(axes: Axes, held: Sequence[Row], rows: list[Row], methods: Sequence[str]) -> None:
    """Each method's score with its bar, and its random twin's."""
    for row in held:
        if row.average is None:
            continue
        place, twin = methods.index(row.spec.method), twin_of(row, rows)
        if twin is not None and twin.average is not None:
            axes.plot(100 * twin.average.score.value, place, "|", color=CHANCE, markersize=8, label="at random")
        below, above = half_lengths(row.average, 100)
        inside = starts_inside(row)
        axes.errorbar(
            100 * row.average.score.value, place, xerr=[[below], [above]], fmt="s" if inside else "o", elinewidth=0.8,
            color=INSIDE if inside else FRONT, capsize=1.5, markeredgecolor="white", markeredgewidth=0.4,
            label="inside the decoder" if inside else "before the decoder",
        )  # fmt: skip


def against_cost(axes: Axes, held: Sequence[Row]) -> None:
    """All rows against prefill FLOPs, the front as steps, with its methods' names."""
    points = [(row.cost("prefill_flops_ratio") or 0.0, row.average.score.value, row) for row in held if row.average]
    for cost, score, row in points:
        inside = starts_inside(row)
        axes.plot(100 * cost, 100 * score, "s" if inside else "o", color=INSIDE if inside else FRONT, alpha=0.75)
    best, dearest = front(points), max(cost for cost, _, _ in points)
    steps = [*((cost, score) for cost, score, _ in best), (dearest, best[-1][1])]
    axes.step([100 * cost for cost, _ in steps], [100 * score for _, score in steps], where="post", color="black",
              linewidth=0.9, zorder=1)  # fmt: skip
    for cost, score, row in best:
        axes.plot(100 * cost, 100 * score, "o", markersize=6.5, markerfacecolor="none", markeredgecolor="black")
        axes.annotate(
            method_name(row.spec.method), (100 * cost, 100 * score), xytext=(6, 4), textcoords="offset points",
            fontsize=6, zorder=1.5,  # below the points: a name hides none
        )  # fmt: skip
    costs = [100 * cost for cost, _, _ in points]
    spread = max(costs) - min(costs) + 1
    axes.set_xlim(min(costs) - 0.08 * spread, max(costs) + 0.3 * spread)
    axes.set_title("score and cost: the Pareto front", pad=4)
    axes.set_xlabel("prefill FLOPs (% of none)")
    axes.set_ylabel("average score (%)")
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    axes.spines["right"].set_visible(True)
    axes.spines["left"].set_visible(False)
    axes.grid(linewidth=0.4, color="0.9")


def front(points: Sequence[tuple[float, float, Row]]) -> list[tuple[float, float, Row]]:
    """The points that no other one beats (score no lower, cost no higher, and one of them better), by cost."""
    found: list[tuple[float, float, Row]] = []
    for point in sorted(points, key=lambda one: (round(one[0] / NEAR), -one[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found


def starts_inside(row: Row) -> bool:
    """Whether the decoder's first layer sees all visual tokens."""
    return not row.spec.schedule.startswith("0:")


def level(line: Callable[..., Any], table: Table, rows: Sequence[Row]) -> None:
    """Lines at dropping nothing and at the blind guess."""
    for row in rows:
        if not row.drops and row.average is not None:
            line(100 * row.average.score.value, color="black", linewidth=0.9, label="none", zorder=1)
    if table.floor is not None:
        line(100 * table.floor, color="0.35", linewidth=0.8, dashes=(7, 3), label="blind guess", zorder=1)
