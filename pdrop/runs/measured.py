"""What a run measures: scores, counts, times; without a model, what can be counted. Heavy imports wait until then."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdrop.models.attention import sdpa_order
from pdrop.record import RunRecord
from pdrop.runs.settings import Settings

if TYPE_CHECKING:
    from pdrop.models.checkpoint import Checkpoint

log = logging.getLogger("pdrop")

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number in the cache


def measure(record: RunRecord, settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Fill in the record's results and cost.

    Args:
        record: Of a run that has started.
        settings: The run's.
        checkpoint: The loaded model; None: there is none, or it is not needed here until it has been timed elsewhere.

    Raises:
        ValueError: If the model is of a kind whose cost is not known; nothing has been asked then.
    """
    if not settings.source.loadable:
        reckon(record, settings)
        return
    with sdpa_order(settings.spec.sdpa_kernel):
        score(record, settings, checkpoint)


def score(record: RunRecord, settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Runs the tasks, counts what the prompts cost and times them; fills in `record`.

    What is timed in fresh processes is timed first: while they run, this one has loaded nothing.
    """
    from pdrop.cost import breakdown, flops
    from pdrop.evaluation.lmms import evaluate
    from pdrop.runs import timed, timed_prompt

    spec, method, schedule, protocol = settings.spec, settings.method, settings.schedule, settings.protocol
    sizes = settings.source.sizes  # first: what cannot be counted is refused before anything else
    alone = timed.in_fresh_processes(settings) if checkpoint is None else None
    prompts: Sequence[Any] = ()
    if spec.tasks:
        checkpoint = settings.load() if checkpoint is None else checkpoint
        folder, own = settings.folder, settings.task_folders
        evaluation = evaluate(checkpoint, method, schedule, spec, folder, task_dirs=own, progress=True)
        record.results, prompts = evaluation.results, evaluation.prompts
    elif checkpoint is not None:
        prompts = [timed_prompt.counted(checkpoint, settings.source, spec, method, schedule, protocol.images)]
    elif alone is not None and alone.counted is not None:
        prompts = [alone.counted]
    itemsize = ITEMSIZE[spec.dtype]
    record.cost = flops.cost(sizes, prompts, schedule, method, itemsize)
    if (known := settings.known_prompt) is not None:
        record.cost.model_prompt = known.counts
    if not spec.tasks:
        title = f"ledger of {spec.model}, {spec.method}, {spec.dtype}"
        log.info("%s", "\n".join(breakdown.lines(sizes, prompts[0], schedule, method, itemsize, title)))
    if settings.timed:
        timed.time_run(record.cost, settings, checkpoint, alone)
        if record.cost.timed_prompt != record.cost.model_prompt and known is not None:
            log.info("times are of %s; budgets and ledgers of %s", record.cost.timed_prompt, record.cost.model_prompt)


def reckon(record: RunRecord, settings: Settings) -> None:
    """A ledger, where there is no model: fills in the record's cost and prints it."""
    from pdrop.cost import breakdown, flops

    spec, method, schedule = settings.spec, settings.method, settings.schedule
    sizes = settings.source.sizes
    left = settings.prompt.under(method, schedule, sizes.layers)
    itemsize = ITEMSIZE[spec.dtype]
    record.cost = flops.cost(sizes, [left], schedule, method, itemsize)
    record.cost.model_prompt = left.counts
    title = f"ledger of {spec.model}, {spec.method}, {spec.dtype}"
    log.info("%s", "\n".join(breakdown.lines(sizes, left, schedule, method, itemsize, title)))
