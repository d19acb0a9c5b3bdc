"""The commands by the names that their user has for them; messages and help ask here. Standard library only.

    in a checkout       python run.py      python train.py    python -m analysis    python -m pdrop
    installed           pdrop              pdrop-train        pdrop-analysis        pdrop

What was typed decides: whoever typed `pdrop` is told of `pdrop`. In a program of another kind (lmms-eval's command, a
notebook) it is the checkout's name where there is one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

Command = Literal["run", "train", "analysis", "pdrop"]  # pdrop: what also has fetch and rescore

PACKAGE = Path(__file__).resolve().parent
CHECKOUT: dict[Command, str] = {
    "run": "python run.py",
    "train": "python train.py",
    "analysis": "python -m analysis",
    "pdrop": "python -m pdrop",
}
INSTALLED: dict[Command, str] = {
    "run": "pdrop",
    "train": "pdrop-train",
    "analysis": "pdrop-analysis",
    "pdrop": "pdrop",
}


def typed(name: Command) -> str:
    """How the user starts a command."""
    if name in ("run", "pdrop") and program().parts[-2:] == (PACKAGE.name, "__main__.py"):
        return CHECKOUT["pdrop"]  # from any folder, installed or not
    return INSTALLED[name] if installed() else CHECKOUT[name]


def script(name: Literal["run", "train"]) -> str:
    """What Python, or torchrun, is given to start a command: a script of the checkout, or `-m` and a module."""
    if installed():
        return {"run": "-m pdrop", "train": "-m pdrop.cli.train"}[name]
    return f"{name}.py"


def program() -> Path:
    """What this process was started as."""
    return Path(sys.argv[0]) if sys.argv else Path()


def installed() -> bool:
    """Whether this process is a command of an installed pdrop, or there is no checkout."""
    return program().name in INSTALLED.values() or not (PACKAGE.parent / "run.py").is_file()


def as_typed(text: str) -> str:
    """A help's text, in the checkout's words, with the names that the user has; columns after them stay in place."""
    named = {CHECKOUT[name]: typed(name) for name in CHECKOUT}
    if installed():
        trained = "torchrun --nproc_per_node=8"
        named |= {f"{trained} train.py": f"{trained} {script('train')}", "run.py": typed("run")}
        named["make tables figures report"] = f"{typed('analysis')} report"  # there is no Makefile
    anyone = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))

    def renamed(found: re.Match[str]) -> str:
        name, rest, gap = found.groups()
        return named[name] + rest + (gap and " " * max(2, len(gap) + len(name) - len(named[name])))

    # a name, what follows it, and the blanks before the next column, if one follows and no other name is before it
    pattern = rf"(?<![\w/.])({anyone})(?![\w.-])((?:(?!  |{anyone}).)*)((?: {{2,}}(?=\S))?)"
    return re.sub(pattern, renamed, text)
