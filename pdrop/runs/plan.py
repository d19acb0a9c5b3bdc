"""The plan of a sweep: its runs, which of them are done, and about how long the rest takes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from pdrop.pace import duration
from pdrop.record import RunRecord, RunSpec
from pdrop.runs.remembered import Known
from pdrop.runs.settings import Settings
from pdrop.store import state

log = logging.getLogger("pdrop")

# runs that differ only in these take about equally long
UNLIKE = {"method", "method_args", "schedule", "positions", "seed", "versions", "code", "task_files", "format"}
ALIKE = tuple(field.name for field in fields(RunSpec) if field.name not in UNLIKE)
AGAIN = ("failed", "stopped")  # the states that retry=failed repeats


@dataclass
class Planned:
    """A run that is asked for.

    Attributes:
        words: The command-line overrides of its job, in Hydra's syntax.
        run: The run that they mean; None if they mean none (`error`), or one that is only known after measuring.
        record: Its record in the store.
        force: Whether to repeat it even if it is done.
        error: Why its overrides are refused.
        jobs: How many jobs of the sweep mean this run.
        label: What distinguishes it from the sweep's other runs.
        seconds: About how long it will take; None: the store has no similar run.
    """

    words: tuple[str, ...]
    run: Settings | Known | None = None
    record: RunRecord | None = None
    force: bool = False
    error: str | None = None
    jobs: int = 1
    label: str = ""
    seconds: float | None = None

    @property
    def state(self) -> str:
        """done, running, failed, stopped, waiting or refused."""
        if self.error is not None:
            return "refused"
        if self.run is None or self.record is None:
            return "waiting"
        found = state(self.run.folder, self.record.status, self.record.error)
        return "waiting" if found == "done" and self.force else found

    @property
    def prefill(self) -> tuple[float, float] | None:
        """FLOPs of its prefill and their ratio to the unpruned prefill: as counted, else for the model's prompt.

        None if the prompt's size is not known.
        """
        if self.record is not None and self.record.cost is not None:
            return self.record.cost.prefill_flops, self.record.cost.prefill_flops_ratio
        if not isinstance(self.run, Settings):
            return None
        from pdrop.cost.flops import cost

        settings, source = self.run, self.run.source
        one = source.one_image
        if one is None:
            return None
        left = one.times(settings.protocol.images).under(settings.method, settings.schedule, source.layers)
        found = cost(source.sizes, [left], settings.schedule, settings.method, 4)
        return found.prefill_flops, found.prefill_flops_ratio


def different(planned: Iterable[Planned]) -> list[Planned]:
    """Jobs that mean the same run merged into one: the last job's words, in the place of the first."""
    found: dict[str, Planned] = {}
    for number, one in enumerate(planned):
        name = one.run.spec.run_id if one.run is not None else f"{number}"
        if name in found:
            one.jobs += found[name].jobs
        found[name] = one
    return list(found.values())


def estimate(planned: Sequence[Planned]) -> None:
    """Fill in `seconds` of runs that are not done, from similar finished runs in the store."""
    taken: dict[Path, list[RunRecord]] = {}
    for one in planned:
        if one.run is None or one.state == "done":
            continue
        if one.run.results not in taken:
            taken[one.run.results] = list(_finished(one.run.results))
        one.seconds = expected(one.run.spec, taken[one.run.results])


def expected(spec: RunSpec, finished: Sequence[RunRecord]) -> float | None:
    """Seconds that a run will take: the median of similar runs, of the same method if there are any."""
    alike = [one for one in finished if all(getattr(one.spec, name) == getattr(spec, name) for name in ALIKE)]
    alike = [one for one in alike if one.spec.method == spec.method] or alike
    return median(one.wall_s for one in alike) if alike else None


def left(planned: Iterable[Planned]) -> float | None:
    """Seconds that these take together; None if one of them is unknown."""
    seconds = [one.seconds for one in planned]
    return None if None in seconds else sum(one or 0 for one in seconds)


def lines(planned: Sequence[Planned]) -> list[str]:
    """The plan as text: a line for each run, then the total."""
    found = [f"{'state':8s} {'run':12s} {'prefill FLOPs':>19s} {'about':>7s}  method and schedule"]
    for one in planned:
        if one.run is None:
            found.append(
                f"{one.state:8s} {one.label}: {one.error or 'its budget is found by measuring, when it is run'}"
            )
            continue
        spec, flops = one.run.spec, one.prefill
        counted = "-" if flops is None else f"{in_units(flops[0])} x{flops[1]:.3f}"
        takes = "" if one.state == "done" else "?" if one.seconds is None else duration(one.seconds)
        found.append(
            f"{one.state:8s} {spec.run_id:12s} {counted:>19s} {takes:>7s}  {spec.method} {spec.schedule or '-'}"
        )
    return [*found, total(planned)]


def total(planned: Sequence[Planned]) -> str:
    """How many runs there are, how many are done, and about how long the rest takes."""
    rest = [one for one in planned if one.state not in ("done", "refused")]
    jobs = sum(one.jobs for one in planned)
    counts = {name: sum(one.state == name for one in planned) for name in ("done", "refused")}
    parts = [f"{counts['done']} done", *([f"{counts['refused']} refused"] if counts["refused"] else [])]
    seconds = left(rest)
    takes = "no run like them has been timed here yet" if seconds is None else f"about {duration(seconds)}"
    parts.append(f"{len(rest)} to do{f' ({takes})' if rest else ''}")
    what = f"{len(planned)} run{'s' * (len(planned) != 1)}" + (f" of {jobs} jobs" if jobs > len(planned) else "")
    return f"{what}: {', '.join(parts)}"


def in_units(flops: float) -> str:
    """FLOPs with their unit."""
    for size, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops / 1e6:.1f} MFLOP"


def _finished(results: Path) -> Iterable[RunRecord]:
    for path in sorted(results.glob("runs/*/record.json")):
        try:
            record = RunRecord.read(path.parent)
        except ValueError as error:
            log.debug("no estimate from it: %s", error)
            continue
        if record.status == "done":
            yield record
