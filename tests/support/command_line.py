"""run.py and train.py as tests call them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# of train.py, on a tiny checkpoint
QUICK_TRAINING = ["model=folder", "model.name=tiny", "layers=[1,2]", "train.batch_size=4", "train.micro_batch=2"]
QUICK_TRAINING += ["train.bf16=false", "train.tf32=false", "train.workers=0", "device=cpu", "train.learning_rate=0.01"]


def called(main: Callable[[], None], program: str, words: tuple[str, ...], patch: Any, capfd: Any) -> tuple[int, str]:
    """The exit code and what was printed; `patch` and `capfd` are pytest's monkeypatch and capfd."""
    patch.setattr(sys, "argv", [program, *words])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    out = capfd.readouterr()
    return code, out.out + out.err


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows of a training's curve.csv."""
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))
