"""The tables that papers of this field print: budgets as banners with methods below them, in two conventions.

    python -m analysis banner [NAME ...]     results/tables/NAME-banner.md, .tex; prints the former

    SparseVLM's family    GQA, MMB, MMB-CN, MME (total), POPE, SQA, VQAv2, TextVQA, VizWiz, SEED;
                          Avg: mean over the columns of score / score without dropping
    CDPruner's family     VQAv2, GQA, VizWiz, SQA, TextVQA, POPE, MME (perception), MMB, MMB-CN, MM-Vet;
                          Acc.: mean of the scores, of MME a twentieth; Rel.: Acc. / Acc. without dropping

The two cannot be mixed: one method at one budget has different numbers in each. Columns that were not run are left out;
tasks of neither family follow. Below each score is its 95 % interval; that of averages is paired with the row that
drops nothing. A banner gives the mean number of tokens that enter a layer, to 3 %, if all prompts have the same number;
otherwise a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from pdrop.commands import typed

from ..comparison.resampling import Draws, mean_draws, run_draws
from ..comparison.table_model import Row, Table
from ..grid import DASH, Grid, Text
from ..neutral import in_page
from ..statistics import Estimate, interval
from ..style import task_names
from .footnotes import asked
from .latex import by_protocol
from .table import labels
from .text import minus

NAMED = {
    576: (192, 128, 64, 32, 16),
    2880: (640, 320, 160),
    2928: (640, 320, 160),  # with the newlines of 2 x 2 tiles
    729: (160, 80, 40),
    1296: (256, 128),
    1280: (256, 128),
}
SAME = 0.03  # relative to a number of tokens: budgets this near share a banner
TWENTIETH = 20 * 100  # in the papers' averages a twentieth of MME's points counts as per cent


@dataclass(frozen=True)
class Column:
    """A benchmark of a convention: its header, lmms-eval's tasks, and metrics; of each the first that a run has."""

    header: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...] = ()  # only these if they are in points, otherwise followed by the task's main one
    points: bool = False


@dataclass(frozen=True)
class Convention:
    """A family of papers: its columns, and the names of its averages."""

    name: str
    columns: tuple[Column, ...]
    averages: tuple[str, ...]


GQA = Column("GQA", ("gqa",))
MMB = Column("MMB", ("mmbench_en_dev_static", "mmbench_en_dev"))
MMB_CN = Column("MMB-CN", ("mmbench_cn_dev_static", "mmbench_cn_dev"))
POPE = Column("POPE", ("pope",), ("official_f1", "pope_f1_score"))
SQA = Column("SQA", ("scienceqa_img",))
VQAV2 = Column("VQAv2", ("vqav2_val", "vqav2_test"))
TEXTVQA = Column("TextVQA", ("textvqa_val_ocr", "textvqa_val"))
VIZWIZ = Column("VizWiz", ("vizwiz_vqa_val", "vizwiz_vqa_test"))
SEED = Column("SEED", ("seedbench",))
TOTAL = Column("MME", ("mme",), ("mme_total_score", "mme_perception_score+mme_cognition_score"), points=True)
PERCEPTION = Column("MME-P", ("mme",), ("mme_perception_score",), points=True)
MMVET = Column("MM-Vet", ("mmvet",))
CONVENTIONS = (
    Convention("SparseVLM's", (GQA, MMB, MMB_CN, TOTAL, POPE, SQA, VQAV2, TEXTVQA, VIZWIZ, SEED), ("Avg",)),
    Convention(
        "CDPruner's",
        (VQAV2, GQA, VIZWIZ, SQA, TEXTVQA, POPE, PERCEPTION, MMB, MMB_CN, MMVET),
        ("Acc.", "Rel."),
    ),
)


@dataclass(frozen=True)
class BannerColumn:
    """A column of one model's table: task and metric, and each row's score with its draws."""

    column: Column
    task: str
    metric: str
    scores: list[float | None]
    draws: list[Draws]


def banners(table: Table) -> list[Grid]:
    """The grids of a table, one per model and convention; none for a model without a finished row with scores."""
    found = []
    for model in table.models:
        rows = [row for row in table.rows if row.spec.model == model and row.status == "done" and row.cells]
        if rows:
            found += [banner(table, rows, convention) for convention in CONVENTIONS]
    return found


