"""The grid of a table with each row's costs: tokens layer by layer, FLOPs both ways, cache, stages of time.

Four different numbers are called "tokens" in this field; this one is what entered each layer, from which the others
follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from ..comparison.table_model import Row, Table
from ..grid import DASH, Grid, Text

SIZES = ("tokens entering the layers", "mean", "papers' GMACs", "GFLOPs", "FLOPs %", "causal %", "decode %", "KV MiB")
TIMES = ("TTFT %", "TPOT %", "selection ms", "vision ms")


def cost_grid(table: Table, head: Sequence[str], starts: Sequence[Sequence[str]]) -> Grid:
    """The grid of costs.

    Args:
        table: The table.
        head: Heads of the first columns, such as budget and method.
        starts: The cells of these columns, one row each.
    """
    timed = any("selection" in timing(row).get("stages", ()) for row in table.rows)  # more than a prefill
    grid = Grid("What it costs", [*head, *SIZES, *(TIMES if timed else ())], left=len(head) + 1)
    before: tuple[str, str] | None = None
    for row, start in zip(table.rows, starts):
        group = (row.spec.model, row.budget)
        if before is not None and before != group:
            grid.rules.add(len(grid.rows))
        before = group
        cells = [*start, *sizes(row), *(times(row) if timed else ())]
        grid.rows.append([Text(cell) for cell in cells])
    return grid


def sizes(row: Row) -> list[str]:
    """The costs that are counted, not timed."""
    costs = [run.record.cost for run in row.runs if run.record.cost is not None]
    if not costs or len(costs) < len(row.runs):
        return [DASH] * len(SIZES)
    layers = [fmean(tokens) for tokens in zip(*(cost.visual_tokens_per_layer for cost in costs))]
    return [
        ", ".join(f"{value:.4g}×{len(list(same))}" for value, same in groupby(layers)),
        f"{fmean(layers):.1f}",
        f"{(row.cost('paper_macs_visual') or 0) / 1e9:.4g}",
        f"{(row.cost('prefill_flops') or 0) / 1e9:.4g}",
        share(row.cost("prefill_flops_ratio")),
        share(optional(row, "prefill_flops_causal_ratio")),
        share(optional(row, "decode_flops_ratio")),
        f"{(row.cost('kv_bytes') or 0) / 2**20:.4g}",
    ]


def optional(row: Row, name: str) -> float | None:
    """A field that older records do not have."""
    values = [getattr(run.record.cost, name) for run in row.runs]
    return fmean(values) if all(value is not None for value in values) else None


def timing(row: Row) -> dict[str, Any]:
    """What the row's first run measured in addition to its prefill."""
    cost = row.runs[0].record.cost
    return (cost.timing or {}) if cost is not None else {}


def times(row: Row) -> list[str]:
    """The first run's medians; invalid measurements are marked."""
    found = timing(row)
    if not found:
        return [DASH] * len(TIMES)
    if found["invalid"]:
        return ["invalid"] * len(TIMES)
    stages = found["stages"]
    ratios = [share(stages[name]["ratio"]["median"]) if name in stages else DASH for name in ("prefill", "decode")]
    alone = [f"{stages[name]['this']['median']:.3g}" if name in stages else DASH for name in ("selection", "vision")]
    if "selection" in stages and bounded(found):
        alone[0] = f"≤ {alone[0]}"
    return [*ratios, *alone]


def bounded(found: Mapping[str, Any]) -> bool:
    """Whether the time of selection is an upper bound: on a GPU, as the record says unless it is older."""
    device = found.get("conditions", {}).get("before", {}).get("device")
    return "selection" in found.get("notes", ()) or device == "cuda"


def bound(tables: Sequence[Table]) -> bool:
    """Whether a bound is shown."""
    found = [timing(row) for table in tables for row in table.rows]
    return any("selection" in one.get("stages", ()) and not one["invalid"] and bounded(one) for one in found)


def invalid(table: Table) -> list[str]:
    """Why times in the table are invalid, one line per run."""
    found = []
    for run in table.runs:
        measured = (run.record.cost.timing or {}) if run.record.cost is not None else {}
        found += [f"INVALID TIMES: {run.folder}: {reason}" for reason in measured.get("invalid", ())]
    return found


def share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"
