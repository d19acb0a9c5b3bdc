"""The command line of the analysis, and the folder that its files are written to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pdrop.command_help import CommandHelp
from pdrop.commands import as_typed, typed

from .report.readme import PAGES

SHIPPED = Path(__file__).resolve().parent.parent / "results" / "reference"


def own(results: Path) -> Path:
    """The default folder for files: the store, if it is the user's own and writable."""
    shipped = results.resolve() in (SHIPPED, Path("results/reference").resolve())
    return Path("results") if shipped or (results.is_dir() and not os.access(results, os.W_OK)) else results


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The command line of `python -m analysis`."""
    described = as_typed(description or "")
    parser = argparse.ArgumentParser(typed("analysis"), description=described, formatter_class=CommandHelp)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results/")
    where = "where files are written; default: that store, or results/ if it is not yours to write to"
    common.add_argument("--out", type=Path, default=None, metavar="DIR", help=where)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--pdf", action="store_true", help="draw figures as PDF, too")
    made = {
        "tables": "Markdown, CSV and LaTeX tables",
        "banner": "the tables that papers print, in both conventions",
        "figures": "figures, PNG",
    }
    for name, text in made.items():
        command = commands.add_parser(name, parents=[common, drawn] if name == "figures" else [common], help=text)
        command.add_argument("names", nargs="*", metavar="NAME", help='experiments, or "all" for the whole store')
        strict = "refuse uncommitted changes even where all runs have the same"
        command.add_argument("--strict", action="store_true", help=strict)
        command.add_argument(
            "--no-times", action="store_true", help="leave times out; several commits may then be mixed"
        )
        if name == "tables":
            for_papers(command)
    commands.add_parser("list", parents=[common], help="every run in a line")
    commands.add_parser("status", parents=[common], help="what runs and sweeps are doing, what failed, what waits")
    command = commands.add_parser("overlay", parents=[common, drawn], help="the image with the patches that were kept")
    command.add_argument("runs", nargs="+", metavar="RUN_ID")
    command.add_argument("--method", action="append", default=[], metavar="NAME", help="only runs of this method")
    told = "only runs at this ratio, budget or schedule"
    command.add_argument("--budget", action="append", default=[], metavar="TEXT", help=told)
    command.add_argument("--sample", action="append", default=[], metavar="TASK:DOC_ID", help="default: one per task")
    command.add_argument(
        "--images", type=Path, metavar="PATH", help="parquet file or folder of images; see pictures.py"
    )
    command = commands.add_parser("report", parents=[common], help="one HTML page of everything")
    command.add_argument("--images", type=Path, metavar="PATH", help="parquet file or folder of images")
    command.add_argument("--samples", type=int, default=10_000, metavar="N", help="the most answers that it holds")
    command = commands.add_parser("readme", parents=[common], help="renew the results in README.md and docs/")
    where = f"a page that holds results; default: {', '.join(map(str, PAGES))}"
    command.add_argument("--readme", type=Path, action="append", metavar="PATH", help=where)
    command = commands.add_parser("hard", parents=[common], help="scores on the samples that a control gets wrong")
    command.add_argument("name", metavar="NAME", help="an experiment")
    command.add_argument("--control", default="uniform", metavar="METHOD", help="or a run id; default: uniform")
    commands.add_parser("bench", parents=[common], help="the newest record of make bench as a page")
    commands.add_parser("trainings", parents=[common, drawn], help="costs and results of trainings, as a page")
    commands.add_parser("repro", parents=[common], help="our numbers next to the papers'")
    command = commands.add_parser("explain", parents=[common], help="where a run's numbers come from")
    command.add_argument("run", metavar="RUN_ID")
    command = commands.add_parser("diff", parents=[common], help="why two runs differ")
    command.add_argument("run", metavar="RUN_A")
    command.add_argument("other", metavar="RUN_B")
    command = commands.add_parser("samples", parents=[common], help="a run's samples of a task as JSON lines")
    command.add_argument("run", metavar="RUN_ID")
    command.add_argument("task", metavar="TASK")
    commands.add_parser("condense", parents=[common], help="convert samples of the older form into the compact one")
    return parser.parse_args(arguments)


def for_papers(command: argparse.ArgumentParser) -> None:
    """The options of LaTeX tables."""
    command.add_argument("--compact", action="store_true", help="LaTeX: five columns")
    command.add_argument("--columns", default="", metavar="HEADS", help="LaTeX: these columns, with commas")
    command.add_argument("--caption", default="", metavar="TEXT", help="LaTeX: instead of the one that is made")
    command.add_argument("--macros", action="store_true", help=r"LaTeX: NAME-macros.tex, \newcommand per number")
