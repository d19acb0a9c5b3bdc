"""Timing of a run: in this process, or in fresh processes that do nothing else.

A sweep's process has warm caches, leftovers on the device and threads of libraries; `latency=full` therefore measures
each run in separate processes, one after the other, before this one loads anything. Such a process gets the settings,
loads the model, and returns its measurements.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdrop.models import source
from pdrop.models.attention import sdpa_order
from pdrop.record import Cost, Interval
from pdrop.runs import timed_prompt
from pdrop.runs.settings import Settings
from pdrop.runs.timed_prompt import preprocessing, timed_batch
from pdrop.schedule import Schedule
from pdrop.shapes import PromptSize
from pdrop.timing.protocol import TimingProtocol

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.models.checkpoint import Checkpoint

log = logging.getLogger("pdrop")


@dataclass(frozen=True)
class Alone:
    """What fresh processes measured of a run."""

    found: dict[str, Any]  # as pdrop.timing.measure.measure returns it
    timed_prompt: dict[str, float]
    counted: PromptSize | None  # the counted prompt if nothing is scored


def time_run(cost: Cost, settings: Settings, checkpoint: Checkpoint | None, alone: Alone | None = None) -> None:
    """Time a run under its protocol; fills in the times of `cost`.

    Args:
        cost: Its counted cost.
        settings: The run's.
        checkpoint: The model to time in this process;
        alone: or the measurements of fresh processes.
    """
    if (batch := timed_batch(settings.spec.batch_size)) < settings.spec.batch_size:
        log.warning("batch_size=%d: what is timed is a batch of %d", settings.spec.batch_size, batch)
    if alone is not None:
        cost.timing, cost.timed_prompt = alone.found, alone.timed_prompt
    else:
        assert checkpoint is not None
        time_here(cost, settings, checkpoint)
    assert cost.timing is not None
    times = cost.timing["stages"]["prefill"]
    cost.prefill_ms, cost.baseline_prefill_ms = as_interval(times["this"]), as_interval(times["none"])
    if not cost.timing["invalid"]:  # a table shows no invalid ratio, but says why
        cost.prefill_time_ratio = as_interval(times["ratio"])
    for reason in cost.timing["invalid"]:
        log.warning("these times are invalid: %s", reason)


def time_here(cost: Cost, settings: Settings, checkpoint: Checkpoint) -> None:
    """Time a run in this process."""
    from pdrop.timing.measure import measure, measure_prefill

    method, schedule, protocol, spec = settings.method, settings.schedule, settings.protocol, settings.spec
    assert method is not None
    cost.timed_prompt = counts_of(settings, checkpoint)
    inputs = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images)
    with sdpa_order(spec.sdpa_kernel):
        if protocol.new_tokens or protocol.memory:
            make = preprocessing(checkpoint, settings.source, spec, protocol.images)
            cost.timing = measure(checkpoint.model, inputs, method, schedule, protocol, make, checkpoint.tokenizer)
        else:
            cost.timing = measure_prefill(checkpoint.model, inputs, method, schedule, protocol, checkpoint.tokenizer)


def counts_of(settings: Settings, checkpoint: Checkpoint) -> dict[str, float]:
    """Text and visual tokens of the prompt that is timed."""
    one = timed_prompt.inputs(checkpoint, settings.source, settings.spec, settings.protocol.images, batch=1)
    return timed_prompt.size_of(one, checkpoint.model.config).counts


def as_interval(times: Mapping[str, Any]) -> Interval:
    """The record's interval of one measurement."""
    return Interval(**{name: value for name, value in times.items() if name != "p90"})


def prefill_ms(settings: Settings, method: Method) -> Callable[[Schedule], float]:
    """A function that measures a schedule's prefill, for budgets in milliseconds: medians of interleaved pairs."""
    from pdrop.timing import paired

    checkpoint = settings.load()
    inputs = timed_prompt.inputs(checkpoint, settings.source, settings.spec, settings.protocol.images)
    protocol = TimingProtocol("budget", warmup=2, pairs=max(7, settings.protocol.pairs))

    def measured(schedule: Schedule) -> float:
        side, tokenizer = (0, checkpoint.tokenizer) if schedule.stages else (1, None)
        with sdpa_order(settings.spec.sdpa_kernel):
            return paired.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol, tokenizer)[side].median

    return measured


# ---------------------------------------------------------------------- fresh processes


def in_fresh_processes(settings: Settings) -> Alone:
    """Measure a run in `repeats` processes, one after the other, each of which loads the model once.

    Raises:
        RuntimeError: If one of them fails; with its message.
        ValueError: If the device does not allow a second process.
    """
    from pdrop.evaluation.answers import described
    from pdrop.timing.measure import pooled

    leave_the_device(settings.device)
    found, repeats = [], settings.protocol.repeats
    spawn = multiprocessing.get_context("spawn")  # a forked process would hold what this one holds
    for number in range(repeats):
        log.info("timing        process %d of %d", number + 1, repeats)
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            try:
                found.append(fresh.submit(measured_alone, settings, threads()).result())
            except Exception as error:
                raise RuntimeError(f"the process that measured this run failed: {described(error)}") from error
    _, counts, counted = found[0]
    return Alone(pooled([json.loads(text) for text, _, _ in found]), counts, counted)


def leave_the_device(device: str) -> None:
    """Free a GPU from the previous run's model, and from what its method has loaded, before measuring.

    Raises:
        ValueError: If the GPU takes one process at a time, and this one has used it: its context cannot be released.
    """
    import torch

    from pdrop.methods.cdpruner import Clip
    from pdrop.timing import nvidia

    Clip.load.cache_clear()
    source.forget()
    gc.collect()
    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return
    torch.cuda.empty_cache()
    used = torch.cuda.memory_stats(device).get("reserved_bytes.all.allocated", 0)
    if used and nvidia.exclusive(torch.device(device)):
        raise ValueError(
            "this GPU takes one process at a time (compute mode Exclusive_Process), and this one has used it: run "
            "latency=full before anything else, one run per command (no -m, no workers, no budget in milliseconds), or "
            "let nvidia-smi --compute-mode=DEFAULT allow more"
        )


def threads() -> int:
    """Torch's threads in this process."""
    import torch

    return torch.get_num_threads()


def measured_alone(settings: Settings, torch_threads: int) -> tuple[str, dict[str, float], PromptSize | None]:
    """In the fresh process: load the model and measure; returns the measurement as JSON, and the other fields of
    Alone."""
    import torch
    import transformers

    from pdrop.timing.measure import measure

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(torch_threads)
    checkpoint, spec, protocol, method = settings.load(), settings.spec, settings.protocol, settings.method
    assert method is not None
    inputs = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images)
    make = preprocessing(checkpoint, settings.source, spec, protocol.images)
    with sdpa_order(spec.sdpa_kernel):
        found = measure(checkpoint.model, inputs, method, settings.schedule, protocol, make, checkpoint.tokenizer)
        counted = None
        if not spec.tasks:
            counted = timed_prompt.counted(
                checkpoint, settings.source, spec, method, settings.schedule, protocol.images
            )
    return json.dumps(found, allow_nan=False), counts_of(settings, checkpoint), counted
