"""A task's bar is drawn on the terminal, though the task's code runs with its output redirected."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from pdrop import pace
from pdrop.evaluation import progress
from pdrop.pace import Pace


def test_a_bar_is_drawn_while_a_task_s_code_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "on_a_terminal", lambda: True)
    with progress.progress_line("pope", True, Pace("", "questions")) as line, redirect_stderr(io.StringIO()):
        assert line is not None
        line("pope", 30, 40)
    said = capsys.readouterr().err
    assert "pope:" in said and "0/40" in said


def test_tasks_that_take_less_than_the_time_between_two_lines_have_lines_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "on_a_terminal", lambda: False)
    caplog.set_level("INFO")
    lines = Pace("", "questions")
    for task in ("mme", "pope", "gqa", "vqa"):  # 20 s each
        with progress.progress_line(task, True, lines) as line:
            assert line is not None
            for done in (40, 80):
                now += 10
                line(task, done, 80)
    assert [record.message for record in caplog.records] == [
        "pope: 40 of 80 questions, 4.0 per s, about 10 s left",
        "gqa: 80 of 80 questions, 4.0 per s, about 0 s left",
    ]
