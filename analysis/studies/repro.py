"""Our numbers next to the papers': which published numbers are reproduced, and which cannot be compared at all.

    python -m analysis repro            results/tables/repro.md and .csv; prints the Markdown (make repro)

`published.csv` holds every number of PyramidDrop's tables (arXiv 2410.17247, both versions), the LLaVA-1.5 and NeXT
rows that later papers compare with it, and rows of the other methods here: each with its unit, convention, paper,
version, table, row and disputes. One of our numbers is shown next to a paper's if model, method and task are the same.
The verdicts:

    reproduced       the printed value lies in our 95 % interval, widened by half a unit of the print's last digit;
                     without an interval (F1, sums): within 1 % of the printed value; costs: exact to the print's digits
    not reproduced   it does not
    other protocol   model, method and task agree, but not what was measured; the reason is given
    not run          no finished run of ours has model, method, budget and task
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import numpy as np

from pdrop.schedule import Schedule

from ..comparison.resampling import run_draws
from ..grid import DASH, Grid, Text
from ..neutral import in_cell, in_page
from ..statistics import Estimate, interval
from ..store.load import Run
from ..style import method_name

PUBLISHED = Path(str(files(__package__))) / "published.csv"
WITHOUT_INTERVAL = 0.01  # of the printed value
SAME_TOKENS = 0.03  # budgets this near count as one
SAME_KEEP = 2e-6  # fractions this near, too: less than a token of half a million
# what the papers' scripts did: images padded to a square, the conversation template with its system sentence
VERDICTS = ("reproduced", "not reproduced", "other protocol", "not run")


@dataclass(frozen=True)
class Published:
    """One printed number. `task` and `metric` are lmms-eval's (or a field of the record's cost); empty: no counterpart.

    `schedule` is in pdrop's canonical spelling, "?" if no code shows it; a `note` with method.NAME=VALUE asks for a run
    with that argument; `differs` says why no run of pdrop can be the same measurement.
    """

    paper: str
    version: str
    table: str
    row: str
    model: str
    trained: str
    method: str
    schedule: str
    tokens: str
    benchmark: str
    task: str
    metric: str
    value: str
    unit: str
    convention: str
    differs: str
    note: str

    @property
    def half_digit(self) -> float:
        """Half a unit of the last printed digit."""
        return 0.5 * 10.0 ** -len(self.value.partition(".")[2])


@dataclass(frozen=True)
class Verdict:
    """A printed number, ours (None without one), the run that ours comes from, and the verdict."""

    published: Published
    ours: Estimate | None
    run: Run | None
    verdict: str
    reason: str = ""


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """The published numbers, in the file's order.

    Raises:
        ValueError: If a column is missing or unknown, or a value is not a number.
    """
    with path.open(encoding="utf8", newline="") as file:
        reader = csv.DictReader(file)
        names = [f.name for f in fields(Published)]
        if reader.fieldnames != names:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {names}")
        found = [Published(**line) for line in reader]
    for number, entry in enumerate(found, start=2):
        try:
            float(entry.value)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {entry.value!r} is not a number") from error
    return found


def compare(published: Sequence[Published], runs: Sequence[Run]) -> list[Verdict]:
    """A verdict on each number that has a counterpart, in the same order."""
    return [judge(entry, runs) for entry in published if entry.metric]


def judge(entry: Published, runs: Sequence[Run]) -> Verdict:
    """The verdict on one number; of several runs the one nearest to the paper's protocol is compared."""
    judged = [
        (reasons(entry, run), run, ours)
        for run in runs
        if fits(entry, run) and (ours := measured(entry, run)) is not None
    ]
    if not judged:
        return Verdict(entry, None, None, "not run")
    why, run, ours = min(judged, key=lambda one: (len(one[0]), one[1].record.started_at))
    if why:
        return Verdict(entry, ours, run, "other protocol", "; ".join(why))
    return Verdict(entry, ours, run, "reproduced" if agrees(entry, ours) else "not reproduced")


def fits(entry: Published, run: Run) -> bool:
    """Whether the run has the entry's model, method and budget."""
    spec = run.record.spec
    if not run.done or spec.model != entry.model or spec.method != entry.method:
        return False
    if entry.schedule != "?":
        return same(Schedule.parse(spec.schedule), Schedule.parse(entry.schedule))
    cost = run.record.cost
    if cost is None or not entry.tokens:
        return False
    return abs(fmean(cost.visual_tokens_per_layer) / float(entry.tokens) - 1) <= SAME_TOKENS


def same(ours: Schedule, theirs: Schedule) -> bool:
    """Whether two schedules are equal up to their last digits: a budget's fractions have six, a paper's three."""
    if ours.layers != theirs.layers:
        return False
    pairs = list(zip(ours, theirs))
    if any((a.keep is None, a.tokens, a.adaptive) != (b.keep is None, b.tokens, b.adaptive) for a, b in pairs):
        return False
    return all(abs((a.keep or 0.0) - (b.keep or 0.0)) <= SAME_KEEP for a, b in pairs)


def measured(entry: Published, run: Run) -> Estimate | None:
    """Our value in the entry's unit; None if the run has none."""
    cost = run.record.cost
    if not entry.task:
        if cost is None:
            return None
        known = {
            "paper_macs_visual": cost.paper_macs_visual / 1e12,
            "visual_tokens": fmean(cost.visual_tokens_per_layer),
        }
        return Estimate(known[entry.metric]) if entry.metric in known else None
    result = run.record.results.get(entry.task)
    names = entry.metric.split("+")
    if result is None or not all(name in result.scores for name in names):
        return None
    names = [rule if (rule := by_official_rule(entry.task, name)) in result.scores else name for name in names]
    value = sum(result.share(name) for name in names)
    scale = 100 if entry.unit == "%" and 0 <= value <= 1 else 1
    drawn = [run_draws([run], entry.task, name)[0] for name in names]
    there = [one for one in drawn if one is not None]
    if len(there) < len(drawn):
        return Estimate(scale * value)
    return Estimate(scale * value, *interval(scale * np.sum(there, axis=0)))


