"""Banner tables: both families' columns and averages from one store, budgets as banners, intervals below scores.

python -m pytest tests/analysis/test_banner.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from analysis.__main__ import main
from analysis.grid import Grid
from analysis.tables.banner import banners
from pdrop.record import RunRecord, Score
from tests.support.records import make_record, put, table_of

TASKS = ("gqa", "mme", "pope")
TOTALS = {"none": (1500.0, 360.0), "fastv": (1400.0, 300.0), "pyramiddrop": (1450.0, 340.0)}


def store(results: Path, tokens: Sequence[float] = (192.0, 128.0), whole: float = 576.0, **marker: str) -> Path:
    """none, and FastV and PyramidDrop at some numbers of tokens, on three benchmarks."""
    for method, kept in [("none", whole), *((name, n) for name in ("fastv", "pyramiddrop") for n in tokens)]:
        record = make_record(method, round(kept / whole, 4), TASKS, model="llava_1_5_7b", latency="off")
        assert record.cost
        record.cost.visual_tokens, record.cost.visual_tokens_per_layer = whole, [kept] * 12
        record.cost.mean_keep = kept / whole
        folder = put(results, record, **marker)
        mme = record.results["mme"]
        perception, cognition = TOTALS[method]
        mme.scores |= {"mme_perception_score": Score(perception, 60), "mme_cognition_score": Score(cognition, 60)}
        mme.main_metric = "mme_perception_score"
        record.write(folder)
    return results


def made(results: Path) -> list[Grid]:
    return banners(table_of(results))


def cells(grid: Grid) -> dict[tuple[str, str], dict[str, str]]:
    """(banner, method) -> header -> text; (banner, method + " below") -> the line of intervals."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    banner = name = ""
    for row in grid.rows:
        if row[0].mark == "banner":
            banner = row[0].text
        else:
            name = row[0].text or f"{name} below"
            found[banner, name] = dict(zip(grid.head, (cell.text for cell in row)))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that tests only read."""
    return store(tmp_path_factory.mktemp("banner"))


def test_banners_are_the_papers(results: Path) -> None:
    for grid in made(results):
        words = [row[0].text for row in grid.rows if row[0].mark == "banner"]
        assert words == [
            "Upper bound, 576 tokens (100 %)", "Retain 192 tokens (−66.7 %)", "Retain 128 tokens (−77.8 %)"
        ]  # fmt: skip


def test_each_family_has_its_columns_and_averages(results: Path) -> None:
    sparse, cdpruner = made(results)
    assert sparse.head == ["method", "GQA", "MME", "POPE", "Avg"]
    assert cdpruner.head == ["method", "GQA", "POPE", "MME-P", "Acc.", "Rel."]
    table = table_of(results)
    scores = {row.spec.method: row for row in table.rows if row.budget in ("", "0.3333")}
    banner = "Retain 192 tokens (−66.7 %)"
    for name, label in (("fastv", "FastV"), ("pyramiddrop", "PyramidDrop")):
        gqa, pope = (scores[name].runs[0].score(task) for task in ("gqa", "pope"))
        full = [scores["none"].runs[0].score(task) for task in ("gqa", "pope")]
        total, perception = sum(TOTALS[name]), TOTALS[name][0]
        relative = fmean([gqa / full[0], total / sum(TOTALS["none"]), pope / full[1]])
        line = cells(sparse)[banner, label]
        assert line == {
            "method": label, "GQA": f"{100 * gqa:.1f}", "MME": f"{total:.0f}", "POPE": f"{100 * pope:.1f}",
            "Avg": f"{100 * relative:.1f}",
        }  # fmt: skip
        accuracy = fmean([gqa, pope, perception / 2000])
        whole = fmean([*full, TOTALS["none"][0] / 2000])
        line = cells(cdpruner)[banner, label]
        assert (line["MME-P"], line["Acc."]) == (f"{perception:.1f}", f"{100 * accuracy:.1f}")
        assert line["Rel."] == f"{100 * accuracy / whole:.1f}"
    assert cells(sparse)["Upper bound, 576 tokens (100 %)", "none"]["Avg"] == "100.0"


def test_intervals_stand_below_where_they_are_known(results: Path) -> None:
    for grid in made(results):
        for (banner, name), line in cells(grid).items():
            if not name.endswith("below"):
                below = cells(grid)[banner, f"{name} below"]
                low, high = map(float, re.fullmatch(r"\[([\d.]+), ([\d.]+)\]", below["GQA"]).groups())  # type: ignore[union-attr]
                assert low <= float(line["GQA"]) <= high
                assert below[grid.head[-1]] == "", "MME's parts are not known here, so no average has an interval"


def test_averages_of_known_parts_have_paired_intervals(tmp_path: Path) -> None:
    for method in ("none", "fastv", "pyramiddrop"):
        record = make_record(method, 1.0 if method == "none" else 0.3, ("toy_exist", "toy_count"), latency="off")
        put(tmp_path, record)
    for grid in made(tmp_path):
        lines = cells(grid)
        full = lines["Upper bound, 64 tokens (100 %)", "none below"]
        assert full[grid.head[-1]] == "[100.0, 100.0]", "relative to itself, draw by draw"
        assert all(line[grid.head[-1]].startswith("[") for (_, name), line in lines.items() if name.endswith("below"))
        assert grid.head[1:3] == ["exist", "count"]


@pytest.mark.parametrize(
    ("whole", "tokens", "words"),
    [
        (2880.0, (640.0, 160.0), ["Retain 640 tokens (−77.8 %)", "Retain 160 tokens (−94.4 %)"]),
        (2928.0, (645.0, 320.0), ["Retain 640 tokens (−78.1 %)", "Retain 320 tokens (−89.1 %)"]),
        (576.0, (191.4, 219.8), ["Retain 220 tokens (−61.8 %)", "Retain 192 tokens (−66.7 %)"]),
        (1203.5, (401.0, 134.0), ["Retain 33.3 % (−66.7 %)", "Retain 11.1 % (−88.9 %)"]),
    ],
)
def test_budgets_of_other_pictures(tmp_path: Path, whole: float, tokens: Sequence[float], words: list[str]) -> None:
    grid = made(store(tmp_path, tokens, whole))[0]
    assert [row[0].text for row in grid.rows if row[0].mark == "banner"][1:] == words


def test_budgets_of_flops_are_said(tmp_path: Path) -> None:
    grid = made(store(tmp_path, (190.0,), budget="flops:0.45"))[0]
    assert [row[0].text for row in grid.rows if row[0].mark == "banner"][1:] == ["prefill FLOPs: 45.0 %"]


def test_the_command_writes_both_forms(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = store(tmp_path)
    assert main(["banner", "demo", "--results", str(copy)]) == 0
    said = capsys.readouterr().out
    page, tex = ((copy / "tables" / f"demo-banner.{suffix}").read_text() for suffix in ("md", "tex"))
    assert said.startswith(page.split("\n")[0]) and "***Retain 192 tokens (−66.7 %)***" in page
    assert tex.count(r"\multicolumn{5}{c}{\textit{Retain 192 tokens ($-$66.7 \%)}} \\") == 1
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}}") == 2
    body = [line for line in tex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") for line in body} == {4, 5} and r"{\scriptsize [" in tex
    assert main(["banner", "demo", "--results", str(copy)]) == 0
    assert "unchanged" in capsys.readouterr().out


def test_older_records_without_cost_have_a_banner_of_their_own(tmp_path: Path) -> None:
    copy = store(tmp_path, (192.0,))
    folder = next(path for path in (copy / "runs").iterdir() if "fastv" in path.name)
    record = RunRecord.read(folder)
    RunRecord.write(replace(record, cost=None), folder)
    assert ("Retain: not known", "FastV") in cells(made(copy)[0])
