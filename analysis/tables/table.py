"""A table as Markdown, from the same rows as CSV (csv_export.py) and LaTeX (latex.py).

It consists of grids: cost and average score; the score of each task; its certainty and its runs; answers, and scores by
other rules (answers.py); and all costs (costs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from ..comparison.table_model import Cell, Row, Table, seedless
from ..grid import DASH, Grid, Text
from ..neutral import in_page
from ..style import method_name, schedule_text, task_names
from .answers import answer_grid, rule_grid
from .costs import cost_grid
from .footnotes import asked, meaning, sources, warnings
from .text import bounds, percent, probability, signed

PER_TWENTY = "mme"  # in the papers' averages a twentieth of its points counts


def grids(table: Table) -> list[Grid]:
    """The table's grids; two where nothing was scored."""
    names = task_names(list(table.tasks))
    many = ["model"] if len(table.models) > 1 else []
    head = [*many, "budget", "method"]
    costs = ["schedule", "keep %", "tokens", "FLOPs %", "KV %", *(["time %"] if table.times else [])]
    main = Grid("Score against cost", [*head, *costs, "average", "Δ none [95 %]", "n"], left=len(head) + 1)
    ends = ["average", *(["Avg, MME/20"] if PER_TWENTY in table.tasks else []), "of none %"]  # as the papers have it
    by_task = Grid("Score by task, in %", [*head, *(names[task] for task in table.tasks), *ends], left=len(head))
    if not all(task.fraction for task in table.tasks.values()):
        by_task.title = "Score by task, in % (points where a metric is not a fraction)"
    sure = Grid(
        "How sure, and from which runs",
        [
            *head,
            "Δ random [95 %]",
            "against random",
            "lost",
            "gained",
            "p",
            *(["floor to full %"] if table.scaled else []),
            "visual tokens x layers",
            "seeds",
            "runs",
        ],
        left=len(head),
    )
    before: tuple[str, str] | None = None
    for row, label in zip(table.rows, labels(table)):
        group = (row.spec.model, row.budget)
        if before is not None and before != group:
            for grid in (main, by_task, sure):
                grid.rules.add(len(grid.rows))
        start = [*([row.spec.model] if many else []), row.budget or DASH, label]
        for grid, cells in (
            (main, main_cells(row, table)),
            (by_task, task_cells(row, table)),
            (sure, sure_cells(row, table)),
        ):
            grid.rows.append([*map(Text, start), *cells])
        before = group
    if table.floors:
        blank = [Text(DASH)]
        for grid in (main, by_task):
            grid.rules.add(len(grid.rows))
        start_cells = [Text(DASH)] * (len(many) + 1) + [Text("blind guess")]
        costs_cells = blank * len(costs)
        main.rows.append([*start_cells, *costs_cells, Text(percent(table.floor)), *blank * 2])
        guesses = [Text(percent(table.floors.get(task))) for task in table.tasks]
        by_task.rows.append([*start_cells, *guesses, Text(percent(table.floor)), *blank * (len(ends) - 1)])
    starts = [[cell.text for cell in row[: len(head)]] for row in sure.rows]
    costs_in_full = cost_grid(table, head, starts)
    if not table.tasks:  # nothing was scored
        return [main, costs_in_full]
    by_rule = rule_grid(table, head, starts)
    return [main, by_task, sure, answer_grid(table, head, starts), *([by_rule] if by_rule else []), costs_in_full]


def labels(table: Table) -> list[str]:
    """Each row's method, with what else distinguishes it from its neighbours, and its status if it is not done."""
    plain = [(row.spec.model, row.budget, row.spec.method, row.spec.schedule, row.status) for row in table.rows]
    found = []
    for row, key in zip(table.rows, plain):
        alike = [other.spec for other, k in zip(table.rows, plain) if k == key]
        parts = []
        if len({spec.positions for spec in alike}) > 1:
            parts.append(row.spec.positions)
        if len({seedless(spec) for spec in alike}) > 1:
            parts.append(seedless(row.spec))
        if len({spec.tasks for spec in alike}) > 1:
            parts.append(f"{len(row.spec.tasks)} tasks: {', '.join(row.spec.tasks[:3])} ..."[:60])
        if len({spec.latency for spec in alike}) > 1:
            parts.append(f"latency {row.spec.latency}")
        if row.status != "done":
            parts.append(row.status)
        found.append(method_name(row.spec.method) + (f" ({', '.join(parts)})" if parts else ""))
    return found


