"""The figure of many methods: scores beside chance at equal budgets, and who is on the Pareto front.

python -m pytest tests/analysis/test_front.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from analysis.__main__ import main
from analysis.comparison.against_random import twin_of
from analysis.comparison.table_model import Table
from analysis.report import equal_budgets
from analysis.statistics import Estimate
from analysis.studies import front_figure, task_grid_figure, tradeoff_figure
from analysis.style import method_name
from pdrop.record import RunRecord
from tests.support.records import make_record, put, table_of

METHODS = ("pyramiddrop", "fastv", "sparsevlm", "dart", "v2drop", "feather", "divprune", "visionzip", "scope", "holov",
           "vispruner", "cdpruner")  # fmt: skip
FRONT = METHODS[6:]


def store(results: Path) -> Path:
    """Twelve methods at two budgets with costs of their own, and the twin of the first before the decoder."""
    put(results, make_record("none", 1.0, latency="off"))
    for number, method in enumerate([*METHODS, "random_divprune"]):
        for keep, budget in ((0.5, "keep:0.5"), (0.3, "keep:0.3")):
            like = "random" if method.startswith("random") else ("pyramiddrop", "fastv")[number % 2]
            record = make_record(like, keep, latency="off")
            assert record.cost
            before = method in FRONT or method.startswith("random")
            tokens = [64.0] * (0 if before else 2) + [64 * keep + (method == "scope")] * 12
            cost = replace(
                record.cost, visual_tokens_per_layer=tokens[:12], prefill_flops_ratio=keep + 0.01 * (number % 5)
            )
            folder = put(results, replace(record, cost=cost), budget=budget)
            marker = results / "experiments" / "demo" / folder.name
            written = RunRecord.read(folder)
            share = keep + 0.001 * number
            spec = replace(written.spec, method=method, schedule=f"{0 if before else 2}:{share:g}", positions="compact")
            for path in (folder, marker):
                path.rename(path.with_name(spec.folder))
            RunRecord.write(replace(written, spec=spec), folder.with_name(spec.folder))
    return results


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A table that tests only read."""
    return table_of(store(tmp_path_factory.mktemp("front")))


def test_many_methods_are_drawn_as_a_front_and_few_as_curves(table: Table) -> None:
    assert not list(tradeoff_figure.files(table))
    ((stem, figure),) = front_figure.files(table)
    assert stem == "demo-front"
    left, right, cost = figure.axes
    assert len(left.get_yticklabels()) == len(METHODS) and not any(t.get_text() for t in right.get_yticklabels())
    ends = [x for axes in (left, right) for bar in axes.containers for x in bar.lines[2][0].get_segments()[0][:, 0]]
    assert left.get_xlim() == right.get_xlim()
    assert left.get_xlim()[0] <= min(ends) < max(ends) <= left.get_xlim()[1], "no bar is cut off"
    assert {left.get_title(), right.get_title()} == {"50 % kept on average", "30 % kept on average"}
    assert "Pareto front" in cost.get_title()
    assert cost.get_ylabel() == "average score (%)" and cost.yaxis.get_label_position() == "right"
    rows = {row.spec.method for row in front_figure.drawable(table, "toy")}
    assert cost.texts and len(cost.texts) < 2 * len(METHODS) and "divprune" in rows
    points = [line for line in cost.lines if line.get_marker() in ("o", "s")]
    assert max(name.get_zorder() for name in cost.texts) < min(point.get_zorder() for point in points), "none is hidden"
    plt.close(figure)


def test_the_front_is_what_nothing_beats(table: Table) -> None:
    rows = [row for row in table.rows if row.drops and row.average and not row.spec.method.startswith("random")]
    points = [(row.cost("prefill_flops_ratio") or 0.0, row.average.score.value, row) for row in rows if row.average]
    best = front_figure.front(points)
    for cost, score, row in points:
        beaten = any(c <= cost + 1e-9 and s >= score and (c < cost - 1e-9 or s > score) for c, s, _ in points)
        on_front = any(one is row for _, _, one in best)
        tied = any(abs(c - cost) < 1e-9 and s == score for c, s, _ in best)
        assert on_front != beaten or tied, row.spec.method
    assert [cost for cost, _, _ in best] == sorted(cost for cost, _, _ in best)


