"""The text below a table: warnings, what each column means, and where the numbers come from.

A table without its n, its hardware and its commit cannot be checked; these lines are made from the records only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from pdrop.commands import typed
from pdrop.record import RunSpec

from ..comparison.table_model import Table
from ..grid import DASH
from ..statistics import DRAWS
from ..store.load import Run
from ..style import task_names
from . import notes
from .costs import bound, invalid

COLUMNS = {
    "budget": "what rows are grouped by: the ratio dial (PyramidDrop keeps ratio^s from boundary s on; a single "
    "boundary keeps the ratio); the mean keep where ratios differ but keeps agree, or where layers differ. Equal "
    "ratios are NOT equal costs: read keep and FLOPs",
    "schedule": "layer:keep, the fraction of the original visual tokens that enters this layer (0-based) and those "
    "after it; a count ends in t",
    "keep": "visual tokens entering a layer / original ones, mean over layers and samples",
    "tokens": "visual tokens entering a layer, mean over layers and samples",
    "FLOPs": "prefill FLOPs of the whole model (vision tower, projector, decoder, selection) / with nothing dropped, "
    "closed form",
    "KV": "bytes of the KV cache after the prefill / with nothing dropped",
    "time": "prefill time / with nothing dropped, both measured in turn in one process: median and its 95 % "
    "interval (several seeds: mean of the medians, widest of the intervals). It is about seconds of one process, not "
    "about runs: with latency=quick equal work has differed by 10 points between runs; quote latency=full",
    "average": "plain mean over the tasks, in %; several seeds: mean ± standard deviation over seeds",
    "Δ none": "difference of the average to dropping nothing, in points, with its 95 % interval",
    "Δ random": "the same against dropping as many tokens at the same layers at random, same positions (twin=true), "
    "mean of its seeds; the interval covers the choice of images and of seeds. A dash where no such run is in the "
    "experiment",
    "against random": "above or below where that interval leaves out 0 and p of the exact McNemar test against its "
    "seeds (twice the median over them) is below 0.05, else not distinguishable; over how many seeds. One seed is an "
    "anecdote: no verdict; five or more are wanted",
    "lost, gained, p": "samples right without dropping and wrong with it, and the reverse; exact McNemar test, in "
    "which the samples of one image change direction together (a sign-flip test on images)",
    "of none": "average / average with nothing dropped",
    "floor to full": "0 is the run without visual tokens (method=no_image) if the table has one, or else the best "
    "blind guess; 100 is nothing dropped. Blind guess: the answer that is right most often in the training data for "
    "the question's wording, which may be a name of the question repeated, over the whole test split",
    "What it costs": "visual tokens entering each layer and their mean; the papers' multiply-adds (PyramidDrop's "
    "Eq. 5, visual tokens alone); FLOPs with attention as full squares and with the causal half; a decoding step and "
    "the cache after the prefill. Times: first token and a further one / with nothing dropped; milliseconds in the "
    "hooks, and of vision tower and projector. Times of conditions that differ, or of a device that others use, are "
    "marked invalid",
    "Answers": "same: answers that are those without dropping to the letter, with its 95 % interval; chrF: overlap of "
    "the n-grams of their characters (mean of sacrebleu's sentence scores); both need no right answers. invalid: "
    "answers that no rule of the task reads, which score as wrong",
    "by the benchmarks' own rules": "official_*: the benchmark's own reading of the same answers where lmms-eval's is "
    "another; exact_match, pope_f1_score, gpt_eval_score: lmms-eval's, where the table compares the official ones, as "
    "it does under protocol=official; circular and single pass: a question counts if all rotations of its options are "
    "answered right, or by its first row alone; mme_total_score: perception and cognition",
    "visual tokens x layers": "visual tokens entering a layer, and how many layers in a row so many enter",
    "Avg, MME/20": "the papers' average: MME's points count a twentieth; our average leaves points out",
    "n": "samples that the average is over",
}


def warnings(table: Table) -> list[str]:
    """Warnings that a reader must see before any number."""
    found = []
    done = [run for run in table.runs if run.done]
    dirty = [run.folder for run in done if run.record.environment.get("git_dirty")]
    if dirty:
        found.append(
            f"UNCOMMITTED CHANGES: {len(dirty)} of {len(done)} runs were made with uncommitted changes; "
            "their commit does not tell which code made them."
        )
    found += versions_of(done)
    for run in table.runs:
        if not run.done:
            reason = (run.record.error or "").strip().split("\n")[-1]
            found.append(f"{run.record.status.upper()}: {run.folder}{reason and f': {reason}'}")
    found += invalid(table)
    if table.missing:
        found.append(f"NOT RUN YET: {', '.join(table.missing)}")
    if table.superseded:
        found.append(
            f"Left out: {table.superseded} older runs that were made again with other weights, packages, code or data."
        )
    if any(run.record.rescored for run in done) and len({scored_by(run) for run in done}) > 1:
        found.append(
            "SCORED BY SEVERAL VERSIONS of the code or of lmms-eval: some runs were scored anew and others were not. "
            f"{typed('pdrop')} rescore scores all of them by the present one."
        )
    if not any(not row.drops and row.status == "done" for row in table.rows):
        found.append("No finished run drops nothing (method=none): there are no differences to show.")
    return found


def versions_of(done: Sequence[Run]) -> list[str]:
    """Warnings if runs were made by several versions of the code.

    A run's digest includes its method's own file, so it differs between methods: what must be the same are the
    package's sources, and the digest among the runs of one method.
    """
    package = {run.record.environment.get("sources") or run.record.spec.code for run in done}
    commits, told = {commit(run) for run in done}, f"which run has which: {typed('analysis')}"
    found = []
    if len(package) > 1:
        versions = ", ".join(sorted(code or "unknown" for code in package))
        found.append(f"SEVERAL VERSIONS OF THE CODE: {versions}; {told} explain RUN_ID.")
    else:
        for method in sorted({run.record.spec.method for run in done}):
            codes = {run.record.spec.code for run in done if run.record.spec.method == method}
            if len(codes) > 1:
                found.append(f"SEVERAL VERSIONS OF {method}: {', '.join(sorted(codes))}; {told} explain RUN_ID.")
    if len(commits) > 1 and (found or "" in package):  # one digest of the sources: one code
        found.append(f"SEVERAL COMMITS: {', '.join(sorted(commits))}; {told} list.")
    return found


def meaning(tables: Sequence[Table]) -> str:
    """Markdown after the tables: what their columns mean."""
    lines = ["## What the columns mean", ""]
    absent = {
        "time": not any(table.times for table in tables),
        "floor to full": not any(table.scaled for table in tables),
        "Avg, MME/20": not any("mme" in table.tasks for table in tables),
        "Answers": not any(table.tasks for table in tables),
        "by the benchmarks' own rules": not any(row.rules for table in tables for row in table.rows),
    }
    lines += [f"- **{name}**: {text}." for name, text in COLUMNS.items() if not absent.get(name)]
    if bound(tables):
        lines += [
            "- **≤**: what follows ≤ is an upper bound: on a GPU each hook is timed with the queue emptied before and "
            "after it."
        ]
    lines += [
        "- **↓ ↑**: clearly below or above dropping nothing: the 95 % interval of the paired difference leaves out 0, "
        "and p is below 0.05 where samples are right or wrong and a row is one run. Not corrected for the number of "
        "cells: of twenty cells without any effect, about one carries an arrow.",
        "- **bold**: the best of its budget and whatever is not distinguishable from it (by the paired difference, as "
        "an arrow is); *italic*: the best of the rest. Nothing is marked in a budget where no two rows are "
        "distinguishable.",
        f"- Intervals: paired percentile bootstrap over images ({DRAWS} draws; samples that share an image are drawn "
        "together, also across tasks). They cover the choice of samples, not the choice of seeds or of tasks.",
        "- –: not measured, or not defined; never zero.",
    ]
    return "\n".join(lines) + "\n"


def sources(table: Table) -> str:
    """Markdown after a table: what was scored, and where the numbers come from."""
    done = [run for run in table.runs if run.done]
    lines = ["## What was scored", ""]
    names = task_names(list(table.tasks))
    for task in table.tasks.values():
        result = next(run.record.results[task.name] for run in done if task.name in run.record.results)
        of = f"{task.n} of {task.n_total}" if task.n < task.n_total else f"all {task.n}"
        extra = "" if task.averaged else "; not in the average (no fraction, or lower is better)"
        if any((cell := row.cells.get(task.name)) and cell.score.low is None for row in table.rows):
            extra += "; no interval (what the score is made of is not known)"
        if (note := notes.of_task(task.name)) is not None:
            extra += f"; {note}"
        lines.append(
            f"- **{names[task.name]}**: `{task.name}` (version {result.version}), {task.metric}, {of} samples, data "
            f"`{result.data_hash[:12]}`{extra}"
        )
    lines += [f"- **{model}**: {note}" for model in table.models if (note := notes.of_model(model)) is not None]
    lines += ["", "## Where the numbers come from", "", *provenance(done), *prompts(done), *scored_anew(done)]
    return "\n".join(lines) + "\n"


def prompts(runs: Sequence[Run]) -> list[str]:
    """A note if the runs' own prompts, or the timed ones, are not the prompt that budgets and costs are for."""
    found = []
    for run in runs:
        cost = run.record.cost
        if cost is None or (own := cost.model_prompt) is None:  # older records do not say
            continue
        start = f"- Prompts of `{run.record.spec.model}`: budgets and costs are of {tokens_of(own)}; "
        scored = {"text": cost.text_tokens, "visual": cost.visual_tokens}
        for what, other in (("was scored (mean)", scored), ("was timed", cost.timed_prompt)):
            if other is not None and any(round(other[kind]) != round(own[kind]) for kind in own):
                found.append(f"{start}what {what} had {tokens_of(other)}")
    return list(dict.fromkeys(found))


