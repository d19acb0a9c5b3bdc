"""Intervals of scores that are no means: F1, MME's pairs, MMBench's circles; what is taken for a fraction; likeness."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.comparison.answers import chrf
from analysis.comparison.resampling import run_draws
from analysis.comparison.table_model import Table
from analysis.report.explain import explain
from analysis.statistics import counts, interval, quotients, replicates
from analysis.store.load import load_runs
from analysis.studies.hard_subset import hard
from analysis.tables.csv_export import csv as csv_of
from analysis.tables.footnotes import sources, warnings
from analysis.tables.table import grids, markdown
from pdrop.evaluation.metrics import circles, counted, pairs, score_of
from pdrop.record import RunRecord, Score, TaskResult
from pdrop.samples import write_samples
from tests.support.records import make_record, table_of

QUESTIONS = 48
Scored = tuple[float, list[Any] | None, float | None]


def f1(right: Sequence[bool]) -> Scored:
    truths = ["yes" if n % 2 else "no" for n in range(len(right))]
    said = [t if ok else {"yes": "no", "no": "yes"}[t] for t, ok in zip(truths, right)]
    parts, full = counted("f1", [{"prediction": s, "ground_truth": t} for s, t in zip(said, truths)])
    return score_of(parts or []), parts, full


def mme(right: Sequence[bool]) -> Scored:
    parts, full = pairs([
        {"question_id": n // 2, "category": f"c{n // 2 % 3}", "score": float(ok)} for n, ok in enumerate(right)
    ])  # fmt: skip
    return score_of(parts or []), parts, full


def circular(right: Sequence[bool]) -> Scored:
    number = len(right) // 4
    parts = circles([{"index": n % number + 10**6 * (n // number)} for n in range(len(right))], list(right), 100.0)
    return score_of(parts), parts, 100.0


def plain(right: Sequence[bool]) -> Scored:
    return float(np.mean(right)), None, 1.0


KINDS: dict[str, Callable[[Sequence[bool]], Scored]] = {
    "pope": f1, "mme": mme, "mmbench_en_dev_static": circular, "gqa": plain
}  # fmt: skip


def picture_of(task: str, place: int, number: int) -> str:
    """Four questions share one; of a circle the first two rotations, as where a data set stores one twice."""
    if task.startswith("mmbench"):
        return f"m{place % (number // 4)} {place // (number // 2)}"
    return f"i{place // 4}"


def put(results: Path, method: str, right: dict[str, np.ndarray], invalid: int = 0) -> RunRecord:
    """A finished run with these right answers: by task, [samples] bool."""
    record = make_record(method, 0.5, tuple(right))
    folder, samples = results / "runs" / record.spec.folder, {}
    for task, verdicts in right.items():
        value, parts, full = KINDS[task](verdicts.tolist())
        n = len(verdicts)
        record.results[task] = TaskResult(
            {"main": Score(value, n, True, full)}, n, n, "1", f"data {task}", f"prompt {task}", "main", invalid=invalid
        )
        samples[task] = [
            {"doc_id": place, "question": "?", "prompt": "?", "target": "right", "visual_tokens": 4, "kept": ["f"]}
            | {"answer": "right" if ok else "wrong", "scores": {"main": float(ok)}, "image": picture_of(task, place, n)}
            | ({} if parts is None else {"parts": {"main": parts[place]}})
            | ({"group": str(place % (n // 4))} if task.startswith("mmbench") else {})
            for place, ok in enumerate(verdicts)
        ]
    write_samples(folder, samples)
    record.write(folder)
    marker = results / "experiments" / "demo" / record.spec.folder
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}")
    return record


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Nothing dropped, and a method that loses a quarter of what was right."""
    results, drawn = tmp_path_factory.mktemp("store"), np.random.default_rng(5)
    full = {task: drawn.random(QUESTIONS) < 0.9 for task in KINDS}
    put(results, "none", full)
    put(results, "fastv", {task: verdicts & (drawn.random(QUESTIONS) < 0.75) for task, verdicts in full.items()}, 3)
    return table_of(results)


def test_every_benchmark_and_their_average_have_intervals(table: Table) -> None:
    fastv = table.rows[1]
    for task in KINDS:
        score, delta = fastv.cells[task].score, fastv.cells[task].delta
        assert score.low is not None and score.low < score.value < score.high, task
        assert delta is not None and delta.low is not None and delta.low < delta.value < delta.high <= 0, task
        assert fastv.cells[task].flips is not None and fastv.cells[task].flips.lost > 0, "McNemar works"
    assert table.averaged == ["pope", "mmbench_en_dev_static", "gqa"], "a percentage is one, points are not"
    assert fastv.average is not None and fastv.average.delta is not None and fastv.average.delta.low is not None
    values = [fastv.cells[task].score.value for task in table.averaged]
    assert fastv.average.score.value == pytest.approx(float(np.mean(values))) and max(values) <= 1
    assert sum(hard(table, "fastv").sizes[:2]) > 0 and not hard(table, "fastv").left_out
    assert "no interval" not in sources(table)