def test_one_twin_stands_for_all_that_let_as_many_tokens_in(table: Table) -> None:
    """Schedules of one budget differ in their last digits; a token more or less is no other control, two are."""
    for row in table.rows:
        if not row.drops or row.spec.method.startswith("random"):
            continue
        twin = twin_of(row, table.rows)
        assert (twin is not None) == (row.spec.method in FRONT), row.spec.method
        if twin is not None:
            assert abs((twin.visual_tokens or 0) - (row.visual_tokens or 0)) <= 1


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figures", "demo", "--results", str(store(tmp_path))]) == 0
    assert (tmp_path / "figures" / "demo-front.png").is_file() and "demo-front.png" in capsys.readouterr().out


def test_every_task_has_its_cell(table: Table) -> None:
    """The score as a number, shaded; framed or underlined by the twin's seeds; none above, chance and guess below."""
    ((stem, figure),) = task_grid_figure.files(table)
    assert stem == "demo-by-task" and len(figure.axes) == 2, "a grid for each budget"
    rows = [row for row in table.rows if row.drops and row.budget == "keep:0.5"]
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "50 % kept on average")
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named[0] == "none" and named[-1] in ("at random", "blind guess") and len(named) > len(METHODS)
    tasks = [label.get_text() for label in axes.get_xticklabels()]
    assert len(axes.texts) >= len(tasks) * (len(METHODS) + 1)
    held = {row.spec.method: row for row in rows}
    told = {"above": 0, "below": 0}
    for method in METHODS:
        twin = twin_of(held[method], rows)
        for task, cell in held[method].cells.items():
            verdict = task_grid_figure.against(twin, task, cell.score.value)
            assert verdict == "" or twin is not None
            told |= {verdict: told[verdict] + 1} if verdict else {}
    framed = [patch for patch in axes.patches if not patch.get_fill()]
    assert (len(framed), len(axes.lines)) == (told["above"], told["below"])
    plt.close(figure)


def test_what_is_said_of_equal_budgets_follows_the_rows(table: Table) -> None:
    said = equal_budgets.rivals(table, "store")
    rows = [row for row in table.rows if row.spec.method in METHODS and row.average]
    for budget in ("keep:0.5", "keep:0.3"):
        part = said.split(f"at {budget} ")[1].split("; at ")[0].split(". ")[0]
        scores = [float(entry.rsplit(" ", 1)[1].rstrip(".")) for entry in part.split(", ")]
        assert scores == sorted(scores, reverse=True) and len(scores) == len(METHODS)
        own = [row for row in rows if row.budget == budget and row.spec.method == "divprune"]
        assert f"DivPrune {100 * own[0].average.score.value:.1f}" in part  # type: ignore[union-attr]
    assert (
        "On the Pareto front, by the scores alone" in said
        and "a random twin with a single seed" in said
        and "(store/tables/demo.md)" in said
    )
    assert equal_budgets.rivals(None, "store") == equal_budgets.matched(None, "store") == ""


def test_verdicts_against_chance_are_told_with_holm_s_correction(table: Table) -> None:
    """Two of three are distinguishable each by itself, one of them after three comparisons."""
    rows = [replace(row, random_seeds=2) for row in equal_budgets.ranked(table)[:3]]
    for row, p in zip(rows, (0.001, 0.04, 0.6)):
        row.against_random = Estimate(0.1, 0.02 if p < 0.05 else -0.1, 0.2, p)
    said = equal_budgets.chance(replace(table, rows=rows))
    assert "3 comparisons, each by itself" in said and said.count("above chance: ") == 1
    first, second, _ = (f"{method_name(row.spec.method)} ({row.budget})" for row in rows)
    assert f"above chance: {first}, {second};" in said
    assert said.endswith(f"With Holm's correction for their number there remain above: {first}.")
    rows[0].against_random = Estimate(0.1, 0.02, 0.2, 0.03)
    assert equal_budgets.chance(replace(table, rows=rows)).endswith("there remain none.")
    rows[0].against_random = Estimate(0.1, 0.02, 0.2)
    assert "Holm" not in equal_budgets.chance(replace(table, rows=rows)), "without p there is nothing to correct"