def scored_by(run: Run) -> str:
    """Which code made the scores: sources and lmms-eval's version."""
    if run.record.rescored:
        last = run.record.rescored[-1]
        return f"{last.get('sources')} {(last.get('versions') or {}).get('lmms-eval')}"
    versions = json.loads(run.record.spec.versions or "{}")
    return f"{run.record.environment.get('sources')} {versions.get('lmms-eval')}"


def scored_anew(runs: Sequence[Run]) -> list[str]:
    """A line on runs whose stored answers were scored by another version of the code than asked them."""
    last = Counter(str(run.record.rescored[-1].get("at")) for run in runs if run.record.rescored)
    return [f"- Scored anew from stored answers: {count} runs at {at}" for at, count in sorted(last.items())]


def asked(table: Table) -> list[str]:
    """How the rows were asked, in words, by model if models differ; nothing under the checkpoint's own protocol, or if
    nothing was asked."""
    runs = [run for row in table.rows for run in row.runs if run.done and run.record.results]
    if not any(run.record.spec.protocol != "checkpoint" for run in runs):
        return []
    ways = {run.record.spec.model: asked_words(run) for run in runs}
    return (
        list(dict.fromkeys(ways.values())) if len(set(ways.values())) == 1 else [f"{m}: {w}" for m, w in ways.items()]
    )


