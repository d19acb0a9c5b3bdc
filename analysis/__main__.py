"""Tables, figures and answers from run records. Needs no torch and no GPU.

    python -m analysis tables [NAME ...]     results/tables/NAME.md, .csv, .tex; prints the Markdown grids
    python -m analysis banner [NAME ...]     results/tables/NAME-banner.md, .tex: the tables that papers print
    python -m analysis figures [NAME ...]    results/figures/NAME-tradeoff.png, and one panel per task (--pdf)
    python -m analysis overlay RUN_ID ...    the image with the patches that were kept, or a map of attention
    python -m analysis repro                 results/tables/repro.md, .csv: our numbers next to the papers'
    python -m analysis report                results/report.html: tables, figures, samples, records in one page
    python -m analysis readme                README.md, docs/results.md: tables, figures and findings, from this store
    python -m analysis hard NAME             scores on the samples that a control (--control) gets wrong
    python -m analysis bench                 results/tables/bench.md, bench_choosing.md: newest records of make bench*
    python -m analysis trainings             tables/trainings.md, figures/trainings.*: costs and results of trainings
    python -m analysis list                  every run: status, method, schedule, mean score
    python -m analysis status                what runs and sweeps are doing, what failed and why, what waits
    python -m analysis explain RUN_ID        where a run's numbers come from
    python -m analysis diff RUN_A RUN_B      why two runs differ
    python -m analysis samples RUN_ID TASK   a run's samples of a task as JSON lines
    python -m analysis condense              convert samples of the older form into the compact one; nothing is lost

NAME is an experiment (a folder of results/experiments/) or "all"; without one, every experiment, or "all" if there is
none. An experiment whose runs cannot be in one table is refused, with the remedy (one table per model, for example);
"all" is split into tables of comparable runs. --results results/reference reads the store that pdrop ships. Files are
written into --out; without it into the store that is read, or into results/ if that is the shipped one or cannot be
written to. They are written only if their content changed, figures only if their records did. Exit code 1 if something
was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pdrop.names import printable
from pdrop.samples import condense, read_samples, sample_lines, samples_files, verify

from .arguments import own, parse
from .comparison.comparable import parts, refuse_mixtures
from .comparison.compare import compare
from .comparison.table_model import Table
from .grid import Grid
from .report import explain, readme
from .store import status, up_to_date
from .store.load import ALL, Experiment, Run, experiments, load_experiment, load_runs, newest
from .store.publish import publish
from .studies import bench, break_even, repro, trainings
from .tables import banner
from .tables.csv_export import csv
from .tables.footnotes import warnings
from .tables.latex import COMPACT, Wishes, latex, macros
from .tables.table import grids, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit code."""
    options = parse(arguments, __doc__)
    results: Path = options.results
    unreadable: list[str] = []
    try:
        code = run_command(options, results, options.out or own(results), unreadable)
    except ValueError as error:
        code = 1
        sys.stderr.write(printable(f"{error}\n"))
    except BrokenPipeError:
        raise
    except OSError as error:
        code = 1
        where = error.filename or "standard output"
        sys.stderr.write(printable(f"{where}: {error.strerror}\n"))
    for line in dict.fromkeys(unreadable):
        sys.stderr.write(printable(f"{line}\n"))
    return 1 if unreadable else code


