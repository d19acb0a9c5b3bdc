"""A task's bar is drawn on the terminal, though the task's code runs with its output redirected."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from pdrop.evaluation import progress


def test_a_bar_is_drawn_while_a_task_s_code_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "on_a_terminal", lambda: True)
    with progress.progress_line("pope", True) as line, redirect_stderr(io.StringIO()):
        assert line is not None
        line("pope", 30, 40)
    said = capsys.readouterr().err
    assert "pope:" in said and "0/40" in said
