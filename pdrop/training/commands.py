"""The run.py commands that score a study's trainings: each model with nothing dropped and with what it was trained
with, and the models that were trained with nothing dropped with what the others were trained with.

    python -m pdrop.training.commands results/trainings [run.py's settings] | sh -e
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pdrop.training.record import FILE, TrainingRecord

DIALS = ("stages", "ratio", "layers", "budget", "positions", "twin")  # of dropping, the same for train.py and run.py


def dropping(record: TrainingRecord) -> tuple[str, ...]:
    """What train.py was told about dropping beside the method, as overrides; nothing: its defaults."""
    return tuple(o for o in record.command[1:] if o.partition("=")[0] in DIALS or o.startswith("method."))


def name_of(record: TrainingRecord) -> str:
    """The trained model's name in tables: method, what differs from the defaults, seed."""
    told = [override.replace("=", "").replace("method.", "") for override in dropping(record)]
    return "_".join(["trained", record.spec.method, *told, f"seed{record.spec.seed}"])


def commands(folder: Path, settings: Sequence[str] = ()) -> Iterable[str]:
    """Shell lines, one for each model and way of dropping.

    Raises:
        ValueError: If no training there is finished.
    """
    found = [(path.parent, TrainingRecord.read(path.parent)) for path in sorted(folder.glob(f"*/{FILE}"))]
    done = [(path, record) for path, record in found if record.status == "done"]
    if not done:
        raise ValueError(f"no finished training under {folder}: make training-study, or train.py output={folder}")
    for path, record in done:
        mine = [record] if record.spec.schedule else [other for _, other in done if other.spec.schedule]
        ways: dict[tuple[str, ...], list[str]] = {}
        for other in mine:
            methods = ways.setdefault(dropping(other), [])
            if other.spec.method not in methods:
                methods.append(other.spec.method)
        for number, (dials, methods) in enumerate(ways.items() or [((), [])]):
            swept = ["none", *methods] if number == 0 else methods
            model = [f"model.name={name_of(record)}", f"model.path={path / 'model'}"]
            command = ["run.py", "-m", "experiments=training", "model=folder", *model, f"method={','.join(swept)}"]
            yield shlex.join([sys.executable, *command, *dials, *settings])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for line in commands(Path(sys.argv[1]), sys.argv[2:]):
        sys.stdout.write(f"{line}\n")
