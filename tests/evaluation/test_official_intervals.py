"""The intervals of the official scores, against an ordinary bootstrap of the documents themselves.

Nothing of the product is used for the expected numbers: what was answered is known, it is read by the official
program's own lines, scored by lmms-eval's aggregation, and pictures are drawn with replacement by NumPy. The product
reads samples from a store, in parts, and draws Poisson numbers by the pictures' hashes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pdrop.evaluation.answers import Answer, Question
from pdrop.evaluation.generation import Answered
from pdrop.evaluation.lmms import import_lmms_eval, scored_answers
from pdrop.evaluation.progress import Progress
from pdrop.record import RunRecord
from tests.support.answering import spec
from tests.support.records import table_of
from tests.support.synthetic_tasks import LETTERS, TASKS, picture, write_task

DRAWS = 1000
METHODS = {"none": "", "fastv": "2:0.5"}
Rows = list[dict[str, Any]]
Estimated = tuple[float, float, float]  # a score and the ends of its interval


def store(folder: Path, task: str, rows: Rows, said: dict[str, list[str]]) -> Path:
    """A store of two finished runs of one task under protocol=official, with these answers."""
    tasks, results = write_task(folder, task, rows), folder / "results"
    for method, schedule in METHODS.items():

        def answer(questions: list[Question], line: Progress | None) -> Answered:
            texts = [said[method][question.doc_id] for question in questions]  # noqa: B023
            return Answered([Answer("?", text, 12, 16, 2, [16, 8], ["ff"]) for text in texts], len(texts), 0)

        run = replace(spec([task], protocol="official"), method=method, schedule=schedule, latency="off")
        found = scored_answers(run, answer, results / "runs" / run.folder, [tasks])
        RunRecord(run, "done", "2026-01-02T03:04:05Z", results=found.results).write(results / "runs" / run.folder)
        marker = results / "experiments" / "demo" / run.folder
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("{}")
    return results


def of_table(results: Path, task: str) -> dict[str, Estimated]:
    """Both rows' scores, and the second's difference from the first, with the intervals that a table shows."""
    cells = {row.spec.method: row.cells[task] for row in table_of(results).rows}
    found = {method: cell.score for method, cell in cells.items()} | {"difference": cells["fastv"].delta}
    return {name: (one.value, one.low, one.high) for name, one in found.items()}


def bootstrap(pictures: Sequence[int], score: Callable[[str, list[int]], float]) -> dict[str, Estimated]:
    """The ordinary bootstrap over whole pictures: as many as there are, drawn with replacement.

    Args:
        pictures: The picture of each unit (a question, or a circle of rotations).
        score: (method, units) -> score of these units, which may repeat.
    """
    units: dict[int, list[int]] = {}
    for unit, of in enumerate(pictures):
        units.setdefault(of, []).append(unit)
    generator, drawn = np.random.default_rng(5), []
    for _ in range(DRAWS):
        those = generator.choice(list(units), size=len(units))
        taken = [unit for of in those for unit in units[int(of)]]
        drawn.append([score(method, taken) for method in METHODS])
    array = np.array(drawn)
    whole = [score(method, list(range(len(pictures)))) for method in METHODS]
    named = {"none": (whole[0], array[:, 0]), "fastv": (whole[1], array[:, 1])}
    named["difference"] = whole[1] - whole[0], array[:, 1] - array[:, 0]
    return {name: (value, *np.quantile(found, [0.025, 0.975]).tolist()) for name, (value, found) in named.items()}


def compared(found: dict[str, Estimated], pictures: Sequence[int], score: Callable[[str, list[int]], float]) -> None:
    """Equal scores; ends of intervals as near as two bootstraps of this many draws come: 0.3 standard errors.

    A bootstrap of single questions, or of each run by itself, would be told apart.
    """
    expected, singly = bootstrap(pictures, score), bootstrap(range(len(pictures)), score)
    for name, (value, low, high) in expected.items():
        assert found[name][0] == pytest.approx(value), name
        assert found[name][1:] == pytest.approx((low, high), abs=0.3 * (high - low) / 3.92), name
    wide = {name: high - low for name, (_, low, high) in expected.items()}
    for method in METHODS:
        assert singly[method][2] - singly[method][1] < 0.8 * wide[method], method
    assert wide["difference"] < 0.8 * np.hypot(*(wide[method] for method in METHODS))


def verdicts(pictures: Sequence[int], strength: float) -> list[bool]:
    """Right or wrong, where a picture is easy or hard for all of its questions."""
    drawn = random.Random(strength)
    easy = {of: random.Random(of).random() for of in set(pictures)}
    return [drawn.random() < (strength if easy[of] < 0.6 else 1 - strength) for of in pictures]


def test_popes_official_f1(tmp_path: Path) -> None:
    import_lmms_eval()
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score

    categories = ("random", "popular", "adversarial")
    pictures = [n // 6 for n in range(6 * 40)]
    rows = [
        TASKS["pope"][2](n)
        | {"image_source": f"picture {of}", "image": picture(of), "category": categories[n % 3]}
        | {"answer": ("yes", "no")[n // 3 % 2]}
        for n, of in enumerate(pictures)
    ]
    words = {"yes": ("Yes", "yes, there is", "It is on the left."), "no": ("No", "There is not.", "no, sir")}
    said = {}
    for method, strength in (("none", 0.95), ("fastv", 0.85)):
        meant = [
            row["answer"] if right else {"yes": "no", "no": "yes"}[row["answer"]]
            for row, right in zip(rows, verdicts(pictures, strength))
        ]
        said[method] = [words[one][n % 3] for n, one in enumerate(meant)]

    def read(text: str) -> str:  # llava/eval/eval_pope.py
        if text.find(".") != -1:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        return "no" if "No" in words or "not" in words or "no" in words else "yes"

    entries = {
        method: [{"prediction": read(text), "ground_truth": row["answer"]} for text, row in zip(texts, rows)]
        for method, texts in said.items()
    }

    def score(method: str, units: list[int]) -> float:
        of = [[entries[method][n] for n in units if n % 3 == category] for category in range(3)]
        return sum(map(pope_aggregate_f1_score, of)) / 3

    compared(of_table(store(tmp_path, "pope", rows, said), "pope"), pictures, score)


def test_mmbenchs_circular_accuracy(tmp_path: Path) -> None:
    import_lmms_eval()
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    number, turns, task = 120, 4, "mmbench_en_dev_static"
    pictures = [n // 3 for n in range(number)]  # three questions about each
    rows, right = [], {}
    for turn in range(turns):
        letters = LETTERS[turn:] + LETTERS[:turn]
        for n in range(number):
            row = TASKS["mmbench_en_dev_static"][2](n) | {"index": n + 10**6 * turn, "image": picture(pictures[n])}
            rows.append(row | {"answer": letters[n % 4]})
    for method, strength in (("none", 0.97), ("fastv", 0.93)):
        right[method] = [one for turn in range(turns) for one in verdicts(pictures, strength + turn / 1000)]
    said = {
        method: [row["answer"] if one else LETTERS[LETTERS.index(row["answer"]) - 1] for row, one in zip(rows, those)]
        for method, those in right.items()
    }
    evaluator, truths = MMBench_Evaluator(), {row["index"]: row["answer"] for row in rows}
    circles: dict[tuple[str, int], int] = {}
    for method, texts in said.items():
        for n in range(number):
            circle = [row | {"prediction": text} for row, text in zip(rows[n::number], texts[n::number])]
            circles[method, n] = evaluator.eval_sub_data(pd.DataFrame(circle), truths, static_only=True)

    def score(method: str, units: list[int]) -> float:
        return sum(circles[method, n] for n in units) / len(units)

    compared(of_table(store(tmp_path, task, rows, said), task), pictures, score)
