"""Where dropping stops paying: the speed-up of a whole answer, over batch size, output length and number of images.

From runs that timed answers of several lengths, interleaved with the unpruned model (`latency.new_tokens`). The
speed-up is the unpruned model's time / this one's: above 1 dropping pays. Experiments without a task are shown this
way, as their runs differ in settings that must be equal in a table of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile

from pdrop.record import differing_conditions

from ..grid import DASH, Grid, Text
from ..neutral import in_page
from ..store.load import Experiment, Run, timing
from ..style import method_name
from ..tables.footnotes import provenance


@dataclass(frozen=True)
class Curve:
    """One run: its speed-up at each output length, with the bounds of its 95 % interval."""

    run: Run
    batch: int
    images: int
    lengths: tuple[int, ...]
    speedup: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def valid(self) -> bool:
        """Whether the measurement's conditions held."""
        return not timing(self.run)["invalid"]

    @property
    def name(self) -> str:
        """The method and its schedule."""
        return f"{method_name(self.run.record.spec.method)} {self.run.record.spec.schedule}"

    @property
    def pays_until(self) -> int | None:
        """The longest answer up to which every interval is above 1; None if the shortest one's is not."""
        paying = [length for length, _ in takewhile(lambda at: at[1] > 1, zip(self.lengths, self.low))]
        return paying[-1] if paying else None


def shown_here(experiment: Experiment) -> bool:
    """Whether an experiment is only about answers' times."""
    done = [run for run in experiment.runs if run.done]
    return any(timing(run).get("end_to_end") for run in done) and not any(run.record.spec.tasks for run in done)


def curves(runs: Sequence[Run]) -> list[Curve]:
    """The runs that timed answers, by model, method, images and batch.

    Raises:
        ValueError: If they were measured under different conditions.
    """
    timed = [run for run in runs if run.done and timing(run).get("end_to_end")]
    for one, other in combinations(timed, 2):
        if differ := differing_conditions(*(timing(run)["conditions"]["before"] for run in (one, other))):
            raise ValueError(f"these times may not be compared. {differ[0]} ({one.folder}, {other.folder})")
    found = []
    for run in timed:
        times = timing(run)["end_to_end"]
        lengths = tuple(sorted(map(int, times)))
        ratios = [times[str(length)]["ratio"] for length in lengths]
        found.append(
            Curve(
                run,
                timing(run)["batch"],
                timing(run)["images"],
                lengths,
                tuple(1 / ratio["median"] for ratio in ratios),
                tuple(1 / ratio["high"] for ratio in ratios),
                tuple(1 / ratio["low"] for ratio in ratios),
            )
        )
    return sorted(found, key=lambda c: (c.run.record.spec.model, c.name, c.images, c.batch))


def grid(found: Sequence[Curve]) -> Grid:
    """Speed-ups, one row per run, one column per output length."""
    lengths = sorted({length for curve in found for length in curve.lengths})
    head = ["model", "method", "images", "batch", "tokens", "FLOPs %", "KV %"]
    shown = Grid("Speed-up of a whole answer", [*head, *map(str, lengths), "pays until", "run"], left=2)
    before: tuple[str, str] | None = None
    for curve in found:
        record = curve.run.record
        if before not in (None, (record.spec.model, curve.name)):
            shown.rules.add(len(shown.rows))
        before = (record.spec.model, curve.name)
        cost = record.cost
        assert cost is not None
        cells = dict(zip(curve.lengths, zip(curve.speedup, curve.low, curve.high)))
        texts = ["{:.2f} [{:.2f}, {:.2f}]".format(*cells[n]) if n in cells else DASH for n in lengths]
        start = [record.spec.model, curve.name, str(curve.images), str(curve.batch), f"{cost.visual_tokens:.0f}"]
        start += [f"{100 * cost.prefill_flops_ratio:.1f}", f"{100 * cost.kv_ratio:.1f}"]
        until = "invalid" if not curve.valid else DASH if curve.pays_until is None else str(curve.pays_until)
        shown.rows.append([*map(Text, [*start, *texts, until, record.run_id])])
    return shown


def page(experiment: Experiment) -> str:
    """The page in Markdown: the table, how to read it, what makes it invalid, and its sources."""
    found = curves(experiment.runs)
    doubts = sorted({f"{c.run.folder}: {reason}" for c in found for reason in timing(c.run)["invalid"]})
    doubts += [f"{run.record.status.upper()}: {run.folder}" for run in experiment.runs if not run.done]
    doubts += [f"NOT RUN YET: {name}" for name in experiment.missing]
    spread = sorted({c.run.record.spec.latency for c in found})
    lines = [
        f"# {experiment.name}\n",
        *(f"> **{text}**\n" for text in doubts),
        "## Speed-up of a whole answer, by its length in tokens\n",
        grid(found).markdown(),
        "Time of the unpruned model / time with dropping, from the call to the last token, both in turns in one "
        "process on the same inputs: median and 95 % bootstrap interval of the paired ratios. Above 1 dropping pays. "
        "Preprocessing is not in it. **pays until**: the longest answer up to which the interval lies above 1; "
        "**invalid**: the measurement does not count, for the reason given above the table.\n",
        "It does not tell of servers, where prompts of many users share a forward, nor of other hardware.\n",
        f"Protocol: {'; '.join(spread)}.\n",
        "## Where the numbers come from\n",
        *provenance([c.run for c in found]),
    ]
    return in_page("\n".join(lines) + "\n")
