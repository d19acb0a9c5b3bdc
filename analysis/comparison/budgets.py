"""What a table's rows are grouped by, so that only rows of about equal cost compete for the bold figure.

The ratio, where every method was given the same ones. The mean keep, where the methods' ratios differ so that their
keeps agree (equal average tokens), or one method has several layers at one ratio (numbers of stages). With the layers
named, where one mean keep comes from cuts at several layers (redundancy).
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.schedule import Schedule, canonical

from ..store.load import Run

Layers = tuple[int, ...]


def budgets(rows: Sequence[Sequence[Run]]) -> list[tuple[str, Layers]]:
    """Of each row of one model, given by its runs: the budget's name, and its layers where they are part of it."""
    dropping = [runs for runs in rows if runs[0].drops]
    layers = [boundaries(runs[0]) for runs in dropping]
    ways = [way(runs[0]) for runs in dropping]
    depth = next((len(run.record.cost.tokens_per_layer) for runs in rows for run in runs if run.record.cost), None)
    keeps = [by_keep(runs, depth) for runs in dropping]
    ratios = [ratio(runs[0]) or keep for runs, keep in zip(dropping, keeps)]
    named = ratios if not mixed(ratios, ways, layers) and len(set(ratios)) <= len(set(keeps)) else keeps
    placed = mixed(named, ways, layers)
    found = iter([(f"{n} at {'/'.join(map(str, at))}", at) if placed else (n, ()) for n, at in zip(named, layers)])
    return [next(found) if runs[0].drops else ("", ()) for runs in rows]


def ratio(run: Run) -> str | None:
    """The budget asked for, or the ratio of a schedule that keeps ratio^s after boundary s; None for any other."""
    asked = run.overrides.get("budget", "")
    if asked not in ("", "null", "None"):
        return asked
    keeps = [stage.keep for stage in Schedule.parse(run.record.spec.schedule)]
    first = keeps[0]
    if first is None or any(k is None or canonical(first**s) != k for s, k in enumerate(keeps, start=1)):
        return None
    return f"{first:g}"


def kind(run: Run) -> str:
    """What the budget asked for was equal in, "avg_tokens" or "flops"; "" where no budget was asked for."""
    asked = run.overrides.get("budget", "")
    return asked.partition(":")[0] if asked not in ("", "null", "None") else ""


def by_keep(runs: Sequence[Run], depth: int | None) -> str:
    """The mean keep in whole percent; of runs that are not done the schedule's, if it tells."""
    known = [run.record.cost.mean_keep for run in runs if run.record.cost]
    schedule = Schedule.parse(runs[0].record.spec.schedule)
    if not known and depth is not None and all(stage.keep is not None for stage in schedule):
        known = [schedule.mean_keep(depth)]
    return f"keep {sum(known) / len(known):.0%}" if known else "other"


def boundaries(run: Run) -> Layers:
    """The layers that a run drops at."""
    return Schedule.parse(run.record.spec.schedule).layers


def way(run: Run) -> tuple[str, str]:
    """The method and its positions."""
    return run.record.spec.method, run.record.spec.positions


def mixed(names: Sequence[str], ways: Sequence[tuple[str, str]], layers: Sequence[Layers]) -> bool:
    """Whether one budget holds one method at several choices of layers."""
    return len(set(zip(names, ways))) < len(set(zip(names, ways, layers)))
