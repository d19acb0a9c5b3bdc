"""What several test modules run the engine on: a ragged batch, a two-boundary schedule, the methods a family allows."""

from __future__ import annotations

from typing import Any

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach
from pdrop.conformance import oracle
from pdrop.conformance.batches import (  # noqa: F401
    FLOAT,
    GREEDY,
    HOOK_TABLES,
    ONE,
    RAGGED,
    STEPS,
    TOLERANCE,
    batch_of,
    kept_of,
    picture,
    prolong,
)
from pdrop.conformance.families import MROPE_FAMILIES
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.engine.trace import Trace
from pdrop.shapes import ModelSizes, PromptSize

HALVES = Schedule((Stage(2, 0.5), Stage(4, 0.25)))
BOUNDARIES = {2: 0.5, 4: 0.25}  # HALVES, for the oracle


def methods(family: str) -> list[Any]:
    """Every method under every position policy that the family's rotary positions allow."""
    compact = (
        [] if family in MROPE_FAMILIES else [PyramidDrop(positions="compact"), FastV(several=True, positions="compact")]
    )
    return [PyramidDrop(positions="original"), FastV(several=True), RandomDrop(), *compact]


def check_generate(model: Any, batch: Any, method: Any, keep: float = 0.4) -> None:
    """`generate` keeps what a forward keeps before layer 0, in the same order; each beam keeps its prompt's."""
    with attach(model, method, Schedule((Stage(0, keep),))) as trace:
        model(**batch)
        order = [row.tolist() for row in trace.order[0]]
        for options, copies in ((GREEDY, 1), (GREEDY | {"num_beams": 2}, 2)):
            model.generate(**batch, **options)
            assert [row.tolist() for row in trace.order[0]] == [row for row in order for _ in range(copies)]


def rule_of(method: Any) -> oracle.Rule | None:
    """The oracle's rule for a method; None where it must be told who stays."""
    return {PyramidDrop: oracle.PYRAMIDDROP, FastV: oracle.FASTV, RandomDrop: None}[type(method)]


def prefill_flops_of_grids(model: Any, one: Any, method: Any, schedule: Schedule) -> tuple[float, float, Trace]:
    """Total FLOPs of a Qwen-VL's prefill of one prompt, counted and in closed form, and what was dropped."""
    grids = [(frames, height, width) for frames, height, width in one["image_grid_thw"].tolist()]
    with attach(model, method, schedule) as trace:
        counted = counted_prefill_flops(model, one)["total"]
        model(**one)
    layers, visual = [row[0] for row in trace.visual_tokens], trace.visual[0]
    prompt = PromptSize(one["input_ids"].shape[1] - visual, visual, tuple(layers), images=grids)
    sizes = ModelSizes.from_config(model.config)
    return counted, prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))["total"], trace
