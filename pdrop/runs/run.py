"""One run of a sweep: skip it if it is done, else execute it and write its record.

Takes settings and makes a RunRecord and a folder under results/runs/. A finished run is skipped; a killed run resumes
from its stored answers; a run that fails keeps its error and raises.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdrop.commands import typed
from pdrop.environment import environment
from pdrop.evaluation.answers import described
from pdrop.garbage import not_collected
from pdrop.pace import duration
from pdrop.record import RunRecord
from pdrop.runs.device import out_of_memory
from pdrop.runs.measured import measure
from pdrop.runs.remembered import Known
from pdrop.runs.settings import Settings
from pdrop.samples import digest
from pdrop.store import (
    Held,
    Hold,
    holder,
    in_words,
    locked,
    mark,
    refuse_links,
    refuse_unwritable,
    remove_leftovers,
    stored_answers,
    tidy,
)

if TYPE_CHECKING:
    from pdrop.models.checkpoint import Checkpoint

log = logging.getLogger("pdrop")


class RunHeld(RuntimeError):
    """Another process is executing the run."""


class RunFailed(RuntimeError):
    """A run that started and did not finish; its record holds the traceback."""


def run(settings: Settings, overrides: Sequence[str] = (), wait: bool = True) -> RunRecord:
    """Execute one run, or return its record if it is done.

    Args:
        settings: What to run (pdrop/runs/settings.py).
        overrides: The command line's overrides, for the record.
        wait: If another process is executing it, wait until it is done, or resume it if that process is killed.

    Raises:
        ValueError: If the model cannot be loaded as asked, or the run's folder is or contains a link; nothing has been
            written then.
        OSError: If the store cannot be written to; nothing has been loaded then.
        RunHeld: If another process is executing it and `wait` is false; usually nothing has been loaded then.
        RunFailed: If the run failed; its record has status "failed" and the traceback.
    """
    refuse_links(settings.folder)
    if (done := finished(settings, overrides, settings.force)) is not None:
        return done
    if not wait and holder(settings.folder) is not None:
        raise RunHeld(settings.spec.folder)
    refuse_unwritable(settings.folder)
    if settings.task_folders:
        from pdrop.evaluation.lmms import check_data

        check_data(settings.spec.tasks, settings.task_folders, settings.spec.task_files)
    checkpoint = None
    if settings.timed_alone and not settings.elsewhere:
        settings.source.check(settings.device)
    elif settings.source.loadable and not settings.elsewhere:
        with not_collected():
            checkpoint = settings.load()
    try:
        with locked(settings.folder, wait, settings.locks, answered=stored_answers(settings.folder)) as held:
            # another process may have finished it while this one loaded or waited
            return finished(settings, overrides, settings.force) or start(settings, checkpoint, overrides, held)
    except Held as error:
        if wait:  # it was taken over: another process is executing it, or has finished it
            return run(settings, overrides, wait)
        raise RunHeld(settings.spec.folder) from error


def finished(run: Settings | Known, overrides: Sequence[str], force: bool = False) -> RunRecord | None:
    """The run's record if it is done and not to be repeated. `force` repeats a run once per process.

    Raises:
        ValueError: If the record cannot be read.
    """
    if not (run.folder / "record.json").exists() or (force and run.spec.run_id not in redone):
        return None
    record = RunRecord.read(run.folder)
    if record.status != "done":
        return None
    note(run, overrides)
    log.info("done already  %s", summary(record, run.spec.run_id))
    return record


redone: set[str] = set()  # runs that this process has repeated because of force=true


def start(settings: Settings, checkpoint: Checkpoint | None, overrides: Sequence[str], held: Hold) -> RunRecord:
    """Execute the run, from stored answers if there are any. Without a checkpoint, workers or fresh processes load it,
    or only the cost is counted."""
    spec, folder = settings.spec, settings.folder
    if settings.force:
        (folder / "answers.jsonl").unlink(missing_ok=True)
        redone.add(spec.run_id)
    remove_leftovers(folder)
    tidy(settings.results)
    note(settings, overrides)
    record = RunRecord(spec, "running", started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    record.environment, record.command = (
        environment("cpu" if settings.elsewhere else settings.device),
        [typed("run").split()[-1], *overrides],
    )
    if settings.published_sampling is not None:
        record.environment["published_sampling"] = settings.published_sampling
    if settings.turned:
        record.environment["turned"] = list(settings.turned)
    record.write(folder)
    log.info("running       %s  %s", f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]", folder)
    started = time.perf_counter()
    try:
        measure(record, settings, checkpoint)
    except BaseException as error:  # also an interrupt: the record must not say "running" for ever
        held.check()  # do not overwrite the record of a process that has taken over the run
        record.status, record.error, record.wall_s = "failed", traceback.format_exc(), time.perf_counter() - started
        record.write(folder)
        if isinstance(error, KeyboardInterrupt):
            raise
        told = in_words(error, "results") if isinstance(error, OSError) else described(error)
        if out_of_memory(error) and "batch_size" not in told:
            told += "; use a smaller batch_size, or see in nvidia-smi who else holds memory"
        raise RunFailed(f"{spec.folder} failed: {told} (traceback in {folder}/record.json)") from error
    held.check()
    record.status, record.wall_s, record.samples_digest = "done", time.perf_counter() - started, digest(folder)
    record.write(folder)
    log.info("done          %s", summary(record, f"({duration(record.wall_s)})"))
    return record


def note(run: Settings | Known, overrides: Sequence[str]) -> None:
    """Record that the experiment asked for this run."""
    if run.experiment is not None:
        mark(run.results, run.experiment, run.spec.folder, overrides)


def mean_score(record: RunRecord) -> float | None:
    """Mean of the tasks' main metrics, points as shares of a full score."""
    values = []
    for result in record.results.values():
        full = result.full(result.main_metric)
        values.append(result.scores[result.main_metric].value / (full or 1))
    return sum(values) / len(values) if values else None


def summary(record: RunRecord, *more: str) -> str:
    """One line for the console."""
    spec, cost, mean = record.spec, record.cost, mean_score(record)
    parts = [f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]"]
    parts += [f"mean score {mean:.3f}"] if mean is not None else []
    if cost is not None:
        parts.append(f"FLOPs x{cost.prefill_flops_ratio:.3f}")
        parts += [f"time x{cost.prefill_time_ratio.median:.3f}"] if cost.prefill_time_ratio is not None else []
    return "  ".join([*parts, *more])
