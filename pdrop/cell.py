"""One cell of a sweep: find it done, or score, count and time it, and write its record.

Plain arguments come in, a RunRecord and a folder under results/runs/ come out. A finished cell is skipped; one that
was killed goes on from its stored answers; one that fails keeps its error and raises.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrop import ledger
from pdrop.environment import environment
from pdrop.inputs import (
    accelerator,
    describe,
    known_prompt,
    load,
    reference_prompt,
    sizes,
    task_digest,
    without_weights,
)
from pdrop.record import RunRecord, RunSpec, write_atomically
from pdrop.schedule import Schedule
from pdrop.settings import Settings, identity

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint
    from pdrop.methods.base import Method

log = logging.getLogger("pdrop")


class RunFailed(RuntimeError):
    """A run that started and did not finish; its record holds the traceback."""


def run_cell(
    settings: Settings,
    method_name: str,
    method: Method | None,
    make_schedule: Callable[..., Schedule],
    overrides: Sequence[str] = (),
) -> RunRecord:
    """Do one run, or find it done.

    Args:
        settings: What to run it on.
        method_name: What tables call the method.
        method: Ranks the visual tokens; None drops nothing.
        make_schedule: (layers of the decoder) -> schedule; and with the dials `ratio` and `layers` turned, for budgets.
        overrides: The command line's, for the record.

    Raises:
        ValueError: If something asked for cannot be had; nothing has been written then.
        RunFailed: If the run broke; its record says status "failed" and holds the traceback.
    """
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit is a number of samples from 1 on, or null for all, not {settings.limit}")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size is a number of prompts from 1 on, not {settings.batch_size}")
    if not re.fullmatch(r"[\w.-]+", settings.model):
        raise ValueError(f"model.name is part of a folder's name: letters, digits, . _ - only, not {settings.model!r}")
    task_files = task_digest(settings.tasks, settings.task_folders)
    settings = without_weights(settings)
    fingerprint, layers = describe(settings)
    if settings.budget is None or method is None:
        schedule = make_schedule(layers)
    else:
        schedule = budgeted(settings, method, layers, make_schedule)
    if method is not None:
        method.check(schedule)
    spec = identity(settings, method_name, method, schedule, fingerprint, task_files)
    folder = settings.results / "runs" / spec.folder
    if (done := finished(settings, spec, folder, overrides)) is not None:
        return done
    checkpoint = None if settings.weights == "architecture" else load(settings)
    with only_one(folder):
        # another process may have done it while this one loaded, or waited
        return finished(settings, spec, folder, overrides) or start(
            settings, spec, checkpoint, method, schedule, folder, overrides
        )


def finished(settings: Settings, spec: RunSpec, folder: Path, overrides: Sequence[str]) -> RunRecord | None:
    """The run's record, if it is done and need not be redone. `force` redoes a run once a process."""
    if not (folder / "record.json").exists() or (settings.force and spec.run_id not in redone):
        return None
    record = RunRecord.read(folder)
    if record.status != "done":
        return None
    mark(settings, spec, overrides)
    log.info("done already  %s", summary(record, folder))
    return record


