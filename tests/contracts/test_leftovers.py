"""What kills and power cuts leave behind.

python -m pytest tests/contracts/test_leftovers.py
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from pdrop.evaluation.answers import Answer, AnswerStore, Question
from pdrop.store import remove_leftovers, tidy, write_atomically


def stored(path: Path, number: int = 4) -> list[Question]:
    """A file of answers as a run writes it, and its questions."""
    asked = [Question("toy", n, 0, f"What is {n}?", tuple, {}) for n in range(number)]
    store = AnswerStore(path)
    for question in asked:
        store.add([(question, Answer("?", str(question.doc_id), 3, 4, 1, [4], []))])
    return asked


def test_zeros_of_a_power_cut_cost_the_last_lines_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    asked = stored(path)
    whole = path.read_bytes()
    for cut in (1, 30, len(whole.split(b"\n")[3]) + 1):
        path.write_bytes(whole[:-cut] + b"\0" * 4096)
        with caplog.at_level(logging.WARNING):
            left = AnswerStore(path)
        assert len(left) == 3 + (cut == 1) and asked[0] in left and ("asked again" in caplog.text) == (cut > 1)
        left.add([(asked[3], Answer("?", "3", 3, 4, 1, [4], []))])
        assert len(AnswerStore(path)) == 4, "and what is written after them is read"
        caplog.clear()


def test_an_answer_that_was_changed_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    asked = stored(path)
    path.write_bytes(path.read_bytes().replace(b'"text": "2"', b'"text": "7"'))
    with caplog.at_level(logging.WARNING):
        left = AnswerStore(path)
    assert asked[2] not in left and len(left) == 3 and "line 3 does not hold what was written" in caplog.text


def test_the_next_start_removes_what_killed_writes_left(tmp_path: Path) -> None:
    places = [tmp_path / "runs/a", tmp_path / "questions", tmp_path / "experiments/demo"]
    for place in places:
        write_atomically(place / "kept.json", "{}")
        for name, age in ((".record.json.0123456789abcdef", 7200), (".record.json.fedcba9876543210", 0)):
            (place / name).write_text("half")
            os.utime(place / name, (time.time() - age,) * 2)
        (place / ".lock").write_text("")
    tidy(tmp_path)
    for place in places:
        left = {path.name for path in place.iterdir()}
        assert left == {"kept.json", ".lock", ".record.json.fedcba9876543210"}, "a write of now may go on"
    remove_leftovers(places[0])
    assert {path.name for path in places[0].iterdir()} == {"kept.json", ".lock"}, "the folder is ours: nobody writes"