def test_the_bootstrap_scores_every_draw_anew(table: Table) -> None:
    run = table.rows[1].runs[0]
    for task in KINDS:
        samples = run.samples(task)
        drawn = run_draws([run], task)[0]
        for draw in range(5):  # the score of the samples, each as often as its picture is drawn
            often = [int(counts(cluster)[draw]) for cluster in samples.clusters]
            if task == "gqa":
                again = np.repeat(samples.values, often).mean()
            elif task == "pope":
                truths = np.repeat([n % 2 for n in range(QUESTIONS)], often)
                ok = np.repeat(samples.values, often)
                hit, said = (ok * truths).sum(), (ok * truths + (1 - ok) * (1 - truths)).sum()
                again = 2 * hit / (said + truths.sum())
            else:
                scale = 100 if task.startswith("mmb") else 1
                again = score_of([
                    (a * n / scale, b * n, s)
                    for a, b, s, n in zip(scale * samples.parts.above, samples.parts.below, samples.parts.strata, often)
                ])  # fmt: skip
            assert drawn[draw] == pytest.approx(again), task


def test_circles_and_pairs_are_drawn_whole(table: Table) -> None:
    run = table.rows[0].runs[0]
    circles_of = run.samples("mmbench_en_dev_static").clusters
    for place in range(QUESTIONS // 4):
        assert len({circles_of[place + turn * QUESTIONS // 4] for turn in range(4)}) == 1
    pictures = run.samples("mme").clusters
    assert all(pictures[n] == pictures[n + 1] for n in range(0, QUESTIONS, 2))


def test_quotients_of_ones_are_means_and_strata_add_up() -> None:
    values = np.random.default_rng(1).random((40, 2))
    labels, ones = [f"i{n // 3}" for n in range(40)], np.ones((40, 2))
    assert np.allclose(quotients("t", values, ones, [""] * 40, labels), replicates("t", values, labels))
    halves = quotients("t", values, ones, [n % 2 for n in range(40)], labels)
    assert np.allclose(halves.mean(axis=0), values[::2].mean(axis=0) + values[1::2].mean(axis=0), atol=0.02)
    low, high = interval(quotients("t", values[:, :1], ones[:, :1], [""] * 40, labels)[:, 0])
    assert low < values[:, 0].mean() < high
    with pytest.raises(ValueError, match="t: no sample"):
        quotients("t", values[:0], ones[:0], [])


@pytest.mark.parametrize(("full", "averaged"), [(100.0, True), (1.0, True), (2000.0, False), (None, False)])
def test_a_metric_that_is_0_everywhere_is_what_its_record_says(
    tmp_path: Path, full: float | None, averaged: bool
) -> None:
    for method in ("none", "fastv"):
        record = put(tmp_path, method, {"gqa": np.zeros(8, dtype=bool)})
        record.results["gqa"].scores["main"].full = full
        record.write(tmp_path / "runs" / record.spec.folder)
    assert [task.averaged for task in table_of(tmp_path).tasks.values()] == [averaged]


def test_a_percentage_of_an_older_record_is_known_by_its_name(tmp_path: Path) -> None:
    record = put(tmp_path, "none", {"gqa": np.ones(8, dtype=bool)})
    result = record.results["gqa"]
    result.scores, result.main_metric = {"gpt_eval_score": Score(62.5, 8)}, "gpt_eval_score"
    record.write(tmp_path / "runs" / record.spec.folder)
    (run,) = load_runs(tmp_path)
    assert run.score("gqa") == 0.625 and run.samples("gqa").values is None
    assert run_draws([run], "gqa") == [None], "of the samples nothing is known: no interval"


def test_a_table_of_scores_by_several_versions_says_so(tmp_path: Path) -> None:
    for method in ("none", "fastv"):
        record = put(tmp_path, method, {"gqa": np.ones(8, dtype=bool)})
    assert not [text for text in warnings(table_of(tmp_path)) if "SEVERAL VERSIONS" in text]
    record.rescored = [{"at": "2026-02-03T04:05:06Z", "sources": "abc", "versions": {"lmms-eval": "0.7.3"}}]
    folder = tmp_path / "runs" / record.spec.folder
    record.write(folder)
    table = table_of(tmp_path)
    assert [text for text in warnings(table) if text.startswith("SCORED BY SEVERAL VERSIONS")]
    assert "Scored anew from stored answers: 1 runs at 2026-02-03T04:05:06Z" in sources(table)
    told = explain(next(run for run in load_runs(tmp_path) if run.path == folder))
    assert "Scores, scored anew from stored answers at 2026-02-03" in told and "0 answers invalid" in told


def test_likeness_and_invalid_answers_stand_beside_the_scores(table: Table) -> None:
    fastv = table.rows[1]
    for task in KINDS:
        likeness = fastv.likeness[task]
        lost = fastv.cells[task].flips.lost
        assert likeness.same.value == pytest.approx(1 - lost / QUESTIONS) and likeness.same.low < 1
        alike = chrf("wrong", "right")
        assert likeness.chrf == pytest.approx(1 - lost / QUESTIONS * (1 - alike)) and 0 < alike < 1
    assert table.rows[0].likeness == {}
    assert fastv.likeness_mean is not None and fastv.likeness_mean.n == 4 * QUESTIONS
    answers = next(grid for grid in grids(table) if grid.title == "Answers")
    assert [row[answers.left + 2].text for row in answers.rows] == ["0 of 192", "12 of 192"]
    assert f"{100 * fastv.likeness['gqa'].same.value:.1f}" in answers.rows[1][-1].text
    assert "**Answers**" in markdown([table]) and "official_f1" in sources(table)
    lines = list(csv.DictReader(io.StringIO(csv_of([table]))))
    assert float(lines[1]["pope_same_answers"]) == pytest.approx(fastv.likeness["pope"].same.value)
    assert (lines[1]["gqa_invalid"], lines[0]["gqa_chrf"]) == ("3", "")
