"""The command line of runs: compose a configuration, resolve it to settings, do one run (pdrop/runs/run.py).

    python run.py -m ratio=0.3,0.5,0.7 method=none,pyramiddrop,fastv,random

Heavy imports wait until a run really starts, so `--help` answers at once.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode

from pdrop.cli.choices import complaint, hint
from pdrop.cli.compose import CONF, RunConfig, settings_of
from pdrop.cli.overrides import misfit, shown
from pdrop.names import printable

log = logging.getLogger("pdrop")


class RunError(CompactHydraException):
    """A run that cannot start or did not finish: one line for the user, no traceback."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def job(cfg: Any) -> float | None:
    """One job of a sweep. Returns the mean of the main scores, for sweepers that optimise; `stop`s if it fails."""
    from pdrop.runs.run import RunFailed, mean_score, run

    try:
        # where the store lies is not part of a run: it may be moved. Sweeps escape colons, single runs need not
        overrides = [o.replace("\\:", ":") for o in HydraConfig.get().overrides.task if not o.startswith("results=")]
        if cfg.budget is not None and any(o.startswith("ratio=") for o in overrides):
            raise ValueError(f"budget={cfg.budget} finds the ratio: leave out ratio=")
        return mean_score(run(settings_of(cfg, HydraConfig.get().runtime.choices["method"]), overrides))
    except (ValueError, OSError, RunFailed) as error:
        log.debug("%s", traceback.format_exc())
        stop(str(error))


def stop(message: str) -> NoReturn:
    """End the job with one line. In a sweep the others go on; at its end Hydra names the first failure again.

    Raises:
        RunError: In a sweep.
    """
    message = printable(message)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(f"error: {message}")
    log.error("error: %s", message)
    raise RunError(f"error: {message}")


def check_dials(arguments: list[str], known: Iterable[str] | None = None) -> str | None:
    """A misspelt dial as one line that lists the right ones (`known`: another command's); None if all are known."""
    dials = list(known or [*(f.name for f in fields(RunConfig)), "experiments", "hydra"])
    for argument in arguments:
        dial = argument.split("=", 1)[0].lstrip("+~").split("@")[0].split(".")[0].split("/")[0]
        if "=" in argument and not argument.startswith("-") and dial not in dials:
            near = difflib.get_close_matches(dial, dials, 1)
            hint = f", did you mean {near[0]}?" if near else "."
            return f"error: there is no dial {dial!r}{hint} Dials: {', '.join(sorted(dials))}"
    return None


def called(job: Callable[[], Any], known: Iterable[str] | None, again: str) -> None:
    """Call a Hydra job as a command. The exit code is 0 only if every one of its jobs is done.

    Args:
        job: Reads sys.argv; an unknown dial or choice there gives one line instead.
        known: The command's dials; None: run.py's.
        again: What to do after an interrupt.
    """
    # on cores that others use too, OpenMP threads that spin while they wait cost ten times what they compute
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    if told := check_dials(sys.argv[1:], known):
        sys.exit(told)
    if told := complaint(sys.argv[1:], CONF):
        sys.exit(f"error: {told}")
    if told := misfit(sys.argv[1:], CONF, "run" if known is None else "train"):
        sys.exit(f"error: {told}")
    sys.argv[1:] = shown(sys.argv[1:])
    if known is None and (told := hint(sys.argv[1:], CONF)):
        print(told, file=sys.stderr)  # noqa: T201
    try:
        job()
    except KeyboardInterrupt:
        print(f"interrupted: {again}", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def main() -> None:
    if sys.argv[1:2] == ["rescore"]:
        from pdrop.cli.rescore import main as rescore

        sys.exit(rescore(sys.argv[2:]))
    called(job, None, "the same command goes on from here")


if __name__ == "__main__":
    main()