def by_official_rule(task: str, metric: str) -> str:
    """The metric by the rule of published numbers, if lmms-eval's rule is another (pdrop/evaluation)."""
    if task == "pope" and metric == "pope_f1_score":
        return "official_f1"
    if task.startswith("mmbench") and metric == "gpt_eval_score":
        return "circular_accuracy"
    return "official_accuracy" if task in ("gqa", "scienceqa_img") else metric


def reasons(entry: Published, run: Run) -> list[str]:
    """Why the run's number is not the entry's, even if both have the same name."""
    spec, found = run.record.spec, [entry.differs] if entry.differs else []
    if entry.task:
        result = run.record.results[entry.task]
        if result.n < result.n_total:
            found.append(f"ours: {result.n} of {result.n_total} samples")
        if spec.weights != "pretrained":
            found.append(f"ours: {spec.weights} weights")
        arguments = json.loads(spec.method_args or "{}")
        for name, value in re.findall(r"method\.(\w+)=(\w+)", entry.note):
            if str(arguments.get(name)) != value:
                found.append(f"ours: method.{name}={arguments.get(name)}, not {value}")
        if spec.protocol != "official":
            found.append(f"ours: {spec.asked_with}; published numbers are made with protocol=official")
        elif turned := run.record.environment.get("turned"):
            found.append(f"ours: {', '.join(turned)} not as the official protocol has it ({spec.asked_with})")
        elif drawn := run.record.environment.get("published_sampling"):
            found.append(f"published answers were sampled ({drawn}), ours are greedy")
    return found


def agrees(entry: Published, ours: Estimate) -> bool:
    """Whether the printed value could be ours rounded, or is in our interval."""
    printed, slack = float(entry.value), entry.half_digit * (1 + 1e-9)
    if not entry.task:
        return abs(ours.value - printed) <= slack
    if ours.low is None or ours.high is None:
        return abs(ours.value - printed) <= max(slack, WITHOUT_INTERVAL * abs(printed))
    return ours.low - slack <= printed <= ours.high + slack


def page(verdicts: Sequence[Verdict], published: Sequence[Published]) -> str:
    """The whole comparison as Markdown: counts, and every printed number with one of ours."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    head = ["paper", "table", "row", "benchmark", "printed", "ours [95 %]", "verdict", "why, disputes", "run"]
    grid = Grid("Published and ours", head, left=4)
    for one in verdicts:
        entry = one.published
        if one.run is None or one.ours is None:
            continue
        source = " ".join(part for part in (entry.paper, entry.version) if part)
        why = "; ".join(text for text in (one.reason, entry.convention, entry.note) if text)
        cells = [source, entry.table, entry.row, entry.benchmark, f"{entry.value} {entry.unit}", shown(entry, one.ours)]
        grid.rows.append([Text(text) for text in [*cells, one.verdict, why or DASH, one.run.record.run_id]])
    alone = len(published) - len(verdicts)
    lines = [
        "# repro",
        "",
        f"{len(published)} published numbers: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        + f"; {alone} have no counterpart in this harness (averages, training hours, judged answers).",
        "",
        waiting(verdicts),
        *(["", grid.markdown()] if grid.rows else []),
        "Reproduced: the printed value lies in our 95 % bootstrap interval, widened by half a unit of its last digit; "
        f"without an interval within {WITHOUT_INTERVAL:.0%}; costs to the printed digits. All numbers and their "
        "sources: analysis/studies/published.csv.",
    ]
    return in_page("\n".join(lines) + "\n")


def waiting(verdicts: Sequence[Verdict]) -> str:
    """A sentence on which further runs could be compared."""
    open_ = [one.published for one in verdicts if one.verdict == "not run" and not one.published.differs]
    ways = dict.fromkeys(
        (entry.model, method_name(entry.method), entry.schedule or "nothing dropped") for entry in open_
    )
    listed = "; ".join(" ".join(way) for way in ways)
    return f"Comparable, but not run: {listed}." if ways else "Everything that can be compared has been run."


def shown(entry: Published, ours: Estimate) -> str:
    """Our value with one digit more than the printed one, and its interval."""
    digits = len(entry.value.partition(".")[2]) + (not entry.task)
    text = f"{ours.value:.{digits}f}"
    return text if ours.low is None else f"{text} [{ours.low:.{digits}f}, {ours.high:.{digits}f}]"


def table(verdicts: Sequence[Verdict]) -> str:
    """Every verdict as CSV, the published columns first."""
    buffer = io.StringIO()
    names = [f.name for f in fields(Published)]
    writer = csv.DictWriter(
        buffer, [*names, "ours", "ours_low", "ours_high", "verdict", "reason", "run_id"], lineterminator="\n"
    )
    writer.writeheader()
    for one in verdicts:
        line: Mapping[str, object] = {name: getattr(one.published, name) for name in names}
        held = {"ours": one.ours.value, "ours_low": one.ours.low, "ours_high": one.ours.high} if one.ours else {}
        numbers = {name: f"{value:.10g}" for name, value in held.items() if value is not None}
        run_id = one.run.record.run_id if one.run else ""
        line = {**line, **numbers, "verdict": one.verdict, "reason": one.reason, "run_id": run_id}
        writer.writerow({name: in_cell(value) for name, value in line.items()})
    return buffer.getvalue()
