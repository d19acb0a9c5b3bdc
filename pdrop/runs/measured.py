"""What a run measures: scores, counts, times; without a model, what can be counted. Heavy imports wait until then."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdrop.record import RunRecord
from pdrop.runs.settings import Settings

if TYPE_CHECKING:
    from pdrop.models.checkpoint import Checkpoint

log = logging.getLogger("pdrop")


def measure(record: RunRecord, settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Fill in the record's results and cost.

    Args:
        record: Of a run that has started.
        settings: The run's.
        checkpoint: The loaded model; None: count only, for the reference prompt.

    Raises:
        ValueError: If the model is of a kind whose cost is not known; nothing has been asked then.
    """
    if checkpoint is None:
        count(record, settings)
    else:
        score(record, settings, checkpoint)


def score(record: RunRecord, settings: Settings, checkpoint: Checkpoint) -> None:
    """Runs the tasks, counts what the prompts cost and times them; fills in `record`."""
    from pdrop.cost import breakdown, flops
    from pdrop.evaluation.lmms import evaluate
    from pdrop.runs import timed, timed_prompt
    from pdrop.shapes import ModelSizes

    spec, method, schedule, protocol = settings.spec, settings.method, settings.schedule, settings.protocol
    # first: what cannot be counted is refused before scoring
    sizes = ModelSizes.from_config(checkpoint.model.config)
    prompts: Sequence[Any] = ()
    if spec.tasks:
        folder, own = settings.folder, settings.task_folders
        evaluation = evaluate(checkpoint, method, schedule, spec, folder, task_dirs=own, progress=True)
        record.results, prompts = evaluation.results, evaluation.prompts
    if not spec.tasks:
        prompts = [timed_prompt.counted(checkpoint, settings.source, spec, method, schedule, protocol.images)]
    itemsize = checkpoint.model.dtype.itemsize
    record.cost = flops.cost(sizes, prompts, schedule, method, itemsize)
    if (known := settings.known_prompt) is not None:
        record.cost.model_prompt = known.counts
    if not spec.tasks:
        title = f"cost breakdown of {spec.model}, {spec.method}, {spec.dtype}"
        log.info("%s", "\n".join(breakdown.lines(sizes, prompts[0], schedule, method, itemsize, title)))
    if protocol.measures and schedule and method is not None and method.pixels == 1:
        timed.time_run(record.cost, settings, checkpoint)
        if record.cost.timed_prompt != record.cost.model_prompt and known is not None:
            log.info("times are of %s; budgets and costs of %s", record.cost.timed_prompt, record.cost.model_prompt)


def count(record: RunRecord, settings: Settings) -> None:
    """Without a model: fills in the record's cost in closed form and logs its breakdown."""
    from pdrop.cost import breakdown, flops

    spec, method, schedule = settings.spec, settings.method, settings.schedule
    sizes = settings.source.sizes
    left = settings.prompt.under(method, schedule, sizes.layers)
    itemsize = {"float32": 4, "float64": 8}.get(spec.dtype, 2)
    record.cost = flops.cost(sizes, [left], schedule, method, itemsize)
    record.cost.model_prompt = left.counts
    title = f"cost breakdown of {spec.model}, {spec.method}, {spec.dtype}"
    log.info("%s", "\n".join(breakdown.lines(sizes, left, schedule, method, itemsize, title)))