redone: set[str] = set()  # runs that this process has done because of force=true


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the run's folder: jobs that share a store take turns at the same run. The system frees it at any end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting       another process does %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def start(
    settings: Settings,
    spec: RunSpec,
    checkpoint: Checkpoint | None,
    method: Method | None,
    schedule: Schedule,
    folder: Path,
    overrides: Sequence[str],
) -> RunRecord:
    """Do the run, from stored answers if there are any."""
    if settings.force:
        (folder / "answers.jsonl").unlink(missing_ok=True)
        redone.add(spec.run_id)
    mark(settings, spec, overrides)
    record = RunRecord(spec, "running", started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    record.environment, record.command = environment() | accelerator(settings.device), ["run.py", *overrides]
    record.write(folder)
    log.info("running       %s  %s", f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]", folder)
    started = time.perf_counter()
    try:
        if checkpoint is None:
            reckon(record, method, schedule, settings)
        else:
            measure(record, checkpoint, method, schedule, settings, folder)
    except BaseException as error:  # also an interrupt: the record must not say "running" for ever
        record.status, record.error, record.wall_s = "failed", traceback.format_exc(), time.perf_counter() - started
        record.write(folder)
        if not isinstance(error, Exception):
            raise
        raise RunFailed(
            f"{spec.folder} failed: {type(error).__name__}: {error} (traceback in {folder}/record.json)"
        ) from error
    record.status, record.wall_s = "done", time.perf_counter() - started
    record.write(folder)
    log.info("done          %s", summary(record, folder))
    return record


def budgeted(settings: Settings, method: Method, layers: int, make_schedule: Callable[..., Schedule]) -> Schedule:
    """The method's schedule that spends the budget on the model's reference prompt.

    Raises:
        ValueError: If it cannot be met.
    """
    from pdrop.budget import solve

    prompt, measured = reference_prompt(settings), None
    if str(settings.budget).startswith("prefill_ms"):
        from pdrop.speed import prefill_ms

        measured = prefill_ms(settings, method)
    schedule = solve(
        method, settings.budget or "", layers, round(prompt.visual), text_tokens=prompt.text, arch=sizes(settings),
        images=prompt.images, layers=settings.layers,
        dial=lambda ratio, at: make_schedule(layers, ratio=ratio, layers=at), measure=measured,
    )  # fmt: skip
    log.info("budget %s of %d + %d tokens: %s", settings.budget, prompt.visual, prompt.text, schedule)
    return schedule


def reckon(record: RunRecord, method: Method | None, schedule: Schedule, settings: Settings) -> None:
    """A ledger, where there is no model: fills in `record`'s cost and prints it."""
    from pdrop import flops

    model = sizes(settings)
    left = reference_prompt(settings).under(method, schedule, model.layers)
    itemsize = 4 if settings.dtype == "float32" else 8 if settings.dtype == "float64" else 2
    record.cost = flops.cost(model, [left], schedule, method, itemsize)
    record.cost.model_prompt = left.counts
    title = f"ledger of {settings.model}, {record.spec.method}, {settings.dtype}"
    log.info("%s", "\n".join(ledger.lines(model, left, schedule, method, itemsize, title)))


def measure(
    record: RunRecord,
    checkpoint: Checkpoint,
    method: Method | None,
    schedule: Schedule,
    settings: Settings,
    folder: Path,
) -> None:
    """Score, count and time; fills in `record`."""
    from pdrop import evaluate, flops, speed
    from pdrop.shapes import ModelSizes

    spec = record.spec
    counted = ModelSizes.from_config(checkpoint.model.config)  # first: what cannot be counted is refused now
    prompts: Sequence[Any] = ()
    if spec.tasks:
        evaluation = evaluate.evaluate(
            checkpoint,
            method,
            schedule,
            tasks=spec.tasks,
            folder=folder,
            limit=spec.limit,
            seed=spec.seed,
            batch_size=spec.batch_size,
            prompt=spec.prompt,
            image_mode=spec.image_mode,
            max_new_tokens=spec.max_new_tokens,
            task_dirs=settings.task_folders,
            progress=True,
        )
        record.results, prompts = evaluation.results, evaluation.prompts
    inputs = speed.timing_inputs(checkpoint, settings)
    if not spec.tasks:
        prompts = [speed.model_prompt(checkpoint, inputs, method, schedule, settings)]
    itemsize = checkpoint.model.dtype.itemsize
    record.cost = flops.cost(counted, prompts, schedule, method, itemsize)
    if (known := known_prompt(settings)) is not None:
        record.cost.model_prompt = known.counts
    if not spec.tasks:
        title = f"ledger of {spec.model}, {spec.method}, {spec.dtype}"
        log.info("%s", "\n".join(ledger.lines(counted, prompts[0], schedule, method, itemsize, title)))
    if settings.latency.measures and schedule and method is not None and method.pixels == 1:
        timed = speed.timed_size(inputs, checkpoint.model.config)
        record.cost.timed_prompt = timed.counts
        if known is not None and timed.counts != known.counts:
            log.info("times are of %s; budgets and ledgers of %s", timed, known)
        speed.time_cell(record.cost, settings, method, schedule, checkpoint, inputs)


def mark(settings: Settings, spec: RunSpec, overrides: Sequence[str]) -> None:
    """Note that an experiment asked for this run: an experiment is the list of such notes."""
    if settings.experiment is not None:
        path = settings.results / "experiments" / settings.experiment / spec.folder
        write_atomically(path, json.dumps(list(overrides)) + "\n")


def mean_score(record: RunRecord) -> float | None:
    """Mean of the tasks' main metrics."""
    values = [result.scores[result.main_metric].value for result in record.results.values()]
    return sum(values) / len(values) if values else None


def summary(record: RunRecord, folder: Path) -> str:
    """One line for the console."""
    spec, cost, mean = record.spec, record.cost, mean_score(record)
    parts = [f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]"]
    parts += [f"mean score {mean:.3f}"] if mean is not None else []
    if cost is not None:
        parts.append(f"prefill FLOPs x{cost.prefill_flops_ratio:.3f}")
        parts += [f"time x{cost.prefill_time_ratio.median:.3f}"] if cost.prefill_time_ratio is not None else []
    return "  ".join([*parts, f"({record.wall_s:.0f} s)", str(folder)])
