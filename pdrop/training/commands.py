"""The run.py commands that score a study's trainings. Each model is scored with nothing dropped and as it was trained;
models trained with nothing dropped, also as the others of their seed were trained; and the model that all started from
in each of these ways. Trainings that differ in more than dropping and seed are separate studies.

    python -m pdrop.training.commands results/trainings [run.py's settings] > score.sh && sh -e score.sh
    python -m pdrop.training.commands results/trainings --layers

--layers: the commands for PyramidDrop's Fig. 3 instead. Each model of one seed that was trained with the default dials
is cut once, at one layer after another.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from pdrop.commands import script, typed
from pdrop.record import TRAINING_VARIES, canonical_json
from pdrop.training.record import FILE, TrainingRecord

Done = list[tuple[Path, TrainingRecord]]  # finished trainings, each with its own folder

DIALS = ("stages", "ratio", "layers", "budget", "positions", "twin")  # of dropping, the same for train.py and run.py


def dropping(record: TrainingRecord) -> tuple[str, ...]:
    """The dials of dropping that train.py was given, apart from the method, as overrides; none: its defaults."""
    return tuple(o for o in record.command[1:] if o.partition("=")[0] in DIALS or o.startswith("method."))


def name_of(record: TrainingRecord) -> str:
    """The trained model's name in tables: method, what differs from the defaults, seed."""
    told = [override.replace("=", "").replace("method.", "") for override in dropping(record)]
    whole = "_".join(["trained", method_of(record), *told, f"seed{record.spec.seed}"])
    return re.sub(r"[^\w.-]+", "-", whole)  # it is part of a folder's name


def method_of(record: TrainingRecord) -> str:
    """The method as the command line names it: twin=true makes it its random twin."""
    twin = any(override.lower() == "twin=true" for override in dropping(record))
    return record.spec.method.removeprefix("random_") if twin else record.spec.method


def finished(folder: Path) -> Done:
    """The finished trainings of a folder, in the order of their names.

    Raises:
        ValueError: If there is none, or a record cannot be read.
    """
    found = [(path.parent, TrainingRecord.read(path.parent)) for path in sorted(folder.glob(f"*/{FILE}"))]
    done = [(path, record) for path, record in found if record.status == "done"]
    if not done:
        raise ValueError(f"no finished training under {folder}: {typed('train')} output={folder}")
    return done


def studies(done: Done) -> list[Done]:
    """The trainings in groups; those of a group differ only in dropping and seed."""
    found: dict[str, Done] = {}
    for path, record in done:
        same = {name: value for name, value in asdict(record.spec).items() if name not in TRAINING_VARIES}
        found.setdefault(canonical_json(same), []).append((path, record))
    return list(found.values())


def names(done: Done) -> dict[Path, str]:
    """Each trained model's name, with the training's identity if several would have the same name."""
    counts = Counter(name_of(record) for _, record in done)
    return {
        path: name_of(record) if counts[name_of(record)] == 1 else f"{name_of(record)}_{record.spec.training_id}"
        for path, record in done
    }


def line(experiment: str, record: TrainingRecord, name: str, path: Path | str, more: Sequence[str]) -> str:
    """A shell line that sweeps an experiment over a model, asked as it was in training."""
    swept = [f"experiments={experiment}", *record.scoring(name, path), *more]
    return shlex.join([sys.executable, *script("run").split(), "-m", *swept])


def by_layer(folder: Path, settings: Sequence[str] = ()) -> Iterable[str]:
    """Shell lines that cut models at one layer after another: those of a study's lowest seed that were trained with
    the default dials.

    Raises:
        ValueError: If no training of the folder is finished, or a record cannot be read.
    """
    done = finished(folder)
    named = names(done)
    for study in studies(done):
        seed = min(record.spec.seed for _, record in study)
        for path, record in study:
            if record.spec.seed == seed and not dropping(record):
                yield line("redundancy_trained", record, named[path], path / "model", settings)


def commands(folder: Path, settings: Sequence[str] = ()) -> Iterable[str]:
    """Shell lines, one for each model and setting of the dials, with the methods in a sweep.

    Args:
        folder: The folder that holds the trainings' folders.
        settings: Overrides of run.py that are added to each line.

    Raises:
        ValueError: If no training of the folder is finished, or a record cannot be read.
    """
    done = finished(folder)
    begun = {record.spec.model_path: record for _, record in done if record.spec.start == "{}"}
    for start, record in begun.items():
        followers = [other for _, other in done if other.spec.model_path == start and other.spec.schedule]
        for way in ways(followers):
            yield line("training", record, f"{record.spec.model}_not_finetuned", start, [*way, *settings])
    named = names(done)
    for study in studies(done):
        for path, record in study:
            rivals = [other for _, other in study if other.spec.schedule and other.spec.seed == record.spec.seed]
            for way in ways([record] if record.spec.schedule else rivals):
                yield line("training", record, named[path], path / "model", [*way, *settings])


def ways(trained: Sequence[TrainingRecord]) -> list[list[str]]:
    """Overrides that drop nothing, and that drop as each of these trainings did; a list per setting of the dials."""
    found: dict[tuple[str, ...], list[str]] = {}
    for record in trained:
        methods = found.setdefault(dropping(record), [])
        if method_of(record) not in methods:
            methods.append(method_of(record))
    swept = [(dials, ["none", *methods] if n == 0 else methods) for n, (dials, methods) in enumerate(found.items())]
    return [[f"method={','.join(methods)}", *dials] for dials, methods in swept or [((), ["none"])]]


def main(arguments: Sequence[str]) -> None:
    folder, *settings = [word for word in arguments if word != "--layers"] or [""]
    if not folder:
        sys.exit(__doc__)
    try:
        lines = list((by_layer if "--layers" in arguments else commands)(Path(folder), settings))
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("".join(f"{text}\n" for text in lines))


if __name__ == "__main__":
    main(sys.argv[1:])
