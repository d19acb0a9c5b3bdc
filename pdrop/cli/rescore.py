"""The command that scores stored answers again: python -m pdrop rescore.

python -m pdrop rescore                       every finished run of results/ whose answers are there
python -m pdrop rescore 3f2a 91bc --check     two runs, by the beginning of their ids; only say what would change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pdrop.command_help import CommandHelp
from pdrop.commands import as_typed, typed
from pdrop.names import printable


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and score; 1 if a run was refused."""
    from pdrop.record import RunRecord
    from pdrop.runs.rescore import rescore

    options = parse(arguments)
    refused = 0
    try:
        folders = chosen(options.results, options.runs)
    except ValueError as error:
        return told(f"error: {error}")
    for folder in folders:
        try:
            record = RunRecord.read(folder)
            if not options.runs and (record.status != "done" or not record.spec.tasks):
                continue  # of a whole store, those that have scores
            changes = rescore(folder, options.task_folder, write=not options.check)
        except (ValueError, OSError, RuntimeError) as error:
            refused = told(f"refused: {error}")
            continue
        lines = [f"  {one.task} {one.metric}: {shown(one.before)} -> {shown(one.after)}" for one in changes]
        differ = f"{len(changes)} {'scores differ' if len(changes) > 1 else 'score differs'}" if changes else ""
        if options.check:
            head = f"{folder.name}: would change, {differ}" if changes else f"{folder.name}: nothing would change"
        else:
            head = f"{folder.name}: scored anew, {differ or 'no score differs'}"
        sys.stdout.write(printable("\n".join([head, *lines])) + "\n")
    return refused


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{typed('pdrop')} rescore", description=as_typed(__doc__ or ""), formatter_class=CommandHelp
    )
    parser.add_argument("runs", nargs="*", metavar="RUN_ID", help="or a folder's name, or the beginning of one")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results/")
    where = "a folder with tasks of your own; default: those of the command that made the run"
    parser.add_argument("--task-folder", action="append", metavar="DIR", help=where)
    parser.add_argument("--check", action="store_true", help="say what would change, and write nothing")
    return parser.parse_args(arguments)


def chosen(results: Path, names: Sequence[str]) -> list[Path]:
    """The folders of these runs; of all where none is named.

    Raises:
        ValueError: If there is no run, or a name fits none or several.
    """
    folders = sorted(path.parent for path in (results / "runs").glob("*/record.json"))
    if not folders:
        raise ValueError(f"no run under {results / 'runs'}: --results says where they are")
    found = []
    for name in names:
        fitting = [one for one in folders if one.name.startswith(name) or one.name.rpartition("-")[2].startswith(name)]
        if len(fitting) != 1:
            raise ValueError(f"{name!r} names {len(fitting)} runs of {results}; {typed('analysis')} list shows all")
        found += fitting
    return found if names else folders


def shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def told(message: str) -> int:
    sys.stderr.write(printable(message) + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
