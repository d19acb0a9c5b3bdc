"""A table as a frame and as CSV: every number and interval unrounded, one line per row."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ..comparison.table_model import Row, Table
from ..neutral import in_cell
from ..statistics import Estimate
from .table import by_layer


def csv(tables: Sequence[Table]) -> str:
    """Every number unrounded (10 digits), fractions as fractions; empty where missing."""
    whole = pd.concat([frame(table) for table in tables]).rename(columns=in_cell)
    return whole.map(in_cell).to_csv(index=False, float_format="%.10g", lineterminator="\n")


def frame(table: Table) -> pd.DataFrame:
    """The table as a frame, one line per row, for notebooks and for the CSV."""
    lines = []
    for row in table.rows:
        spec = row.spec
        line: dict[str, object] = {
            "experiment": table.name,
            "model": spec.model,
            "budget": row.budget,
            "method": spec.method,
            "method_args": spec.method_args,
            "schedule": spec.schedule,
            "positions": spec.positions,
            "status": row.status,
            "seeds": " ".join(str(run.record.spec.seed) for run in row.runs),
            "run_ids": " ".join(run.record.run_id for run in row.runs),
            "visual_tokens_per_layer_mean": row.visual_tokens,
            "visual_tokens_by_layer": by_layer(row),
            "average_spread_over_seeds": row.spread,
            "share_of_none": row.share_of_none,
            "floor_to_full": row.floor_to_full,
        }
        names = ("mean_keep", "visual_tokens", "text_tokens", "paper_macs_visual", "prefill_flops")
        for name in (*names, "prefill_flops_ratio", "kv_bytes", "kv_ratio"):
            line[name] = row.cost(name)
        line |= spread_out("prefill_time_ratio", row.time)
        line |= spread_out("average_minus_random", row.against_random)
        line |= {
            "against_random": row.told_from_random or None,
            "random_seeds": row.random_seeds or None,
            "random_band_low": row.random_band[0] if row.random_band else None,
            "random_band_high": row.random_band[1] if row.random_band else None,
            "random_mcnemar_p": row.against_random.p if row.against_random else None,
        }
        for name in ("average", *table.tasks):
            cell = row.average if name == "average" else row.cells.get(name)
            line |= spread_out(name, cell.score if cell else None)
            line |= spread_out(f"{name}_delta", cell.delta if cell else None)
            flips = cell.flips if cell else None
            line |= {
                f"{name}_lost": flips.lost if flips else None,
                f"{name}_gained": flips.gained if flips else None,
                f"{name}_mcnemar_p": flips.p if flips else None,
            }
        line |= answered(row, table)
        lines.append(line)
    return pd.DataFrame(lines)


def answered(row: Row, table: Table) -> dict[str, object]:
    """Columns for the similarity to the answers without dropping, invalid answers, and scores by other rules."""
    line: dict[str, object] = {}
    for name in ("average", *table.tasks):
        likeness = row.likeness_mean if name == "average" else row.likeness.get(name)
        line |= spread_out(f"{name}_same_answers", likeness.same if likeness else None)
        line[f"{name}_chrf"] = likeness.chrf if likeness else None
    line |= {f"{task}_invalid": row.invalid(task) for task in table.tasks}
    for task, metric in dict.fromkeys(key for other in table.rows for key in other.rules):
        line |= spread_out(f"{task}_{metric}", row.rules.get((task, metric)))
    return line


def spread_out(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """An estimate as three columns."""
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
