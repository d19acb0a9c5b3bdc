"""What a run measures: scores, counts and times, or without a model only counts. Imports heavy packages late."""

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
        record: The record of a run that has started.
        settings: The run's.
        checkpoint: The loaded model. None if workers have it, if fresh processes are timed before it is loaded here, or
            if there is none: then costs are counted for the reference prompt.

    Raises:
        ValueError: If the cost of such a model is not known; no question has been asked then.
    """
    if not settings.source.loadable:
        count(record, settings)
        return
    with sdpa_order(settings.spec.sdpa_kernel):
        score(record, settings, checkpoint)


def score(record: RunRecord, settings: Settings, checkpoint: Checkpoint | None) -> None:
    """Run the tasks, count the prompts' cost and time them; fills in `record`.

    Timing in fresh processes comes first: while they run, this process has loaded nothing.

    Args:
        checkpoint: None: workers have it, or fresh processes are timed first.
    """
    from pdrop.cost import breakdown, flops
    from pdrop.evaluation import grounding
    from pdrop.evaluation.lmms import evaluate
    from pdrop.runs import timed, timed_prompt
    from pdrop.shapes import ModelSizes

    spec, method, schedule, protocol = settings.spec, settings.method, settings.schedule, settings.protocol
    # first, so that an uncountable model is refused before scoring
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
    """Without a model: fill in the record's cost in closed form and log its breakdown."""
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
    """Who answered, for a record's environment. The device's name covers all answers, so that a run answered on
    different devices (resumed elsewhere, or by mixed workers) is not compared with others."""
    names = sorted({entry["device"] for entry in answered_by if entry.get("device") is not None})
    several = {"device_name": " + ".join(names)} if len(names) > 1 else {}
    return {"answered_by": answered_by, **several}