def main_cells(row: Row, table: Table) -> list[Text]:
    tokens = row.visual_tokens
    cells = [
        Text(schedule_text(row.spec.schedule) or DASH),
        Text(percent(row.cost("mean_keep"))),
        Text(DASH if tokens is None else f"{tokens:.1f}"),
        Text(percent(row.cost("prefill_flops_ratio"))),
        Text(percent(row.cost("kv_ratio"))),
    ]
    if table.times:
        cells.append(Text(DASH if row.time is None else f"{percent(row.time.value)} {bounds(row.time)}".strip()))
    average = row.average
    if average is None:
        return [*cells, Text(DASH), Text(DASH), Text(DASH)]
    spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
    samples = sum(table.tasks[task].n for task in table.averaged)
    return [
        *cells,
        Text(percent(average.score.value) + spread, average.mark),
        Text(signed(average.delta)),
        Text(str(samples)),
    ]


def task_cells(row: Row, table: Table) -> list[Text]:
    """One score per task, with an arrow where it clearly differs from the row that drops nothing; then the averages."""
    average = Text(DASH) if row.average is None else Text(percent(row.average.score.value), row.average.mark)
    scores = [score_text(row.cells.get(name), task.fraction) for name, task in table.tasks.items()]
    papers = [Text(percent(papers_average(row, table)))] if PER_TWENTY in table.tasks else []
    return [*scores, average, *papers, Text(percent(row.share_of_none))]


def papers_average(row: Row, table: Table) -> float | None:
    """The papers' Avg: the mean over all tasks, with a twentieth of MME's points (arXiv 2410.17247, Tables 1 and 2)."""
    values = []
    for name, task in table.tasks.items():
        cell = row.cells.get(name)
        if cell is None or not (task.fraction or name == PER_TWENTY):
            return None
        values.append(cell.score.value if task.fraction else cell.score.value / 20 / 100)
    return fmean(values)


def by_layer(row: Row) -> str:
    """Visual tokens entering the layers, equal ones counted: 144 x3 72 x9. Means over samples and seeds."""
    lists = [run.record.cost.visual_tokens_per_layer for run in row.runs if run.record.cost is not None]
    if not lists or len(lists) < len(row.runs):
        return DASH
    means = [f"{fmean(layer):.4g}" for layer in zip(*lists)]
    return " ".join(f"{tokens} x{len(list(same))}" for tokens, same in groupby(means))


def score_text(cell: Cell | None, fraction: bool) -> Text:
    """A score, its arrow and its mark."""
    if cell is None:
        return Text(DASH)
    value = percent(cell.score.value) if fraction else f"{cell.score.value:.1f}"
    arrow = {-1: "↓", 0: "", 1: "↑"}[cell.delta.sign if cell.delta else 0]
    return Text(value + arrow, cell.mark)


def sure_cells(row: Row, table: Table) -> list[Text]:
    """A row's cells with the statistics of its average, and its runs."""
    flips = row.average.flips if row.average else None
    return [
        Text(signed(row.against_random)),
        Text(verdict(row)),
        Text(DASH if flips is None else str(flips.lost)),
        Text(DASH if flips is None else str(flips.gained)),
        Text(DASH if flips is None else probability(flips.p)),
        *([Text(percent(row.floor_to_full))] if table.scaled else []),
        Text(by_layer(row)),
        Text(str(len(row.runs))),
        Text(" ".join(run.record.run_id for run in row.runs)),
    ]


def verdict(row: Row) -> str:
    """Whether the row is distinguishable from its random twin, over how many seeds of it, and McNemar's p."""
    if row.against_random is None or not row.told_from_random:
        return DASH
    seeds = f"{row.random_seeds} seed{'s' if row.random_seeds > 1 else ''}"
    p = "" if row.against_random.p is None else f", p {probability(row.against_random.p)}"
    return f"{row.told_from_random} ({seeds}{p})"


def markdown(tables: Sequence[Table]) -> str:
    """The whole page: each table's warnings, grids and sources, and what every column means."""
    parts = []
    for table in tables:
        parts += [f"# {table.title}\n", *(f"> **{text}**\n" for text in warnings(table))]
        parts += [f"Asked with: {how}.\n" for how in asked(table)]
        for grid in grids(table):
            parts += [f"## {grid.title}\n", grid.markdown()]
        parts.append(sources(table))
    return in_page("\n".join([*parts, meaning(tables)]))
