"""Messages and help name the commands as the user has them.

pytest tests/contracts/test_commands.py
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pdrop import commands
from pdrop.commands import CHECKOUT, INSTALLED, as_typed, script, typed

ROOT = Path(__file__).resolve().parents[2]
LITERAL = re.compile(r"python run\.py|python train\.py|python -m analysis|\b(?:run|train)\.py ")
NAMES = ("run", "train", "analysis", "pdrop")


@pytest.mark.parametrize(
    ("started", "there", "expected"),
    [
        ("run.py", True, CHECKOUT),
        ("/somewhere/pdrop/train.py", True, CHECKOUT),
        ("/somewhere/pdrop/analysis/__main__.py", True, CHECKOUT),
        ("/somewhere/lmms_eval/__main__.py", True, CHECKOUT),
        ("/somewhere/lmms_eval/__main__.py", False, INSTALLED),
        ("/usr/bin/pdrop", True, INSTALLED),
        ("/usr/bin/pdrop-analysis", False, INSTALLED),
        ("/site/pdrop/__main__.py", False, INSTALLED | {"run": "python -m pdrop", "pdrop": "python -m pdrop"}),
        ("/somewhere/pdrop/pdrop/__main__.py", True, CHECKOUT | {"run": "python -m pdrop"}),
    ],
)
def test_a_command_has_the_name_that_was_typed(
    started: str, there: bool, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(commands, "PACKAGE", (ROOT if there else tmp_path) / "pdrop")
    assert {name: typed(name) for name in NAMES} == expected
    assert script("run") == ("run.py" if typed("train") == "python train.py" else "-m pdrop")


def test_installed_names_are_those_of_the_package() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == set(INSTALLED.values())


def test_a_help_keeps_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "  python run.py -m ratio=0.3      a sweep\n"
        "  python -m analysis status       what waits\n"
        "experiment  a name: python -m analysis tables NAME\n"
        "  torchrun --nproc_per_node=8 train.py parallel=fsdp ...\n"
        "dials       as for run.py"
    )
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert as_typed(text) == text
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pdrop"])
    assert as_typed(text).splitlines() == [
        "  pdrop -m ratio=0.3              a sweep",
        "  pdrop-analysis status           what waits",
        "experiment  a name: pdrop-analysis tables NAME",
        "  torchrun --nproc_per_node=8 -m pdrop.cli.train parallel=fsdp ...",
        "dials       as for pdrop",
    ]


def test_no_message_names_a_command_itself() -> None:
    """Strings other than docstrings ask pdrop/commands.py."""
    found = []
    for folder in ("pdrop", "analysis"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
            for node in ast.walk(tree):
                said = node.value if isinstance(node, ast.Constant) and id(node) not in told else None
                if isinstance(said, str) and LITERAL.search(said) and path != ROOT / "pdrop/commands.py":
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {said!r}")
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_an_installed_command_says_its_own_name(tmp_path: Path) -> None:
    """As pip's scripts do: a file called `pdrop-analysis` that calls the entry point."""
    program = tmp_path / "pdrop-analysis"
    program.write_text("import sys\nfrom analysis.__main__ import command_line\nsys.exit(command_line())\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, str(program), "tables"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "start with pdrop\n" in done.stderr, done.stderr
    call = [sys.executable, str(program), "--help"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "pdrop-analysis tables" in done.stdout and "python -m" not in done.stdout, done.stdout