def banner(table: Table, rows: list[Row], convention: Convention) -> Grid:
    """One model's table in one convention."""
    shown = columns(table, rows, convention)
    base = next((number for number, row in enumerate(rows) if not row.drops), None)
    averages = dict(zip(convention.averages, averaged(convention, shown, base, len(rows))))
    title = f"{rows[0].spec.model}, {convention.name} convention"
    grid = Grid(title, ["method", *(one.column.header for one in shown), *averages], left=1)
    names = dict(zip(map(id, table.rows), labels(table)))
    for words, numbers in groups(rows):
        grid.rows.append([Text(words, "banner"), *[Text("")] * (len(grid.head) - 1)])
        best = [told(one.draws, one.scores, numbers) for one in shown]
        best += [told(draws, [e.value if e else None for e in held], numbers) for held, draws in averages.values()]
        for number in numbers:
            cells = [estimate(one.scores[number], one.draws[number]) for one in shown]
            scales = [1.0 if one.column.points else 100.0 for one in shown] + [100.0] * len(averages)
            cells += [held[number] for held, _ in averages.values()]
            digits = [0 if "total" in one.metric or "+" in one.metric else 1 for one in shown] + [1] * len(averages)
            values = [
                Text(DASH if cell is None else f"{scale * cell.value:.{n}f}", "best" if number in leading else "")
                for cell, scale, n, leading in zip(cells, scales, digits, best)
            ]
            grid.rows.append([Text(names[id(rows[number])]), *values])
            grid.rows.append([Text("", "small"), *(between(c, s, n) for c, s, n in zip(cells, scales, digits))])
    return grid


def columns(table: Table, rows: Sequence[Row], convention: Convention) -> list[BannerColumn]:
    """The convention's columns that were run, then the tasks of neither family that enter averages."""
    known = {task for one in CONVENTIONS for column in one.columns for task in column.tasks}
    others = [name for name in table.averaged if name not in known]
    headers = task_names(others)
    wanted = [*convention.columns, *(Column(headers[name], (name,)) for name in others)]
    found = []
    for column in wanted:
        for task in [name for name in column.tasks if name in table.tasks][:1]:
            metrics = column.metrics if column.points else (*column.metrics, table.tasks[task].metric)
            metric = next((m for m in metrics if any(having(row, task, m) for row in rows)), None)
            if metric is not None:
                found.append(shown_of(column, task, metric, rows))
    return found


def shown_of(column: Column, task: str, metric: str, rows: Sequence[Row]) -> BannerColumn:
    scores: list[float | None] = []
    draws: list[Draws] = []
    for row in rows:
        if not having(row, task, metric):
            scores.append(None)
            draws.append(None)
            continue
        parts = metric.split("+")
        scores.append(fmean(sum(run.score(task, part) for part in parts) for run in row.runs))
        draws.append(mean_draws(run_draws(row.runs, task, metric)) if len(parts) == 1 else None)
    return BannerColumn(column, task, metric, scores, draws)


def having(row: Row, task: str, metric: str) -> bool:
    """Whether each pooled run has the metric."""
    results = [run.record.results.get(task) for run in row.runs]
    return all(result is not None and all(part in result.scores for part in metric.split("+")) for result in results)


def averaged(
    convention: Convention, shown: Sequence[BannerColumn], base: int | None, rows: int
) -> list[tuple[list[Estimate | None], list[Draws]]]:
    """The convention's averages of each row: of relative scores, or of scores and their ratio to the base."""
    if len(convention.averages) == 1:
        relative = [share(one, base, rows) for one in shown]
        return [mean_of([held for held, _ in relative], [draws for _, draws in relative], rows)]
    scales = [1 / TWENTIETH if one.column.points else 1.0 for one in shown]
    values = [[None if v is None else s * v for v in one.scores] for one, s in zip(shown, scales)]
    draws = [[None if d is None else s * d for d in one.draws] for one, s in zip(shown, scales)]
    plain = mean_of(values, draws, rows)
    accuracy = BannerColumn(Column("", ()), "", "", [one.value if one else None for one in plain[0]], plain[1])
    held, drawn = share(accuracy, base, rows)
    return [plain, ([estimate(v, d) for v, d in zip(held, drawn)], drawn)]


def share(one: BannerColumn, base: int | None, rows: int) -> tuple[list[float | None], list[Draws]]:
    """Scores over that of the row that drops nothing, draw by draw."""
    full, full_draws = (None, None) if base is None else (one.scores[base], one.draws[base])
    values = [v / full if v is not None and full else None for v in one.scores]
    if full_draws is None or not (full_draws > 0).all():
        return values, [None] * rows
    return values, [None if d is None else d / full_draws for d in one.draws]


def mean_of(
    values: Sequence[Sequence[float | None]], draws: Sequence[Sequence[Draws]], rows: int
) -> tuple[list[Estimate | None], list[Draws]]:
    """Each row's mean over the columns; None if a column is missing: a mean over fewer is another quantity."""
    held: list[Estimate | None] = []
    drawn: list[Draws] = []
    for number in range(rows):
        column = [one[number] for one in values]
        there = [value for value in column if value is not None]
        drawn.append(mean_draws([one[number] for one in draws]))
        whole = there and len(there) == len(column)
        held.append(estimate(fmean(there), drawn[-1]) if whole else None)
    return held, drawn


def estimate(value: float | None, draws: Draws) -> Estimate | None:
    """A value with the interval of its draws."""
    if value is None:
        return None
    return Estimate(value) if draws is None else Estimate(value, *interval(draws))


def between(cell: Estimate | None, scale: float, digits: int) -> Text:
    """The interval below a score."""
    if cell is None or cell.low is None or cell.high is None:
        return Text("", "small")
    return Text(minus(f"[{scale * cell.low:.{digits}f}, {scale * cell.high:.{digits}f}]"), "small")


