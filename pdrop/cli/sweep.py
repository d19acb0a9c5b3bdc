"""A sweep of runs: its plan, which runs are done, its progress, and a summary.

Hydra's own sweeper starts every job of the product, including duplicates and runs that are done, and ends by repeating
the first failure. Here the store is read first: finished runs are not started, each run is done once, a line shows the
progress, and a summary ends the sweep. The jobs are launched by Hydra's configured launcher. Another sweeper (optuna,
for example) works as usual.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException, HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from pdrop.announcements import Announcement, alive, announced
from pdrop.cli.compose import CONF, settings_of
from pdrop.cli.fetch import refuse_missing
from pdrop.cli.overrides import first_line
from pdrop.commands import typed
from pdrop.names import printable
from pdrop.pace import duration
from pdrop.runs import cards, plan, remembered
from pdrop.runs.fleet import SWEEP, SweepPosition
from pdrop.runs.plan import Planned
from pdrop.runs.remembered import Known
from pdrop.runs.settings import Settings
from pdrop.store import holder, in_words, state, where
from pdrop.store import noted as noted_by

log = logging.getLogger("pdrop")

ASIDE = ("plan", "retry")  # dials that say what to do with runs, not which runs
# dials that say where a run is stored, how it is locked, which processes answer; no number depends on them
NOT_THE_RUN = ("results", "locks", "workers", "prefetch", "picture_cache")
BASIC = "BasicLauncher"  # Hydra's own, which does one job after another in this process
MEASURED = "prefill_ms"  # a budget that is met by timing
# whether a job waits for a process that does the same run
WAITS: ContextVar[bool] = ContextVar("waits", default=True)


class RunError(CompactHydraException):
    """A job that cannot start or did not finish: one line for the user."""


def dials_given(words: Sequence[str]) -> list[str]:
    """The names of the dials that overrides set."""
    return [word.lstrip("+~").split("=", 1)[0] for word in words]


def for_the_record(words: Sequence[str]) -> list[str]:
    """The overrides that say which run it is: without NOT_THE_RUN and ASIDE, and without a sweep's escaped colons."""
    given = [(word, dial.split(".")[0]) for word, dial in zip(words, dials_given(words))]
    kept = [word for word, dial in given if dial not in (*NOT_THE_RUN, *ASIDE)]
    return [word.replace("\\:", ":") for word in kept]


def resolve(cfg: DictConfig, hydra: Any) -> Settings:
    """The settings of a job, remembered for the next time.

    Args:
        cfg: The composed configuration, without Hydra's own.
        hydra: Hydra's own.

    Raises:
        ValueError: If something that was asked for does not exist or does not fit.
    """
    words = list(hydra.overrides.task)
    if cfg.retry not in (None, "failed"):
        raise ValueError(f"retry is failed, or null, not {cfg.retry!r}")
    if cfg.budget is not None and "ratio" in dials_given(words):
        raise ValueError(f"budget={cfg.budget} finds the ratio: leave out ratio=")
    refuse_missing(cfg)
    settings = settings_of(cfg, hydra.runtime.choices["method"])
    if (asked := memorable(words, hydra)) is not None and follows(cfg, settings):
        remembered.remember(asked, settings, CONF)
    return settings


def known(hydra: Any) -> Known | None:
    """What the overrides of a job were resolved to before, if nothing has changed since."""
    asked = memorable(list(hydra.overrides.task), hydra)
    return None if asked is None else remembered.recall(asked, CONF)


def memorable(words: Sequence[str], hydra: Any) -> list[str] | None:
    """The overrides that determine a run; None if it depends on more than these and conf/."""
    if any("${" in word or dial == "force" for word, dial in zip(words, dials_given(words))):
        return None
    if any(one.path and one.provider not in ("hydra", "main", "schema") for one in hydra.runtime.config_sources):
        return None
    return [word for word, dial in zip(words, dials_given(words)) if dial not in ASIDE]


def follows(cfg: DictConfig, settings: Settings) -> bool:
    """Whether settings follow from overrides and files only: nothing is measured, and no unknown code makes a part."""
    if str(cfg.budget).startswith(MEASURED):
        return False
    parts = [] if settings.method is None else settings.method.parts
    made = {f"{type(part).__module__}.{type(part).__qualname__}" for part in parts}
    targets = [str(node._target_) for node in (cfg.schedule, cfg.latency, cfg.method) if node is not None]
    return all(target.startswith("pdrop.") or target in made for target in targets)


# ---------------------------------------------------------------------- the sweep


def is_ours(hydra: Any) -> bool:
    """Whether `Sweep` does the sweep: not if another sweeper looks for the best run."""
    return bool(hydra.sweeper._target_ == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}")


