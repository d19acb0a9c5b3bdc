"""Help fits the terminal, whatever a docstring's lines are.

pytest tests/contracts/test_command_help.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import analysis.__main__ as analysis_command
from pdrop.command_help import COMMAND, folded, refuse_no_command
from pdrop.conformance.numbers import unequal

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("package", ["pdrop", "analysis"])
def test_no_module_is_run_in_silence(package: str) -> None:
    """python -m pdrop.run did nothing, said nothing and exited with 0."""
    commands = []
    for path in sorted((ROOT / package).rglob("*.py")):
        module, text = ".".join(path.relative_to(ROOT).with_suffix("").parts), path.read_text(encoding="utf8")
        if COMMAND.search(text):
            commands.append(module)
            refuse_no_command(["python", "-m", module], str(ROOT / package))
            continue
        assert "\ndef main(" not in text, f"{module} has a command that python -m does not call"
        if path.name != "__init__.py":  # Python itself says of a package that it cannot be executed
            for words in (["-m", module], [f"-m{module}"], ["-Im", module, "x=1"]):
                with pytest.raises(SystemExit, match=f"error: {module} is no command: python -m {package} --help"):
                    refuse_no_command(["python", *words], str(ROOT / package))
    assert f"{package}.__main__" in commands


@pytest.mark.parametrize("module", ["pdrop.store", "analysis.statistics"])
def test_a_module_that_is_no_command_says_so(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True)
    package = module.partition(".")[0]
    line = f"error: {module} is no command: python -m {package} --help shows what there is\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    imported = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True)
    assert (imported.returncode, imported.stderr) == (0, "")
