"""Comparison of the rows' answers: how similar they are to those without dropping, and scores by the benchmarks' rules.

Similarity needs no right answers, so it shows changes that a score hides: one wrong answer in place of another.

    same    share of answers that are identical to the undropped model's (apart from blanks at their ends)
    chrF    mean overlap of the n-grams of their characters (Popovic 2015: sacrebleu's sentence score, as a fraction)
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from ..statistics import Estimate, interval, replicates
from ..store.load import clusters_of
from ..store.samples import LIKELIHOODS
from .resampling import Draws, mean_draws, run_draws
from .table_model import Likeness, Row, Table, in_all

# scores other than the main one: other rules and passes of the same answers (pdrop/evaluation/official.py)
APART = ("circular_accuracy", "single_pass_accuracy", "mme_total_score", "mean_iou")
LMMS_EVALS = ("pope_f1_score", "exact_match", "gpt_eval_score")  # whose rule is another than the official one


def describe(rows: list[Row], bases: Sequence[int | None], table: Table) -> None:
    """Fill in similarity and the scores by other rules, for the finished rows of one model.

    Args:
        rows: The rows.
        bases: For each row the number of the unpruned row that it is compared with.
        table: The rows' table.
    """
    drawn: dict[int, list[Draws]] = defaultdict(list)
    for task in table.tasks:
        for base in {number for number in bases if number is not None}:
            held = [number for number, other in enumerate(bases) if other == base != number]
            for number, draws in compare_answers(rows[base], [rows[number] for number in held], task):
                drawn[held[number]].append(draws)
        for metric in other_rules(rows, task, table.tasks[task].metric):
            score_by(metric, rows, task)
    for number, by_task in drawn.items():
        row = rows[number]
        each = row.likeness.values()
        same = estimated(fmean(one.same.value for one in each), mean_draws(by_task))
        row.likeness_mean = Likeness(same, fmean(one.chrf for one in each), sum(one.n for one in each))


def compare_answers(base: Row, rows: Sequence[Row], task: str) -> list[tuple[int, Draws]]:
    """Compare the rows' answers to a task with the base's.

    Returns:
        Number of each row that has the same samples as the base, and its share of equal answers under resampling.
    """
    if not in_all(base, task) or not (before := answers(base, 0, task)):
        return []
    each = [[answers(row, n, task) for n in range(len(row.runs))] if in_all(row, task) else [] for row in rows]
    held = [number for number, runs in enumerate(each) if runs and all(one.keys() == before.keys() for one in runs)]
    if not held:
        return []
    same = np.array([
        [fmean(float(one[doc] == text) for one in each[number]) for number in held] for doc, text in before.items()
    ])  # fmt: skip
    draws = replicates(task, same, clusters(base, task))
    for column, number in enumerate(held):
        alike = fmean(chrf(one[doc], text) for one in each[number] for doc, text in before.items())
        share = estimated(float(same[:, column].mean()), draws[:, column])
        rows[number].likeness[task] = Likeness(share, alike, len(before))
    return [(number, draws[:, column]) for column, number in enumerate(held)]


def answers(row: Row, number: int, task: str) -> dict[str, str]:
    """The answers of one of a row's runs by document, in order; empty if likelihoods were compared."""
    return {one.doc_id: one.answer.strip() for one in row.runs[number].read(task) if one.answer != LIKELIHOODS}


def clusters(row: Row, task: str) -> list[str]:
    """The cluster of each answer, which is drawn as one."""
    return clusters_of(row.runs[0].read(task), task)


@functools.lru_cache(maxsize=100_000)
def chrf(answer: str, reference: str) -> float:
    """Overlap of the character n-grams of two texts, 0 to 1."""
    if answer == reference:
        return 1.0
    import sacrebleu

    return float(sacrebleu.sentence_chrf(answer, [reference]).score) / 100


def other_rules(rows: Sequence[Row], task: str, main: str) -> list[str]:
    """The task's further metrics that are by an official rule, or of another pass, and that any row has; lmms-eval's
    own if the main one is by an official rule."""
    found = {name: None for row in rows if in_all(row, task) for name in row.runs[0].record.results[task].scores}
    apart = [name for name in found if name.startswith("official_") or name in APART]
    return [name for name in found if name != main and (name in apart or (main in apart and name in LMMS_EVALS))]


def score_by(metric: str, rows: Sequence[Row], task: str) -> None:
    """Fill in a further metric of the task with its interval, for the rows whose records have it."""
    having = [
        row for row in rows
        if in_all(row, task) and all(metric in run.record.results[task].scores for run in row.runs)
    ]  # fmt: skip
    drawn = iter(run_draws([run for row in having for run in row.runs], task, metric))
    for row in having:
        draws = mean_draws([next(drawn) for _ in row.runs])
        row.rules[task, metric] = estimated(fmean(run.score(task, metric) for run in row.runs), draws)


def estimated(value: float, draws: Draws) -> Estimate:
    """A value with the interval of its draws."""
    return Estimate(value) if draws is None else Estimate(value, *interval(draws))
