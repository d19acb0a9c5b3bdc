"""Sentences on tables of equal budgets: averages, which methods beat chance, which are on the Pareto front."""

from __future__ import annotations

from pathlib import Path

from ..comparison.against_random import is_random
from ..comparison.table_model import Row, Table
from ..statistics import LEVEL, holm
from ..studies.front_figure import front
from ..style import method_name, task_names
from ..tables.text import percent

READING = ("embedded_reading", "embedded_document")  # the families that dropping hurts first
SHOWN = {  # figures and their captions
    "rivals-front": "Every method at equal budgets, chance, and the Pareto front",
    "rivals-by-task": "Every method at equal budgets, task by task",
}


def matched(table: Table | None, place: str) -> str:
    """The paragraph on PyramidDrop, FastV and SparseVLM at equal budgets."""
    return "" if table is None else f"**At equal budgets.** {averages(table)} {chance(table)} {linked(table, place)}"


def rivals(table: Table | None, place: str) -> str:
    """The paragraph on every method at equal budgets: averages, chance, the Pareto front, and losses in reading."""
    if table is None:
        return ""
    parts = (averages(table), chance(table), on_the_front(table), reading(table), linked(table, place))
    return "**Every method at equal budgets.** " + " ".join(part for part in parts if part)


def figure(results: Path, place: str) -> list[str]:
    """The figures of all methods as lines of Markdown, if they have been drawn."""
    there = [name for name in SHOWN if (results / "figures" / f"{name}.png").is_file()]
    return [line for name in there for line in (f"![{SHOWN[name]}]({place}/figures/{name}.png)", "")]


def ranked(table: Table) -> list[Row]:
    """The rows that drop tokens by a ranking, not at random."""
    return [row for row in table.rows if row.drops and row.average is not None and not is_random(row)]


def averages(table: Table) -> str:
    """A sentence with each budget's methods, the best average first."""
    rows = ranked(table)
    none = next((row.average for row in table.rows if not row.drops and row.average is not None), None)
    told = []
    for budget in dict.fromkeys(row.budget for row in rows):
        those = [(row.average.score.value, row) for row in rows if row.budget == budget and row.average is not None]
        those.sort(key=lambda one: -one[0])
        told.append(f"at {budget} {', '.join(f'{method_name(row.spec.method)} {percent(v)}' for v, row in those)}")
    full = f" (none {percent(none.score.value)})" if none else ""
    questions = sum(table.tasks[name].n for name in table.averaged)
    return f"Averages in %{full}, {questions} questions in all: {'; '.join(told)}."


def chance(table: Table) -> str:
    """A sentence on which rankings are distinguishable from their random twins."""
    rows = ranked(table)
    words = {"above": "above chance", "below": "below chance", "not distinguishable": "not distinguishable from chance"}
    told = []
    for verdict, said in words.items():
        names = [f"{method_name(row.spec.method)} ({row.budget})" for row in rows if row.told_from_random == verdict]
        if names:
            told.append(f"{said}: {', '.join(names)}")
    if told:
        held = [row for row in rows if row.told_from_random in words]
        seeds = sorted({row.random_seeds for row in held})
        few = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        return (
            f"Against chance ({few} seeds of the twins, where five are wanted; {len(held)} comparisons, each by "
            f"itself): {'; '.join(told)}. {corrected(held)}"
        )
    single = any(row.told_from_random == "no verdict" for row in rows)
    return "Each has a random twin with a single seed, so none is judged." if single else ""


def corrected(held: list[Row]) -> str:
    """A sentence on which verdicts against chance remain if the number of comparisons is counted."""
    tests = [(row, row.against_random.p) for row in held if row.against_random and row.against_random.p is not None]
    if len(tests) < len(held) or len(held) < 2:
        return ""
    left: dict[str, list[str]] = {"above": [], "below": []}
    for (row, _), p in zip(tests, holm([p for _, p in tests])):
        if row.told_from_random in left and p < 1 - LEVEL:
            left[row.told_from_random].append(f"{method_name(row.spec.method)} ({row.budget})")
    told = [f"{side}: {', '.join(names)}" for side, names in left.items() if names]
    return f"With Holm's correction for their number there remain {'; '.join(told) or 'none'}."


def on_the_front(table: Table) -> str:
    """A sentence on the methods that no other beats at their cost, whether or not the difference is significant."""
    points = [
        (row.cost("prefill_flops_ratio") or 0.0, row.average.score.value, row) for row in ranked(table) if row.average
    ]
    best = front(points)
    if not best:
        return ""
    named = ", ".join(f"{method_name(row.spec.method)} at {percent(cost)} % of the FLOPs" for cost, _, row in best)
    return f"On the Pareto front, by the scores alone, however sure: {named}."


def reading(table: Table) -> str:
    """A sentence on tasks that need reading: their scores with PyramidDrop, and with the best method."""
    names, rows, told = task_names(list(table.tasks)), ranked(table), []
    for task in READING:
        none = next((row.cells[task] for row in table.rows if not row.drops and task in row.cells), None)
        for budget in dict.fromkeys(row.budget for row in rows):
            having = [row for row in rows if row.budget == budget and task in row.cells]
            ours = next((row for row in having if row.spec.method == "pyramiddrop"), None)
            if none is None or ours is None:
                continue
            best = max(having, key=lambda row: row.cells[task].score.value)
            whole, left, most = (percent(one.score.value) for one in (none, ours.cells[task], best.cells[task]))
            leader = f"(most: {method_name(best.spec.method)}, {most} %)"
            told.append(f'"{names[task]}" from {whole} to {left} % at {budget} {leader}')
    return f"PyramidDrop takes {'; '.join(told)}." if told else ""


def linked(table: Table, place: str) -> str:
    """A link to the table."""
    return f"([{table.name}.md]({place}/tables/{table.name}.md))"