class Sweep(Callback):
    """Does the sweep in place of Hydra's own sweeper: reads the store first, and prints a summary at the end."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Do what is not done yet, and exit: with 1 if something failed or was refused."""
        if not is_ours(config.hydra):
            return
        self.config, self.loader = config, GlobalHydra.instance().config_loader()
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        try:
            sys.exit(self.sweep())
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            log.debug("%s", traceback.format_exc())
            told = in_words(error, "results") if isinstance(error, OSError) else first_line(error)
            sys.exit(f"error: {printable(told)}")
        except Exception:  # Hydra would warn, and start the sweep again
            traceback.print_exc()
            sys.exit(1)

    def sweep(self) -> int:
        """Do the sweep; returns the exit code."""
        planned = self.planned()
        plan.estimate(planned)
        if self.config.plan:
            say(plan.lines(planned))
            return 0
        if self.config.retry is not None:
            planned = [one for one in planned if one.state in (*plan.AGAIN, "refused")]
            if not planned:
                say(["nothing to do again: no run has failed or stopped here"])
                return 0
        return self.do(planned)

    def do(self, planned: Sequence[Planned]) -> int:
        """Do the runs that are not done; returns the exit code."""
        from pdrop.runs.run import finished

        before = [one for one in planned if one.state == "done"]
        rest = [one for one in planned if one.state not in ("done", "refused")]
        say([plan.total(planned)])
        started, failed = time.monotonic(), [(one, one.error or "") for one in planned if one.state == "refused"]
        done: list[Planned] = []
        try:
            for one in before:
                assert one.run is not None
                finished(one.run, for_the_record(one.words))
            with noted(rest) as notes:
                for one, error in self.launched(rest, len(before), notes):
                    if error is None:
                        done.append(one)
                    else:
                        failed.append((one, error))
        finally:
            say(summary(planned, before, done, failed, time.monotonic() - started))
        return 1 if failed else 0

    def jobs(self) -> list[list[str]]:
        """The overrides of each job: of the product, or of the stored runs that are to be done again."""
        config, arguments = self.config, list(self.config.hydra.overrides.task)
        if config.retry is not None and alone(arguments):
            return again(Path(config.results), config.experiment, arguments)
        swept = [f"{name}={values}" for name, values in (config.hydra.sweeper.params or {}).items()]
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides([*swept, *arguments])
        return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]

    def planned(self) -> list[Planned]:
        """The different runs of the jobs, labelled with the overrides in which they differ."""
        jobs = self.jobs()
        same = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        runs = plan.different(self.job(words) for words in jobs)
        for one in runs:
            one.label = " ".join(for_the_record([word for word in one.words if word not in same]))
        return runs

    def job(self, words: Sequence[str]) -> Planned:
        """The run of a job: as remembered, or composed and resolved."""
        found = Planned(tuple(words))
        try:
            asked = memorable(words, self.config.hydra)
            found.run = None if asked is None else remembered.recall(asked, CONF)
            if found.run is None or (self.config.plan and not (found.run.folder / "record.json").is_file()):
                cfg = self.loader.load_sweep_config(self.config, list(words))
                hydra = cfg.hydra
                with open_dict(cfg):
                    del cfg["hydra"]
                found.force = bool(cfg.force)
                if str(cfg.budget).startswith(MEASURED):
                    return found
                found.run = resolve(cfg, hydra)
            found.record = record_of(found.run)
        except (ValueError, OSError) as error:
            log.debug("%s", traceback.format_exc())
            found.error = printable(str(error))
        return found

    def launched(
        self, rest: Sequence[Planned], before: int, notes: Sequence[Announcement]
    ) -> Iterator[tuple[Planned, str | None]]:
        """Yield each run and its failure, or None; one after another here, or as the launcher does it."""
        from pdrop.runs.run import RunHeld

        context = HydraContext(self.loader, Callbacks(self.config))
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task(), config=self.config
        )
        size = self.config.hydra.sweeper.max_batch_size or max(1, len(rest))
        if type(launcher).__name__ != BASIC:  # Hydra imports its plugins again: they are other classes
            cards.offer()
            for at in range(0, len(rest), size):
                part = rest[at : at + size]
                returned = launcher.launch([list(one.words) for one in part], initial_job_idx=at)
                yield from ((one, failure(job)) for one, job in zip(part, returned))
            return
        # it logs each launch of one job
        logging.getLogger(type(launcher).__module__).setLevel(logging.WARNING)
        whole, waiting, held = before + len(rest), deque(rest), 0
        while waiting:
            number = len(rest) - len(waiting)
            plan.estimate([*waiting])
            place = SweepPosition(before + number + 1, whole, plan.left(waiting), time.monotonic())
            for note in notes:
                note.tell(run=place.number, whole=whole, left=place.seconds, at=time.time())
            one = waiting.popleft()
            say([f"{place}: {one.label}"])
            # runs that another process is doing are tried again when the others are done, and then waited for
            patience, before_it = WAITS.set(held > len(waiting)), SWEEP.set(place)
            (job,) = launcher.launch([list(one.words)], initial_job_idx=number)
            WAITS.reset(patience)
            SWEEP.reset(before_it)
            if isinstance(job._return_value, RunHeld):
                by = where(holder(one.run.folder) or {}) if one.run is not None else ""
                say([f"another process{by} does it at the moment: it is looked at again at the end"])
                waiting.append(one)
                held += 1
                continue
            held, told = 0, failure(job)
            del job  # with an error's traceback the frames of the failed run, and with them its model, would stay
            yield one, told


