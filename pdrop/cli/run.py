"""The command line of runs: compose a configuration, resolve it to settings, do one run (pdrop/runs/run.py).

    python run.py -m ratio=0.3,0.5,0.7 method=none,pyramiddrop,fastv,random

Heavy imports wait until a run really starts, so `--help` is fast.
"""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from pdrop.cli import sweep
from pdrop.cli.choices import complaint, hint
from pdrop.cli.compose import CONF, RunConfig
from pdrop.cli.overrides import first_line, flags_first, misfit, shown, spelled_out
from pdrop.command_help import row
from pdrop.commands import as_typed
from pdrop.garbage import not_collected
from pdrop.names import printable
from pdrop.pace import on_a_terminal
from pdrop.store import in_words

log = logging.getLogger("pdrop")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def job(cfg: Any) -> float | None:
    """Do one job of a sweep. Returns the mean of the main scores, for sweepers that optimise; `stop`s if it fails."""
    with not_collected():
        from pdrop.runs import cards, plan
        from pdrop.runs.run import RunFailed, finished, mean_score, run

    try:
        node = HydraConfig.get()
        if node.mode == RunMode.MULTIRUN and not str(node.launcher._target_).endswith(sweep.BASIC):
            cards.claim()  # for concurrent jobs: before torch looks for GPUs
        overrides = sweep.for_the_record(node.overrides.task)
        found = None if cfg.plan else sweep.known(node)
        if found is not None and (record := finished(found, overrides)) is not None:
            return mean_score(record)
        with not_collected():  # it imports torch
            settings = sweep.resolve(cfg, node)
        planned = plan.Planned(tuple(overrides), settings, sweep.record_of(settings), settings.force)
        if cfg.plan:
            plan.estimate([planned])
            sweep.say(plan.lines([planned]))
            return None
        if cfg.retry is not None and planned.state not in plan.AGAIN:
            sweep.say([f"nothing to do again: this run is {planned.state}"])
            return None
        return mean_score(run(settings, overrides, wait=sweep.WAITS.get()))
    except OmegaConfBaseException as error:  # a value that only the user can give
        stop(f"{first_line(error)}; model=folder takes model.name=NAME model.path=FOLDER")
    except (ValueError, OSError, RunFailed) as error:
        log.debug("%s", traceback.format_exc())
        stop(in_words(error, "results") if isinstance(error, OSError) else str(error))


def stop(message: str) -> NoReturn:
    """End the job with one line. In a sweep the other jobs continue, and the summary has the line.

    Raises:
        RunError: In a sweep.
    """
    message = printable(message)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(f"error: {message}")
    if not sweep.is_ours(HydraConfig.get()):  # Hydra names only the first failure
        log.error("error: %s", message)
    raise sweep.RunError(f"error: {message}")


def check_dials(arguments: list[str], known: Iterable[str] | None = None) -> str | None:
    """One line about a misspelt dial that lists all dials (`known`: another command's); None if all are known."""
    dials = list(known or [*(f.name for f in fields(RunConfig)), "experiments", "hydra"])
    for argument in arguments:
        dial = argument.split("=", 1)[0].lstrip("+~").split("@")[0].split(".")[0].split("/")[0]
        if not dial:
            return f"error: {argument!r} is not a dial: write name=value"
        if "=" in argument and not argument.startswith("-") and dial not in dials:
            near = difflib.get_close_matches(dial, dials, 1)
            hint = f", did you mean {near[0]}?" if near else "."
            return f"error: there is no dial {dial!r}{hint} Dials: {', '.join(sorted(dials))}"
    return None


def unwritable(arguments: list[str]) -> str | None:
    """Why Hydra cannot store its note of a command (config, overrides, log), in a line; None if it can."""
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    dial, usual = ("hydra.sweep.dir", "multirun") if sweeps else ("hydra.run.dir", "outputs")
    named = any(argument.startswith(dial) for argument in arguments)
    if named or any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments):
        return None
    folder = Path(usual) if Path(usual).is_dir() else Path()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        here = folder.absolute()
        return f"{here} cannot be written ({error.strerror}), and Hydra keeps its note of a command there: {dial}=DIR"
    return None


def print_help(config: str) -> None:
    """Print the help of a file of conf/, folded to the terminal's width.

    Hydra's own --help lists every group that it knows before it prints this text, which takes three times as long.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        text = hydra.compose(config, return_hydra_config=True).hydra.help.template
    text = as_typed(text)
    width = max(60, shutil.get_terminal_size().columns)
    try:
        sys.stdout.writelines(f"{row(line, width)}\n" for line in text.splitlines())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end


def called(job: Callable[[], Any], known: Iterable[str] | None, again: str) -> None:
    """Call a Hydra job as a command. The exit code is 0 only if all of its jobs are done.

    Args:
        job: Reads sys.argv; an unknown dial or choice there gives one line instead.
        known: The command's dials; None: run.py's.
        again: What the user can do after an interrupt.
    """
    # on cores that others use, too, OpenMP threads that spin while they wait cost ten times what they compute
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # pandas' helper says how many threads it takes
    if not on_a_terminal():  # a bar there would be one endless line; progress is logged in lines
        os.environ.setdefault("TQDM_DISABLE", "1")
    sys.argv[1:] = spelled_out(sys.argv[1:])
    sys.argv[1:] = flags_first(sys.argv[1:])
    if told := check_dials(sys.argv[1:], known):
        sys.exit(told)
    if told := complaint(sys.argv[1:], CONF):
        sys.exit(f"error: {told}")
    config = "run" if known is None else "train"
    if told := misfit(sys.argv[1:], CONF, config):
        sys.exit(f"error: {told}")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print_help(config)
        return
    sys.argv[1:] = shown(sys.argv[1:])
    if told := unwritable(sys.argv[1:]):
        sys.exit(f"error: {told}")
    if known is None and "retry=failed" in sys.argv[1:] and sweep.alone(sys.argv[1:]):
        sys.argv.append("hydra.mode=MULTIRUN")
    if known is None and (told := hint(sys.argv[1:], CONF)):
        print(told, file=sys.stderr)  # noqa: T201
    logging.raiseExceptions = False  # if the terminal is gone or the log's disk full, a run continues
    try:
        job()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"interrupted: {again}", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'standard output'}: {error.strerror}")


def main() -> None:
    if sys.argv[1:2] == ["fetch"]:
        from pdrop.cli.fetch import main as fetch

        sys.exit(fetch(sys.argv[2:]))
    if sys.argv[1:2] == ["rescore"]:
        from pdrop.cli.rescore import main as rescore

        sys.exit(rescore(sys.argv[2:]))
    called(job, None, "the same command resumes from here")


if __name__ == "__main__":
    main()
