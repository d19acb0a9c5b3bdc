"""What is timed in a run, and where: in this process, or in fresh ones that hold nothing else.

A sweep's process has warm caches, leftovers on the device and threads of libraries; `latency=full` therefore measures
each run in processes of its own, one after the other. Such a process gets the settings, builds the model again, and
gives back what it found as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from pdrop.record import Cost, Interval
from pdrop.runs import timed_prompt
from pdrop.runs.settings import Settings
from pdrop.runs.timed_prompt import preprocessing, timed_batch
from pdrop.schedule import Schedule
from pdrop.timing.protocol import TimingProtocol

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.models.checkpoint import Checkpoint

log = logging.getLogger("pdrop")


def time_run(cost: Cost, settings: Settings, checkpoint: Checkpoint) -> None:
    """Time a run under its protocol; fills in the times of `cost`."""
    from pdrop.timing import paired
    from pdrop.timing.measure import measure

    method, schedule, protocol, spec = settings.method, settings.schedule, settings.protocol, settings.spec
    assert method is not None
    if (batch := timed_batch(spec.batch_size)) < spec.batch_size:
        log.warning("batch_size=%d: what is timed is a batch of %d", spec.batch_size, batch)
    one = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images, batch=1)
    cost.timed_prompt = timed_prompt.size_of(one, checkpoint.model.config).counts
    if protocol.fresh:
        with off_the_device(checkpoint.model):
            cost.timing = in_fresh_processes(settings)
    elif protocol.new_tokens or protocol.memory:
        inputs = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images)
        make = preprocessing(checkpoint, settings.source, spec, protocol.images)
        cost.timing = measure(checkpoint.model, inputs, method, schedule, protocol, make, checkpoint.tokenizer)
    else:
        inputs = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images)
        tokenizer = checkpoint.tokenizer
        timed = paired.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol, tokenizer)
        cost.prefill_ms, cost.baseline_prefill_ms, cost.prefill_time_ratio = timed
        return
    lane = cost.timing["stages"]["prefill"]
    cost.prefill_ms, cost.baseline_prefill_ms = as_interval(lane["this"]), as_interval(lane["none"])
    if not cost.timing["invalid"]:  # a table shows no ratio that means nothing, and says why
        cost.prefill_time_ratio = as_interval(lane["ratio"])
    for reason in cost.timing["invalid"]:
        log.warning("these times are invalid: %s", reason)


def as_interval(lane: Mapping[str, Any]) -> Interval:
    """The record's interval of one measurement."""
    return Interval(**{name: value for name, value in lane.items() if name != "p90"})


def prefill_ms(settings: Settings, method: Method) -> Callable[[Schedule], float]:
    """What a schedule's prefill takes, by measuring: for budgets in milliseconds. Medians of interleaved pairs."""
    from pdrop.timing import paired

    checkpoint = settings.load()
    inputs = timed_prompt.inputs(checkpoint, settings.source, settings.spec, settings.protocol.images)
    protocol = TimingProtocol("budget", warmup=2, pairs=max(7, settings.protocol.pairs))

    def measured(schedule: Schedule) -> float:
        if not schedule.stages:
            return paired.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol)[1].median
        tokenizer = checkpoint.tokenizer
        return paired.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol, tokenizer)[0].median

    return measured


# ---------------------------------------------------------------------- fresh processes


def in_fresh_processes(settings: Settings) -> dict[str, Any]:
    """Measure a run in `repeats` processes, one after the other.

    Raises:
        RuntimeError: If one of them fails; with what it said.
    """
    from pdrop.evaluation.answers import described
    from pdrop.timing.measure import pooled

    found, repeats = [], settings.protocol.repeats
    spawn = multiprocessing.get_context("spawn")  # a forked one would hold what this one holds
    for number in range(repeats):
        log.info("timing        process %d of %d", number + 1, repeats)
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            try:
                found.append(json.loads(fresh.submit(measured_alone, settings, threads()).result()))
            except Exception as error:
                raise RuntimeError(f"the process that measured this run failed: {described(error)}") from error
    return pooled(found)


@contextlib.contextmanager
def off_the_device(model: Any) -> Iterator[None]:
    """This process's model must not lie on a GPU beside the measured one: it waits in the main memory."""
    import torch

    device = model.device
    if device.type != "cuda":
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def threads() -> int:
    """Of torch, in this process."""
    import torch

    return torch.get_num_threads()


def measured_alone(settings: Settings, torch_threads: int) -> str:
    """The other side: build the model, measure; what was found, as JSON."""
    import torch
    import transformers

    from pdrop.timing.measure import measure

    transformers.logging.disable_progress_bar()  # this run's model has been seen loading
    torch.set_num_threads(torch_threads)
    checkpoint, spec, protocol, method = settings.load(), settings.spec, settings.protocol, settings.method
    assert method is not None
    inputs = timed_prompt.inputs(checkpoint, settings.source, spec, protocol.images)
    make = preprocessing(checkpoint, settings.source, spec, protocol.images)
    found = measure(checkpoint.model, inputs, method, settings.schedule, protocol, make, checkpoint.tokenizer)
    return json.dumps(found, allow_nan=False)