def told(draws: Sequence[Draws], scores: Sequence[float | None], numbers: Sequence[int]) -> set[int]:
    """The rows of a banner in bold: the best and those not distinguishable from it; none if no two differ."""
    held = [(n, score) for n in numbers if (score := scores[n]) is not None]
    if len(held) < 2 or any(draws[n] is None for n, _ in held):
        return set()
    top = max(held, key=lambda one: one[1])[0]
    behind = {n for n, _ in held if n != top and interval(np.asarray(draws[top]) - np.asarray(draws[n]))[0] > 0}
    return {n for n, _ in held} - behind if behind else set()


def groups(rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
    """The banners' texts with the numbers of their rows: nothing dropped, then from the mildest to the hardest."""
    found: dict[tuple[float, str], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(place(row), []).append(number)
    return [(words, numbers) for (_, words), numbers in sorted(found.items(), key=lambda one: (-one[0][0], one[0][1]))]


def place(row: Row) -> tuple[float, str]:
    """The share of tokens of a row's banner, and the banner's text."""
    whole, entering = row.cost("visual_tokens"), row.visual_tokens
    if not row.drops:
        number = "" if whole is None else f", {whole:.0f} tokens" if whole == round(whole) else ", all tokens"
        return 2.0, f"Upper bound{number} (100 %)"
    if whole is None or entering is None or not whole:
        return -1.0, "Retain: not known"
    kind, _, amount = row.budget.partition(":")
    if kind in ("flops", "kv", "prefill_ms"):
        names = {"flops": "prefill FLOPs", "kv": "KV bytes", "prefill_ms": "ms per prefill"}
        said = f"{amount} ms" if kind == "prefill_ms" else f"{100 * float(amount):.1f} %"
        return float(amount) if kind != "prefill_ms" else 0.0, f"{names[kind]}: {said}"
    if whole == round(whole):
        near = [n for n in named(whole, amount if kind == "avg_tokens" else "") if abs(entering / n - 1) <= SAME]
        tokens = near[0] if near else float(f"{entering:.3g}")
        return tokens / whole, minus(f"Retain {tokens:g} tokens (-{100 * (1 - tokens / whole):.1f} %)")
    kept = near_share(entering / whole)
    return kept, minus(f"Retain {100 * kept:.1f} % (-{100 * (1 - kept):.1f} %)")


def named(whole: float, asked: str) -> list[float]:
    """The numbers that may name a budget: what was asked for, and the papers' for this many tokens."""
    return [*([float(asked)] if asked else []), *NAMED.get(round(whole), ())]


def near_share(share: float) -> float:
    """Up to three ninths (the papers' 11.1, 22.2, 33.3 %) or a multiple of a twentieth if near; otherwise itself."""
    for known in (1 / 3, 2 / 9, 1 / 9, 1 / 18, *(n / 20 for n in range(1, 20))):
        if abs(share / known - 1) <= SAME:
            return known
    return share


def markdown(tables: Sequence[Table]) -> str:
    """The page in Markdown: each grid, and what its columns are."""
    parts = []
    for table in tables:
        parts += [f"# {table.title}\n", *(f"Asked with: {how}.\n" for how in asked(table))]
        for grid in banners(table):
            parts += [f"## {grid.title}\n", grid.markdown()]
        parts.append(meaning(table))
    return in_page("\n".join(parts))


def meaning(table: Table) -> str:
    """How the columns were scored, how many samples, and what the averages are."""
    counted = ", ".join(
        f"{name} ({task.n} of {task.n_total})" if task.n < task.n_total else f"{name} ({task.n})"
        for name, task in table.tasks.items()
    )
    said = (
        "Below each score its 95 % interval (bootstrap over images; averages paired with the row that drops nothing).",
        "Bold: the best of its banner and what cannot be told from it; none where all are alike.",
        "Avg: mean over the columns of the score, relative to dropping nothing.",
        "Acc.: mean of the scores, of MME-P a twentieth; Rel.: Acc. relative to dropping nothing.",
        "Banners say what enters a layer on average, to 3 %.",
        "Papers score VQAv2 and VizWiz on servers, and their TextVQA has reference OCR tokens in the prompt: see",
        f"`{typed('analysis')} repro`. Samples: {counted}.",
    )
    return " ".join(said) + "\n"


def latex(tables: Sequence[Table]) -> str:
    r"""The grids as floats; \usepackage{booktabs,graphicx}."""
    head = f"% made by {typed('analysis')} banner; needs booktabs and graphicx\n"
    caption = (
        "Below each score its 95\\,\\% interval; bold: the best of its banner and what cannot be told from it (none "
        "where all are alike). Banners say what enters a layer on average."
    )
    floats = [
        grid.latex(f"{table.name}-banner-{number}", caption + by_protocol(table))
        for table in tables
        for number, grid in enumerate(banners(table), start=1)
    ]
    return head + "\n".join(floats)
