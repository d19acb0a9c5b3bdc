"""The statistics against closed forms, known values and simulated truth.

python -m pytest tests/analysis/test_statistics.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from analysis.statistics import counts, flips, interval, mcnemar, replicates
from analysis.store.load import load_runs
from tests.support.records import TASKS, run_of, standard, table_of


def test_bootstrap_matches_the_closed_form_for_a_mean() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, (400, 1))
    low, high = interval(replicates("t", values)[:, 0])
    half = 1.96 * values.std(ddof=0) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_bootstrap_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        right = rng.random((120, 1)) < [[0.8, 0.7]]
        draws = replicates(f"trial {trial}", right.astype(float), draws=400)
        low, high = interval(draws[:, 1] - draws[:, 0])
        covered += low <= -0.1 <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_bootstrap_pairs_runs_and_draws_images_whole() -> None:
    values = np.random.default_rng(3).random((200, 1))
    paired = replicates("t", np.hstack([values, values - 0.25]))
    assert interval(paired[:, 1] - paired[:, 0]) == (-0.25, -0.25)  # a shift of every sample is certain
    doubled = np.repeat(values, 2, axis=0)
    alone, whole = (
        np.subtract(*interval(replicates("t", doubled, groups)[:, 0]))
        for groups in (None, [f"image {i // 2}" for i in range(400)])
    )
    assert whole / alone == pytest.approx(math.sqrt(2), rel=0.06)  # twice the questions, no more images


def trial(rng: np.random.Generator, correlation: float, name: str) -> list[tuple[np.ndarray, list[str]]]:
    """Ten tasks of 100 questions about some of 120 images: right or wrong, and the image, of each question.

    Whether an answer is right depends by `correlation` on the image, whichever task asks; half are right on average.
    """
    ease, found = rng.standard_normal(120), []
    for _ in range(10):
        asked = rng.choice(120, 100, replace=False)
        latent = math.sqrt(correlation) * ease[asked] + math.sqrt(1 - correlation) * rng.standard_normal(100)
        found.append(((latent > 0).astype(float)[:, None], [f"{name} {image}" for image in asked]))
    return found


@pytest.mark.product(1)
@pytest.mark.parametrize(("correlation", "trials"), [(0.4, 100), (0.2, 200), (0.0, 200)])
def test_the_average_of_tasks_that_share_images_is_covered(correlation: float, trials: int) -> None:
    rng = np.random.default_rng([5, int(10 * correlation)])
    covered = {"together": 0, "apart": 0}
    for number in range(trials):
        tasks = trial(rng, correlation, str(number))
        for way in covered if correlation else ["together"]:
            draws = [
                replicates("t", right, [f"{task} {i}" for i in images] if way == "apart" else images, draws=300)
                for task, (right, images) in enumerate(tasks)
            ]
            low, high = interval(np.mean(draws, axis=0)[:, 0])
            covered[way] += low <= 0.5 <= high
    assert 0.9 <= covered["together"] / trials <= 0.985
    assert not correlation or covered["apart"] / trials < 0.87, "too sure: this simulation can tell"


def test_an_image_has_one_count_a_draw_and_no_draw_is_empty() -> None:
    first, second = (replicates(name, np.array([[1.0], [0.0]]), ["one", "two"]) for name in ("t", "other"))
    assert (first == second).all(), "the image decides, not the task"
    drawn = np.stack([counts(label) for label in range(200)])
    assert drawn.mean() == pytest.approx(1, abs=0.005) and drawn.var() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(drawn)[np.triu_indices(200, 1)]).max() < 0.08
    assert replicates("t", np.array([[0.25]])).tolist() == [[0.25]] * len(drawn[0]), "also where a draw takes none"


def test_bootstrap_of_a_run_does_not_depend_on_the_others() -> None:
    values = np.random.default_rng(4).random((50, 3))
    assert np.allclose(replicates("t", values)[:, :2], replicates("t", values[:, :2]), atol=1e-12)
    assert not np.allclose(replicates("t", values), replicates("other", values))


@pytest.mark.parametrize("values", [np.empty((0, 2)), np.array([[1.0], [math.nan]])])
def test_bootstrap_refuses_missing_values(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="t: "):
        replicates("t", values)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (0, 5, 0.0625), (10, 2, 158 / 4096), (2, 10, 158 / 4096), (5, 5, 1.0), (1, 0, 1.0)],
)
def test_mcnemar_known_values(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_of_many_flips_nears_the_normal_distribution() -> None:
    z = (100 - 1) / math.sqrt(1300)  # with continuity correction
    assert mcnemar(700, 600) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert mcnemar(400, 380) == pytest.approx(math.erfc(19 / math.sqrt(780) / math.sqrt(2)), rel=0.01)


def test_flips_count_both_directions_and_need_right_or_wrong() -> None:
    found = flips(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0]))
    assert found is not None and (found.lost, found.gained) == (2, 1)
    assert flips(np.array([0.5]), np.array([1.0])) is None


def test_tasks_that_share_images_are_resampled_together(tmp_path: Path) -> None:
    for run in load_runs(standard(tmp_path)):
        for task in TASKS if run.done else ():
            run.record.results[task].scores = run.record.results["toy_exist"].scores
            (run.path / "samples" / f"{task}.jsonl").write_text((run.path / "samples/toy_exist.jsonl").read_text())
        run.record.write(run.path)
    for row in table_of(tmp_path).rows:
        if row.drops and row.average:  # the same answers three times are not more evidence than once
            assert row.average.delta.low == pytest.approx(row.cells["toy_exist"].delta.low)
            assert row.average.delta.high == pytest.approx(row.cells["toy_exist"].delta.high)


def test_samples_without_an_image_stand_alone(tmp_path: Path) -> None:
    for path in standard(tmp_path).glob("runs/*/samples/toy_ocr.jsonl"):
        path.write_text(re.sub(r'"image": "[^"]*"', '"image": null', path.read_text()))
    exist, ocr = (run_of(tmp_path, "none").samples(task).clusters for task in ("toy_exist", "toy_ocr"))
    assert len(set(exist)) == 30 and len(set(ocr)) == 60 and not set(exist) & set(ocr)
