"""The budgets that a table's rows are grouped by, so that only rows of about equal cost compete for the bold figure.

That is the ratio if every method was run with the same ones; the mean keep if the methods' ratios differ so that their
keeps agree (equal average tokens), or if one method has several choices of layers at one ratio (numbers of stages); and
the mean keep with the layers named if one mean keep comes from cuts at several layers (redundancy).
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.schedule import Schedule, canonical

from ..store.load import Run

Layers = tuple[int, ...]


def budgets(rows: Sequence[Sequence[Run]]) -> list[tuple[str, Layers]]:
    """The budget of each row of one model, given by its runs: its name, and its layers if they are part of it."""
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
    """The budget that was asked for, or the ratio of a schedule that keeps ratio^s after boundary s; otherwise None."""
    asked = run.overrides.get("budget", "")
    if asked not in ("", "null", "None"):
        return asked
    keeps = [stage.keep for stage in Schedule.parse(run.record.spec.schedule)]
    first = keeps[0]
    if first is None or any(k is None or canonical(first**s) != k for s, k in enumerate(keeps, start=1)):
        return None
    return f"{first:g}"


def kind(run: Run) -> str:
    """The kind of the budget that was asked for, "avg_tokens" or "flops"; "" without one."""
    asked = run.overrides.get("budget", "")
    return asked.partition(":")[0] if asked not in ("", "null", "None") else ""


def by_keep(runs: Sequence[Run], depth: int | None) -> str:
    """The mean keep in whole percent; for runs that are not done the schedule's, if it is known."""
    known = [run.record.cost.mean_keep for run in runs if run.record.cost]
    schedule = Schedule.parse(runs[0].record.spec.schedule)
    if not known and depth is not None and all(stage.keep is not None for stage in schedule):
        known = [schedule.mean_keep(depth)]
    return f"keep {sum(known) / len(known):.0%}" if known else "other"


def boundaries(run: Run) -> Layers:
    """The layers that a run drops at."""
    return Schedule.parse(run.record.spec.schedule).layers


def way(run: Run) -> tuple[str, str]:
    """The method's name together with its positions."""
    return run.record.spec.method, run.record.spec.positions


def mixed(names: Sequence[str], ways: Sequence[tuple[str, str]], layers: Sequence[Layers]) -> bool:
    """Whether one budget has one method with several choices of layers."""
    return len(set(zip(names, ways))) < len(set(zip(names, ways, layers)))
