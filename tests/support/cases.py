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
