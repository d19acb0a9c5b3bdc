"""The store of answers: what a kill leaves, what two writers leave, what is not ours.

pytest tests/evaluation/test_answers.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pdrop.evaluation.answers import Answer, AnswerStore, Question


def question(number: int) -> Question:
    return Question("task", number, 0, "What?", images=list)


def answer(text: str) -> Answer:
    return Answer("What?", text, 5, 16, 1, [16, 8], ["ff"], images=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    AnswerStore(tmp_path / "run" / "answers.jsonl").add([(question(0), answer("a")), (question(1), answer("b"))])
    return tmp_path / "run" / "answers.jsonl"


def test_what_was_added_is_there_again(path: Path) -> None:
    store = AnswerStore(path)
    assert len(store) == 2 and question(1) in store and question(2) not in store
    assert store[question(0)] == answer("a")


@pytest.mark.parametrize("cut", [1, 2, 30, -2])
def test_opening_leaves_a_half_line_to_its_writer(path: Path, cut: int) -> None:
    """Another process may be in the middle of it."""
    line = path.read_bytes().splitlines(keepends=True)[1]
    torn = path.read_bytes() + line[:cut]
    path.write_bytes(torn)
    store = AnswerStore(path)
    assert len(store) == 2 and path.read_bytes() == torn
    path.write_bytes(torn + line[cut:])
    assert len(AnswerStore(path)) == 2, "the writer went on"


@pytest.mark.parametrize("cut", [1, 2, 30, -2])
def test_the_next_answer_gets_a_line_of_its_own(path: Path, cut: int) -> None:
    torn = path.read_bytes()[:cut] if cut > 0 else path.read_bytes()[: cut - 1]
    path.write_bytes(torn)
    AnswerStore(path).add([(question(7), answer("seven"))])
    assert path.read_bytes().startswith(torn + b"\n{")
    store = AnswerStore(path)
    assert store[question(7)] == answer("seven")
    store.add([(question(8), answer("eight"))])
    assert path.read_bytes().count(b"\n") == torn.count(b"\n") + 3 and AnswerStore(path)[question(8)].text == "eight"


def test_the_last_line_of_a_question_counts(path: Path) -> None:
    AnswerStore(path).add([(question(1), answer("asked again"))])
    store = AnswerStore(path)
    assert len(store) == 2 and store[question(1)].text == "asked again"


@pytest.mark.parametrize("foreign", ["some notes", "{}", '{"answer": 3', '{"key": "x"}', "[1]", "7"])
def test_what_is_no_answer_is_refused(path: Path, foreign: str) -> None:
    path.write_text(foreign + "\n" + path.read_text())
    with pytest.raises(
        ValueError, match=r"answers\.jsonl, line 1 is not an answer of this version: move the folder away"
    ):
        AnswerStore(path)
