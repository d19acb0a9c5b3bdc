"""Help fits the terminal, whatever a docstring's lines are.

pytest tests/contracts/test_command_help.py
"""

from __future__ import annotations

import pytest

import analysis.__main__ as analysis_command
from pdrop.command_help import folded
from pdrop.conformance.numbers import unequal

TEXT = """What a command does, in a long line that has to be folded somewhere.

    python -m thing tables [NAME ...]    results/tables/NAME.md and others besides, many
    short    row

A paragraph of
two lines.
"""


def test_rows_go_on_below_their_text_and_paragraphs_are_filled() -> None:
    found = folded(TEXT, 68)
    assert max(map(len, found.splitlines())) <= 68
    assert "\n" + " " * 41 + "others besides, many\n" in found, found
    assert "\n    short    row\n" in found and found.endswith("A paragraph of two lines.")
    assert found.split() == TEXT.split(), "nothing is lost"


@pytest.mark.parametrize("width", [60, 78, 79, 100, 200])
def test_the_analysis_fits(width: int) -> None:
    found = folded(analysis_command.__doc__ or "", width)
    assert max(map(len, found.splitlines())) <= width
    assert found.split() == (analysis_command.__doc__ or "").split()


def test_missing_multiply_adds_are_told_where_they_belong() -> None:
    told = unequal(10_000.0, 9_000.0)
    assert "500 multiply-adds are missing" in told and "belong into the `macs` of what its `selection` returns" in told
    assert "500 multiply-adds too many; the method's `selection` counts" in unequal(9_000.0, 10_000.0)