def run_command(options: argparse.Namespace, results: Path, out: Path, unreadable: list[str]) -> int:
    """Do what the command line says; returns the exit code.

    Args:
        options: The command line.
        results: The store.
        out: The folder for files.
        unreadable: Gets the messages about records that cannot be read, for commands that can do without them.

    Raises:
        ValueError: If something is refused.
    """
    command = options.command
    if command in ("tables", "banner", "figures"):
        return make(options, results, out)
    if command in ("list", "explain", "diff", "samples"):
        show(options, load_runs(results, unreadable))
    elif command == "status":
        say(status.page(results))
    elif command == "condense":
        write_condensed(results)
    elif command == "overlay":
        runs = chosen(named_runs(results, options.runs, unreadable), options.method, options.budget)
        write_overlays(runs, options, out / "figures")
    elif command == "report":
        write_report(options, results, out, unreadable)
    elif command == "readme":
        made: dict[str, Table] = {}
        pages = [(path, readme.written(path, results, made)) for path in options.readme or readme.PAGES]
        for path, text in pages:
            report(path, text.encode())
    elif command == "hard":
        write_hard(results, options.name, options.control, out / "tables")
    elif command == "repro":
        write_repro(newest(load_runs(results, unreadable))[0], out / "tables")
    elif command == "bench":
        for name, page in bench.pages(results).items():
            write_page(page, out / "tables" / f"{name}.md")
    elif command == "trainings":
        write_trainings(options, results, out)
    return 0


