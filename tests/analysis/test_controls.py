"""Methods against their controls: flips by image, the random band, the hard subset.

pytest tests/analysis/test_controls.py
"""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.comparison.table_model import Row
from analysis.report.readme import twins
from analysis.statistics import Estimate, Flips, flips, holm, mcnemar, sign_flips, twice_the_median
from analysis.store.load import load_runs
from analysis.tables.table import score_text, verdict
from analysis.tables.text import probability, signed
from pdrop.record import RunRecord
from pdrop.samples import read_samples, write_samples
from tests.support.records import STRENGTH, TASKS, make_record, put, table_of


def test_sign_flips_of_single_samples_are_mcnemar() -> None:
    for lost, gained in ((0, 0), (1, 0), (3, 9), (12, 12), (0, 20)):
        assert sign_flips([-1] * lost + [1] * gained) == pytest.approx(mcnemar(lost, gained), abs=1e-12)


def test_sign_flips_against_all_signs() -> None:
    nets = [3, -1, 2, 1, -4, 2]
    totals = [sum(s * abs(n) for s, n in zip(signs, nets)) for signs in itertools.product((-1, 1), repeat=len(nets))]
    want = np.mean([abs(total) >= abs(sum(nets)) for total in totals])
    assert sign_flips(nets) == pytest.approx(want)


def test_flips_of_one_image_are_one_piece_of_evidence() -> None:
    before, after = np.ones(8), np.zeros(8)
    alone, together = flips(before, after), flips(before, after, ["a"] * 4 + ["b"] * 4)
    assert alone is not None and together is not None
    assert alone.p == pytest.approx(2 / 2**8) and together.p == pytest.approx(0.5)
    both = together + Flips(0, 4, {"b": 4})
    assert both.net == {"a": -4, "b": 0} and both.p == pytest.approx(1.0)
    assert twice_the_median([0.2]) == 0.2 and twice_the_median([0.01, 0.02, 0.9]) == 0.04


def test_holm_counts_the_comparisons() -> None:
    """By hand: 4 x .01, 3 x .02, 2 x .025, 1 x .04, none smaller than one before it."""
    assert holm([0.02, 0.01, 0.04, 0.025]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == [] and holm([0.3]) == [0.3] and holm([0.6, 0.7]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    false = sum(min(holm(rng.uniform(size=20).tolist())) < 0.05 for _ in range(2000)) / 2000
    assert 0.035 < false < 0.065, "twenty tests without any effect give a false finding as rarely as one test"


def store(folder: Path, seeds: int) -> Path:
    """Nothing dropped, PyramidDrop, and its twin with so many seeds."""
    put(folder, make_record("none", 1.0))
    put(folder, make_record("pyramiddrop", 0.5))
    for seed in range(seeds):
        put(folder, make_record("random", 0.5, seed=seed))
    return folder


def test_the_random_band(tmp_path: Path) -> None:
    few, many = (table_of(store(tmp_path / str(n), n)) for n in (1, 5))
    row_few, row = (next(r for r in t.rows if r.spec.method == "pyramiddrop") for t in (few, many))
    assert (row_few.random_seeds, row.random_seeds) == (1, 5)
    twin = next(r for r in many.rows if r.spec.method == "random")
    assert row.random_band is not None and twin.average is not None and row.average is not None
    assert row.random_band[0] < twin.average.score.value < row.random_band[1]
    assert row.against_random is not None and row.against_random.low is not None
    assert row.against_random.value == pytest.approx(row.average.score.value - twin.average.score.value)
    want = {1: "above", -1: "below", 0: "not distinguishable"}[row.against_random.sign]
    assert row.told_from_random == want and row.against_random.p is not None and 0 <= row.against_random.p <= 1
    assert twin.told_from_random == ""


def test_a_method_as_good_as_random_is_not_distinguishable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRENGTH, "pyramiddrop", STRENGTH["random"])
    row = next(r for r in table_of(store(tmp_path, 5)).rows if r.spec.method == "pyramiddrop")
    assert row.told_from_random == "not distinguishable"
    assert row.against_random is not None and row.against_random.p is not None and row.against_random.p > 0.05


@pytest.mark.parametrize(
    ("found", "sign"),
    [
        (Estimate(0.02, 0.001, 0.04), 1),
        (Estimate(-0.02, -0.04, -0.001, 0.049), -1),
        (Estimate(0.02, 0.001, 0.04, 0.051), 0),
        (Estimate(0.02, -0.001, 0.04, 0.01), 0),
        (Estimate(0.02, 0.001, 0.04, 0.001, anecdote=True), 0),
        (Estimate(0.02, p=0.001), 0),
    ],
)
def test_a_verdict_needs_its_interval_and_its_p(found: Estimate, sign: int) -> None:
    assert found.sign == sign and found.clear == bool(sign)


def losing(folder: Path, wrong: tuple[int, ...]) -> tuple[Row, Row]:
    """Nothing dropped, all 60 questions right, and FastV with some wrong; questions 2 n and 2 n + 1 share an image."""
    for method, ratio in (("none", 1.0), ("fastv", 0.5)):
        path = put(folder, make_record(method, ratio, tasks=("toy_ocr",)))
        samples, record = read_samples(path, "toy_ocr"), RunRecord.read(path)
        for sample in samples:
            sample["scores"]["acc"] = float(method == "none" or sample["doc_id"] not in wrong)
        write_samples(path, {"toy_ocr": samples})
        record.results["toy_ocr"].scores["acc"].value = fmean(sample["scores"]["acc"] for sample in samples)
        record.write(path)
    none, fast = table_of(folder).rows
    return none, fast


def test_few_flips_are_no_verdict_whatever_the_interval_says(tmp_path: Path) -> None:
    _, row = losing(tmp_path, (3, 5, 7, 9))
    cell = row.cells["toy_ocr"]
    assert cell.delta is not None and cell.delta.high is not None and cell.delta.high < 0, "four lost, none gained"
    assert cell.flips is not None and cell.flips.p == cell.delta.p == pytest.approx(0.125)
    assert not cell.delta.clear and score_text(cell, True).text == "93.3", "no arrow"


def test_no_verdict_anywhere_contradicts_its_p_or_rests_on_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRENGTH, "pyramiddrop", 0.05)  # far better than random
    few, many = (table_of(store(tmp_path / str(n), n)) for n in (1, 5))
    row_few, row = (next(r for r in t.rows if r.spec.method == "pyramiddrop") for t in (few, many))
    assert row.told_from_random == "above" and "above (5 seeds" in verdict(row)
    assert row_few.against_random is not None and row_few.against_random.low is not None
    assert row_few.against_random.low > 0 and not row_few.against_random.clear
    assert row_few.told_from_random == "no verdict" and verdict(row_few).startswith("no verdict (1 seed, p ")
    assert "1 beats it and 0 lose to it." in twins(many)
    assert "none is judged: all have a single random seed, which settles nothing" in twins(few)
    for table in (few, many):
        for shown in table.rows:
            cells = [*shown.cells.values(), *([shown.average] if shown.average else [])]
            for change in [shown.against_random, *(cell.delta for cell in cells)]:
                assert change is None or change.p is None or not change.clear or change.p < 0.05


