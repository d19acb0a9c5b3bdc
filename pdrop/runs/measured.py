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
        checkpoint: The loaded model; None where workers have it, where fresh processes are timed before it is loaded
            here, or there is none: then what can be counted for the reference prompt is.

    Raises:
        ValueError: If the model is of a kind whose cost is not known; nothing has been asked then.
    """
    if not settings.source.loadable:
        count(record, settings)
        return
    with sdpa_order(settings.spec.sdpa_kernel):
        score(record, settings, checkpoint)


def score(record: RunRecord, settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Runs the tasks, counts what the prompts cost and times them; fills in `record`.

    What is timed in fresh processes is timed first: while they run, this one has loaded nothing.

    Args:
        checkpoint: None: workers have it, or fresh processes are timed first.
    """
    from pdrop.cost import breakdown, flops
    from pdrop.evaluation import grounding
    from pdrop.evaluation.lmms import evaluate
    from pdrop.runs import timed, timed_prompt
    from pdrop.shapes import ModelSizes

    spec, method, schedule, protocol = settings.spec, settings.method, settings.schedule, settings.protocol
    # first: what cannot be counted is refused before scoring
    team = alone = None
    if settings.elsewhere:
        from pdrop.runs.workers import TeamGenerator

        team = TeamGenerator(settings)
        loaded = team.loaded()
        sizes, itemsize = loaded.sizes, loaded.itemsize
        record.environment |= loaded.machine
    elif checkpoint is None:
        sizes, itemsize = settings.source.sizes, ITEMSIZE[spec.dtype]
        alone = timed.in_fresh_processes(settings)
        checkpoint = settings.load() if spec.tasks else None
    else:
        sizes, itemsize = ModelSizes.from_config(checkpoint.model.config), checkpoint.model.dtype.itemsize
    prompts: Sequence[Any] = ()
    if spec.tasks:
        folder, own = settings.folder, settings.task_folders
        boxes = grounding.family_of(spec.tasks, settings.source.family[0])
        evaluation = evaluate(
            checkpoint,
            method,
            schedule,
            spec,
            folder,
            task_dirs=own,
            progress=True,
            generator=team,
            boxes=boxes,
            preparation=settings.preparation,
        )
        record.results, prompts = evaluation.results, evaluation.prompts
        record.environment |= answered_on(evaluation.answered_by)
    elif alone is not None and alone.counted is not None:
        prompts = [alone.counted]
    else:
        assert checkpoint is not None
        prompts = [timed_prompt.counted(checkpoint, settings.source, spec, method, schedule, protocol.images)]
    record.cost = flops.cost(sizes, prompts, schedule, method, itemsize)
    if (known := settings.known_prompt) is not None:
        record.cost.model_prompt = known.counts
    if not spec.tasks:
        title = f"cost breakdown of {spec.model}, {spec.method}, {spec.dtype}"
        log.info("%s", "\n".join(breakdown.lines(sizes, prompts[0], schedule, method, itemsize, title)))
    if settings.timed:
        if team is not None:
            record.cost = team.timed(record.cost)
        else:
            timed.time_run(record.cost, settings, checkpoint, alone)
        if record.cost.timed_prompt != record.cost.model_prompt and known is not None:
            log.info("times are of %s; budgets and costs of %s", record.cost.timed_prompt, record.cost.model_prompt)


def count(record: RunRecord, settings: Settings) -> None:
    """Without a model: fills in the record's cost in closed form and logs its breakdown."""
    from pdrop.cost import breakdown, flops

    spec, method, schedule = settings.spec, settings.method, settings.schedule
    sizes = settings.source.sizes
    left = settings.prompt.under(method, schedule, sizes.layers)
    itemsize = ITEMSIZE[spec.dtype]
    record.cost = flops.cost(sizes, [left], schedule, method, itemsize)
    record.cost.model_prompt = left.counts
    title = f"cost breakdown of {spec.model}, {spec.method}, {spec.dtype}"
    log.info("%s", "\n".join(breakdown.lines(sizes, left, schedule, method, itemsize, title)))


def answered_on(answered_by: list[dict[str, Any]]) -> dict[str, Any]:
    """Who answered, for a record's environment. The device's name is that of all answers, so that answers of different
    devices, from a run that went on elsewhere or from many workers, stand in no table with others."""
    names = sorted({entry["device"] for entry in answered_by if entry.get("device") is not None})
    several = {"device_name": " + ".join(names)} if len(names) > 1 else {}
    return {"answered_by": answered_by, **several}