def show(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Print what was asked about one run, two or all."""
    if options.command == "list":
        say(explain.overview(runs))
        return
    run = explain.find(runs, options.run)
    if options.command == "explain":
        say(explain.explain(run))
    elif options.command == "diff":
        say(explain.diff(run, explain.find(runs, options.other)))
    else:
        verify(run.path, run.record.samples_digest)
        lines = sample_lines(read_samples(run.path, options.task))
        say("".join(one if printable(one) == one else json.dumps(one)[1:-1] for one in lines))  # so that it stays JSON


def make(options: argparse.Namespace, results: Path, out: Path) -> int:
    """Make tables or figures; if an experiment is refused, the others are made all the same."""
    command, strict = options.command, options.strict
    times = not options.no_times and command != "banner"  # which shows none
    pdf = command == "figures" and options.pdf
    refused, pages = 0, []
    for name in options.names or experiments(results) or [ALL]:
        tables, made_from, kept_out = [], "", refused
        try:
            experiment = load_experiment(results, name)
            if break_even.shown_here(experiment) and command == "banner":
                continue
            if break_even.shown_here(experiment):
                pages.append(write_break_even(experiment, command, out, pdf))
                continue
            if command == "figures":
                made_from = up_to_date.digest(experiment, [strict, times, pdf])
                if paths := up_to_date.unchanged(out / "figures", name, made_from):
                    pages += [f"unchanged {path}\n" for path in paths]
                    continue
            for part in parts(experiment, times):
                try:
                    refuse_mixtures(experiment, part.runs, times=part.times, strict=strict)
                    tables.append(compare(part, experiment.superseded))
                except ValueError as error:
                    sys.stderr.write(printable(f"{part.title}: {error}\n"))
                    refused = 1
        except ValueError as error:
            sys.stderr.write(printable(f"{name}: {error}\n"))
            refused = 1
        if tables and command == "tables":
            pages.append(write_tables(name, tables, out / "tables", options))
        if tables and command == "banner":
            pages.append(write_banner(name, tables, out / "tables"))
        if command == "figures":
            drawn = [one for table in tables for one in write_figures(table, out / "figures", pdf)]
            if refused == kept_out:
                up_to_date.remember(out / "figures", name, made_from, drawn)
    say("".join(pages))
    return refused


def write_tables(name: str, tables: Sequence[Table], folder: Path, options: argparse.Namespace) -> str:
    """Write the three files, and with --macros one of LaTeX commands; returns what to print."""
    named = tuple(head.strip() for head in options.columns.split(",") if head.strip())
    wishes = Wishes(named or (COMPACT if options.compact else ()), options.caption)
    contents = [(".md", markdown(tables)), (".csv", csv(tables)), (".tex", latex(tables, wishes))]
    contents += [("-macros.tex", macros(tables))] if options.macros else []
    written = [written_or_not(folder / f"{name}{suffix}", content.encode()) for suffix, content in contents]
    text = []
    for table in tables:
        text += [f"! {warning}\n" for warning in warnings(table)]
        text += [f"\n{table.title}: {grid.title}\n\n{shown(grid)}" for grid in grids(table)]
    return "".join([*text, "\n", *written])


def shown(grid: Grid) -> str:
    """The grid's Markdown; on a narrower terminal in parts, one below the other."""
    parts = grid.folded(shutil.get_terminal_size().columns) if sys.stdout.isatty() else [grid]
    return "\n".join(part.markdown() for part in parts)


def write_banner(name: str, tables: Sequence[Table], folder: Path) -> str:
    """Write both files; returns what to print."""
    page = banner.markdown(tables)
    contents = (("md", page), ("tex", banner.latex(tables)))
    written = [written_or_not(folder / f"{name}-banner.{suffix}", text.encode()) for suffix, text in contents]
    return "".join([page, "\n", *written])


def write_hard(results: Path, name: str, control: str, folder: Path) -> None:
    """Write NAME-hard.md and .csv, and print the first.

    Raises:
        ValueError: If the experiment's runs cannot be in one table, or there is no control among them.
    """
    from .studies import hard_subset

    experiment = load_experiment(results, name)
    for part in parts(experiment, times=False):
        refuse_mixtures(experiment, part.runs, times=False)
        table = compare(part, experiment.superseded)
        found = hard_subset.hard(table, control)
        page = hard_subset.markdown(table, found)
        files = ((".md", page), (".csv", hard_subset.csv(found)))
        written = [written_or_not(folder / f"{part.stem}-hard{end}", text.encode()) for end, text in files]
        say("".join([page, "\n", *written]))


def write_figures(table: Table, folder: Path, pdf: bool) -> list[tuple[str, bytes]]:
    """Write the figures; returns a line for each file, written or unchanged."""
    from .studies import (
        attention_figure,
        front_figure,
        models_figure,
        overlap_figure,
        redundancy_figure,
        task_grid_figure,
        tradeoff_figure,
    )

    curves = (tradeoff_figure, front_figure, task_grid_figure, redundancy_figure)
    kinds = (*curves, models_figure, overlap_figure, attention_figure)
    drawn = write_drawn((one for kind in kinds for one in kind.files(table)), folder, pdf)
    if not drawn:
        say(f"{table.title}: no finished run that drops tokens, hence no trade-off to draw\n")
    return drawn


def write_drawn(
    drawn: Iterable[tuple[str, Figure]], folder: Path, pdf: bool, photographs: bool = False
) -> list[tuple[str, bytes]]:
    """Write figures; returns a line for each. A PDF that was not drawn again with its figure is removed."""
    from .drawing import saved

    made = list(saved(drawn, pdf, photographs))
    for name, content in made:
        report(folder / name, content)
        older = (folder / name).with_suffix(".pdf")
        if not pdf and older.is_file():
            older.unlink()
            say(f"removed {older}: --pdf draws it anew\n")
    return made


def write_break_even(experiment: Experiment, command: str, out: Path, pdf: bool) -> str:
    """Write the table or the figure of an experiment about answers' times; returns what to print."""
    if command == "tables":
        text = break_even.page(experiment)
        return f"\n{text}\n{written_or_not(out / 'tables' / f'{experiment.name}.md', text.encode())}"
    from .studies import break_even_figure

    write_drawn(break_even_figure.files(experiment), out / "figures", pdf)
    return ""


def write_report(options: argparse.Namespace, results: Path, out: Path, unreadable: list[str]) -> None:
    """Write report.html, unless it is there and made from the same input."""
    figures = [out / "figures", results / "figures"]
    made_from = up_to_date.of_report(results, figures, options.images, options.samples)
    if up_to_date.unchanged(out, "report", made_from):
        say(f"unchanged {out / 'report.html'}\n")
        return
    from .report.page import page

    content = page(results, options.images, options.samples, figures, unreadable).encode()
    report(out / "report.html", content)
    if not unreadable:  # the messages are printed each time
        up_to_date.remember(out, "report", made_from, [("report.html", content)])


def write_trainings(options: argparse.Namespace, results: Path, out: Path) -> None:
    """Write the page and the figures, unless they are there and made from the same input; print the page."""
    made_from = up_to_date.of_trainings(results, [options.pdf])
    if paths := up_to_date.unchanged(out, "trainings", made_from):
        (page,) = (path for path in paths if path.suffix == ".md")
        say("".join([f"{page.read_text(encoding='utf8')}\n", *(f"unchanged {path}\n" for path in paths)]))
        return
    from .studies import trained_figure

    text = trainings.page(results)
    write_page(text, out / "tables" / "trainings.md")
    drawn = write_drawn(trained_figure.files(results), out / "figures", options.pdf)
    held = [("tables/trainings.md", text.encode()), *((f"figures/{name}", content) for name, content in drawn)]
    up_to_date.remember(out, "trainings", made_from, held)


def write_overlays(runs: Sequence[Run], options: argparse.Namespace, folder: Path) -> None:
    from .overlays import overlay

    write_drawn(overlay.files(runs, options.sample, options.images), folder, options.pdf, photographs=True)


def write_condensed(results: Path) -> None:
    """Condense the samples of every run, and print how much smaller they became.

    Raises:
        ValueError: If a file is not a samples file; the files before it have been condensed.
    """
    before = sum(path.stat().st_size for run in load_runs(results) for path in samples_files(run.path))
    replaced = [path for run in load_runs(results) for path in condense(run.path)]
    questions = list((results / "questions").glob("*.jsonl.gz"))
    after = [*questions, *(path for run in load_runs(results) for path in samples_files(run.path))]
    size = sum(path.stat().st_size for path in after)
    say(f"{len(replaced)} files condensed: {before / 1e6:.1f} MB of samples became {size / 1e6:.1f}\n")


def named_runs(results: Path, names: Sequence[str], unreadable: list[str]) -> list[Run]:
    """The runs of these ids; an experiment's name means its finished runs that rank or drop."""
    runs = load_runs(results, unreadable)
    found: list[Run] = []
    for name in names:
        if name in experiments(results):
            found += [run for run in load_experiment(results, name, unreadable).runs if run.done and run.drops]
        else:
            found.append(explain.find(runs, name))
    return found


def chosen(runs: Sequence[Run], methods: Sequence[str], budgets: Sequence[str]) -> list[Run]:
    """The runs of these methods, at these budgets (a ratio, budget or schedule, as asked for or as resolved).

    Raises:
        ValueError: If there is none.
    """
    found = [run for run in runs if not methods or run.record.spec.method in methods]
    found = [
        run
        for run in found
        if not budgets or not {*run.overrides.values(), run.record.spec.schedule}.isdisjoint(budgets)
    ]
    if not found:
        there = sorted({f"{run.record.spec.method} at {run.record.spec.schedule}" for run in runs})
        raise ValueError(f"no run of that method and budget; there are: {', '.join(there)}")
    return found


def write_repro(runs: Sequence[Run], folder: Path) -> None:
    """Write both files and print the page."""
    published = repro.read_published()
    verdicts = repro.compare(published, runs)
    text = repro.page(verdicts, published)
    say(text)
    report(folder / "repro.md", text.encode())
    report(folder / "repro.csv", repro.table(verdicts).encode())


def write_page(text: str, path: Path) -> None:
    """Print a page and publish it."""
    say(f"{text}\n")
    report(path, text.encode())


def report(path: Path, content: bytes) -> None:
    """Publish a file and print a line about it."""
    say(written_or_not(path, content))


def written_or_not(path: Path, content: bytes) -> str:
    """Publish a file; returns the line about it."""
    return f"{'wrote' if publish(path, content) else 'unchanged'} {path}\n"


def say(text: str) -> None:
    """Put text on standard output."""
    sys.stdout.write(printable(text))


def command_line() -> int:
    """`main`; it is no error if the reader closes the pipe (`| head`): all files are written before that."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 0


if __name__ == "__main__":
    sys.exit(command_line())
