"""Many methods at equal budgets, task by task: which kinds of questions each method still answers, next to chance.

    NAME-by-task    one grid per budget: a row per method, a column per task, the score in each cell

Drawn, like the front, if a table has more methods than lines can show distinctly. The shade is the score between that
task's blind guess (white) and its score without dropping (full). A cell is framed if the method scores more than its
random twin's best seed, and underlined if it scores less than the worst one: with few questions per task that is a
description, not a verdict; the verdicts on averages are in the table. Below: random dropping, the mean of all twins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from ..comparison.against_random import is_random, twin_of
from ..comparison.table_model import Row, Table
from ..drawing import PAGE, SETTINGS
from ..style import budget_words, method_name, task_names
from .front_figure import by_score
from .tradeoff_figure import crowded, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = LinearSegmentedColormap.from_list("kept", ["#FFFFFF", "#0072B2"])
DARK = 0.6  # shares of none from which on words are white
NONE, CHANCE, GUESS = "none", "at random", "blind guess"


def files(table: Table) -> Iterable[tuple[str, Figure]]:
    """The figure of each model with many methods, with its file's stem."""
    tasks = [name for name, task in table.tasks.items() if task.fraction]
    for model in table.models:
        rows = drawable(table, model)
        if crowded(rows) and len(tasks) > 1:
            stem = table.name if len(table.models) == 1 else f"{table.name}-{model}"
            yield f"{stem}-by-task", grid_figure(table, rows, tasks)


def grid_figure(table: Table, rows: list[Row], tasks: Sequence[str]) -> Figure:
    """A grid for each budget, one below the other."""
    held = [row for row in rows if row.drops and row.average is not None and not is_random(row)]
    budgets, methods = list(dict.fromkeys(row.budget for row in held)), by_score(held)
    whole = next((row for row in rows if not row.drops), None)
    with plt.rc_context(SETTINGS):
        figure, panels = plt.subplots(
            len(budgets), 1, figsize=(PAGE, (0.17 * (len(methods) + 3) + 0.5) * len(budgets)), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for axes, budget in zip(panels[:, 0], budgets):
            of_budget = {row.spec.method: row for row in held if row.budget == budget}
            one_budget(
                axes, table, tasks, [(name, of_budget[name]) for name in methods if name in of_budget], rows, whole
            )
            axes.set_title(budget_words(budget), pad=16, loc="left")
    return figure


def one_budget(
    axes: Axes,
    table: Table,
    tasks: Sequence[str],
    methods: Sequence[tuple[str, Row]],
    rows: list[Row],
    whole: Row | None,
) -> None:
    """Rows for no dropping, the methods, chance and the blind guess; one column per task."""
    twins = {name: twin_of(row, rows) for name, row in methods}
    lines: list[tuple[str, dict[str, float]]] = []
    if whole is not None:
        lines.append((NONE, {task: whole.cells[task].score.value for task in tasks if task in whole.cells}))
    lines += [
        (name, {task: row.cells[task].score.value for task in tasks if task in row.cells}) for name, row in methods
    ]
    blind = list({id(twin): twin for twin in twins.values() if twin is not None}.values())
    if blind:
        lines.append((CHANCE, {task: fmean(twin.cells[task].score.value for twin in blind) for task in tasks}))
    if table.floors:
        lines.append((GUESS, {task: floor for task, floor in table.floors.items() if task in tasks}))
    for number, (name, scores) in enumerate(lines):
        for column, task in enumerate(tasks):
            if task not in scores:
                continue
            low, high = table.floors.get(task) or 0.0, lines[0][1].get(task, 1.0) if whole is not None else 1.0
            kept = max(0.0, min(1.0, (scores[task] - low) / (high - low))) if high > low else 0.0
            plain = name in (NONE, CHANCE, GUESS)
            axes.add_patch(Rectangle((column, number), 1, 1, facecolor=SHADES(kept), edgecolor="white", linewidth=0.6))
            beyond = "" if plain else against(twins[name], task, scores[task])
            words: dict[str, Any] = {
                "color": "white" if kept >= DARK else "0.15",
                "fontsize": 6.2,
                "ha": "center",
                "va": "center",
            }
            axes.text(column + 0.5, number + 0.52, f"{100 * scores[task]:.0f}", **words)
            if beyond == "above":
                axes.add_patch(Rectangle((column + 0.06, number + 0.08), 0.88, 0.84, fill=False, edgecolor="black",
                                         linewidth=0.8))  # fmt: skip
            if beyond == "below":
                axes.plot([column + 0.3, column + 0.7], [number + 0.87] * 2, color="#D55E00", linewidth=1.2)
    names = task_names(list(tasks))
    axes.set_xticks([column + 0.5 for column in range(len(tasks))], [names[task] for task in tasks])
    axes.set_yticks(
        [number + 0.5 for number in range(len(lines))],
        [name if name in (NONE, CHANCE, GUESS) else method_name(name) for name, _ in lines],
    )
    axes.set_xlim(0, len(tasks))
    axes.set_ylim(len(lines), 0)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def against(twin: Row | None, task: str, score: float) -> str:
    """Whether a score is above all seeds of the random twin, below all, or neither ("")."""
    if twin is None:
        return ""
    seeds = [run.score(task) for run in twin.runs]
    return "above" if score > max(seeds) else "below" if score < min(seeds) else ""