def test_diff_and_tables_have_one_mcnemar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none, row = losing(tmp_path, (2, 3, 4, 5, 7))
    cell = row.cells["toy_ocr"]
    assert cell.flips is not None and cell.delta is not None
    assert cell.flips.p == pytest.approx(0.25), "questions about one image change together: three coins, not five"
    assert row.average is not None and row.average.flips is not None
    assert row.average.flips.p == cell.flips.p, "the average's test knows the images, too"
    ids = [one.runs[0].record.run_id for one in (none, row)]
    assert main(["diff", *ids, "--results", str(tmp_path)]) == 0
    assert f"{signed(cell.delta)}; 5 lost, 0 gained, McNemar p 0.25\n" in capsys.readouterr().out
    assert probability(mcnemar(5, 0)) == "0.062"


def test_hard_subset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path, 2)
    assert main(["hard", "demo", "--results", str(tmp_path), "--control", "random"]) == 0
    page = capsys.readouterr().out
    runs = {run.record.spec.method: run for run in reversed(load_runs(tmp_path)) if run.record.spec.seed == 0}
    hard = easy = right = 0
    for task in TASKS:
        full, cheap, ours = (runs[m].samples(task).values for m in ("none", "random", "pyramiddrop"))
        assert full is not None and cheap is not None and ours is not None
        hard += int(((full == 1) & (cheap == 0)).sum())
        easy += int(((full == 1) & (cheap == 1)).sum())
        right += int(((full == 1) & (cheap == 0) & (ours == 1)).sum())
    assert f"A: {hard} of" in page and f"B: {easy} that" in page
    row = next(line for line in page.splitlines() if "PyramidDrop" in line)
    assert f" {100 * right / hard:.1f} [" in row
    none = next(line for line in page.splitlines() if "| none" in line)
    assert none.count("100.0 [100.0, 100.0]") == 2
    assert (tmp_path / "tables" / "demo-hard.csv").read_text().count("\n") == 4
    assert main(["hard", "demo", "--results", str(tmp_path), "--control", "pool"]) == 1
    assert "method=pool" in capsys.readouterr().err