def task() -> Any:
    """The function of each job; imported when a sweep starts, since its module needs this one."""
    from pdrop.cli.run import job

    return job.__wrapped__


def failure(job: JobReturn) -> str | None:
    """Why a job failed, in a line; None if it is done. Errors other than our own refusals are shown in full."""
    if job.status == JobStatus.COMPLETED:
        return None
    error = job._return_value  # reading `return_value` prints the overrides and raises
    if not isinstance(error, RunError):
        traceback.print_exception(error)
        return f"{type(error).__name__}: {error}"
    return str(error)


def record_of(run: Settings | Known) -> Any:
    """The stored record of a run; None if there is none.

    Raises:
        ValueError: If it cannot be read.
    """
    from pdrop.record import RunRecord

    return RunRecord.read(run.folder) if (run.folder / "record.json").is_file() else None


def alone(arguments: Sequence[str]) -> bool:
    """Whether no run is named: then retry=failed means all failed runs of the store."""
    return {dial.split(".")[0] for dial in dials_given(arguments)} <= {"experiment", "hydra", *NOT_THE_RUN, *ASIDE}


def again(results: Path, experiment: str | None, arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of the store's failed and stopped runs, of one experiment or of all.

    Raises:
        ValueError: If a record cannot be read.
    """
    from pdrop.record import RunRecord

    given = [word for word, dial in zip(arguments, dials_given(arguments)) if dial.split(".")[0] in NOT_THE_RUN]
    found = []
    for path in sorted(results.glob("runs/*/record.json")):
        asked = experiment is None or (results / "experiments" / experiment / path.parent.name).exists()
        record = RunRecord.read(path.parent)
        if asked and state(path.parent, record.status, record.error) in plan.AGAIN:
            found.append([*record.command[1:], *given])
    return found


@contextmanager
def noted(rest: Sequence[Planned]) -> Iterator[list[Announcement]]:
    """Note in the store what a sweep has still to do, for python -m analysis status. A kill leaves the note."""
    runs = {one.run.spec.folder: [one.label or "one run"] for one in rest if one.run is not None}
    stores = {one.run.results for one in rest if one.run is not None}
    name = sha256(json.dumps(sorted(runs)).encode()).hexdigest()[:12]
    paths = [store / "sweeps" / f"{name}-{secrets.token_hex(4)}.json" for store in sorted(stores)]
    with ExitStack() as held:
        notes = []
        for path in paths:
            for old in path.parent.glob(f"{name}*.json"):  # left by a start that was killed; others may share the work
                if not alive(old):
                    old.unlink(missing_ok=True)
            notes.append(held.enter_context(announced(path, {"runs": runs})))
        yield notes
        for path in paths:
            tidy(path.parent)


def tidy(folder: Path) -> None:
    """Remove the notes of killed sweeps whose runs have been finished since."""
    for path in folder.glob("*.json"):
        runs = noted_by(path).get("runs")
        left = not isinstance(runs, dict) or not all(
            (folder.parent / "runs" / name / "record.json").is_file() for name in runs
        )
        if not left and not alive(path):
            path.unlink(missing_ok=True)


def summary(
    planned: Sequence[Planned],
    before: Sequence[Planned],
    done: Sequence[Planned],
    failed: Sequence[tuple[Planned, str]],
    seconds: float,
) -> Iterator[str]:
    """The end of a sweep in words: counts, the failures with their reasons, and how to get the table."""
    left = len(planned) - len(before) - len(done) - len(failed)
    parts = [f"{len(done)} done in {duration(seconds)}", f"{len(before)} done before"]
    refused = sum(one.error is not None for one, _ in failed)
    parts += [f"{len(failed) - refused} failed"] if len(failed) > refused else []
    parts += [f"{refused} refused"] if refused else []
    parts += [f"{left} not started"] if left else []
    yield f"{len(planned)} run{'s' * (len(planned) != 1)}: {', '.join(parts)}"
    for one, error in failed:
        yield f"{'refused' if one.error else 'failed'}  {one.label}: {error.removeprefix('error: ')}"
    if any(one.error is None for one, _ in failed):
        yield "the same command, or retry=failed, does what has failed again, and nothing that is done"
    named = {
        (one.run.experiment, one.run.results)
        for one in planned
        if one.run is not None and (one in done or one in before)
    }
    for experiment, results in sorted(named, key=str):
        if experiment is not None:
            store = "" if str(results) == "results" else f" --results {results}"
            yield f"table: {typed('analysis')} tables {experiment}{store}"


def say(lines: Sequence[str] | Iterator[str]) -> None:
    """Lines for the user."""
    for line in lines:
        log.info("%s", printable(line))