def asked_words(run: Run) -> str:
    """Protocol and settings of a run, and which of them are not the protocol's own."""
    turned = run.record.environment.get("turned")
    return run.record.spec.asked_with + (f"; {', '.join(turned)} not as the protocol has it" if turned else "")


def tokens_of(prompt: Mapping[str, float]) -> str:
    return f"{prompt['visual']:.4g} visual tokens and {prompt['text']:.4g} of text"


def provenance(runs: list[Run]) -> list[str]:
    """Settings, machine, versions, code and dates of finished runs."""
    if not runs:
        return ["- no finished run"]
    spec, environment = runs[0].record.spec, runs[0].record.environment
    versions = {**environment.get("packages", {}), **json.loads(spec.versions or "{}")}
    models = sorted({f"`{run.record.spec.model}` (weights {run.record.spec.model_fingerprint[:12]})" for run in runs})
    starts = sorted(run.record.started_at for run in runs)
    codes = Counter(commit(run) for run in runs)
    limit = "all samples" if spec.limit is None else f"the first {spec.limit} samples of each task"
    return [
        f"- Model: {', '.join(models)}; {spec.dtype}, {attention_of(spec)} attention, batch {spec.batch_size}, "
        f"{limit}, seeds {numbers({r.record.spec.seed for r in runs})}",
        *[f"- Asked with: {how}" for how in dict.fromkeys(asked_words(run) for run in runs)],
        *[
            f"- Published numbers of {run.record.spec.model} were sampled ({drawn}); these answers are greedy"
            for run in {run.record.spec.model: run for run in runs}.values()
            if (drawn := run.record.environment.get("published_sampling"))
        ],
        f"- Hardware: {hardware(runs[0])}",
        f"- Versions: Python {environment.get('python', DASH)}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"- Code: {', '.join(f'{code} ({count} runs)' for code, count in sorted(codes.items()))}",
        f"- Made: {starts[0]}" + (f" to {starts[-1]}" if starts[-1] != starts[0] else ""),
        "- Each run's record: `runs/<folder>/record.json` of the store; in words: "
        f"`{typed('analysis')} explain RUN_ID`",
    ]


def attention_of(spec: RunSpec) -> str:
    """The backend, and which of torch's kernels came first if that was chosen."""
    return spec.attn_implementation + (f" ({spec.sdpa_kernel} first)" if spec.sdpa_kernel else "")


def hardware(run: Run) -> str:
    """The machine of a run."""
    environment = run.record.environment
    parts = [*dict.fromkeys([environment.get("device_name"), environment.get("processor")])]  # on the CPU they are one
    cores, threads = environment.get("cores"), environment.get("threads")
    parts += [
        f"{cores} cores" if cores else None,
        f"torch on {threads} thread{'s' if threads > 1 else ''}" if threads else None,
    ]
    return ", ".join([*(str(part) for part in parts if part), f"device {run.record.spec.device}"])


def commit(run: Run) -> str:
    """The code of a run: its commit, or the version of an installed package."""
    environment = run.record.environment
    if found := environment.get("git_commit"):
        return f"{found[:10]}{' + uncommitted changes' if environment.get('git_dirty') else ''}"
    return f"pdrop {environment.get('packages', {}).get('pdrop', 'of unknown version')}"


def numbers(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))
