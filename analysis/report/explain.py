"""Runs in words: a list of all, where one run's numbers come from, and why two runs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

from pdrop.commands import typed
from pdrop.record import Interval
from pdrop.schedule import Schedule
from pdrop.store import state

from ..comparison.compare import between
from ..comparison.table_model import Row
from ..grid import DASH, Grid, Text
from ..store.load import Run
from ..studies.overlap import kept_sets, overlap
from ..tables.footnotes import attention_of, commit, hardware
from ..tables.text import bounds, percent, probability, signed

MEANING = {
    "model": "another model",
    "model_fingerprint": "other weights or processor files",
    "revision": "another revision of the checkpoint",
    "method": "another way to choose the tokens",
    "method_args": "other arguments of the method",
    "schedule": "other layers, or other numbers of tokens kept",
    "positions": "position ids after a drop: compact (renumbered) or original (with gaps)",
    "tasks": "other tasks: compare task by task only",
    "limit": "another number of samples: scores do not compare",
    "seed": "another seed: matters to random choices only",
    "batch_size": "padding may move a score in the last digits",
    "dtype": "other rounding",
    "attn_implementation": "other kernels, other rounding",
    "sdpa_kernel": "other attention kernels on the GPU, other rounding",
    "device": "other kernels, and times do not compare",
    "prompt": "other prompts: scores do not compare",
    "protocol": "another protocol (docs/protocols.md): scores do not compare",
    "system": "another system message: scores do not compare",
    "image_backend": "pictures prepared by another library: other pixels in the last digits",
    "image_placing": "pictures at other places of the question: scores do not compare",
    "stop": "answers may be longer or shorter",
    "min_pixels": "other sizes of pictures: scores do not compare",
    "max_pixels": "other sizes of pictures: scores do not compare",
    "max_tiles": "other tiles of pictures: scores do not compare",
    "frames": "other frames of a video: scores of videos do not compare",
    "frame_sampling": "other frames of a video: scores of videos do not compare",
    "fps": "other frames of a video: scores of videos do not compare",
    "frame_times": "other prompts of videos: their scores do not compare",
    "min_frame_pixels": "other sizes of frames: scores of videos do not compare",
    "max_frame_pixels": "other sizes of frames: scores of videos do not compare",
    "max_video_pixels": "other sizes of frames: scores of videos do not compare",
    "wrapper": "other prompts of some tasks: scores do not compare",
    "lengths": "answers may be longer or shorter",
    "max_new_tokens": "answers may be longer or shorter",
    "image_mode": "other image processing: scores do not compare",
    "versions": "other versions of the packages that matter",
    "code": "other sources of pdrop or of the method",
    "task_files": "other task files or data of one's own tasks",
    "latency": "timed by another protocol",
}


def find(runs: Sequence[Run], text: str) -> Run:
    """The run with this id or folder name, or a unique beginning of one.

    Raises:
        ValueError: If there is none, or several.
    """
    exact = [run for run in runs if text in (run.record.run_id, run.folder)]
    found = exact or [run for run in runs if run.record.run_id.startswith(text) or run.folder.startswith(text)]
    if len(found) == 1:
        return found[0]
    what = "no run" if not found else f"{len(found)} runs ({', '.join(run.folder for run in found)})"
    raise ValueError(f"{text!r} names {what}; {typed('analysis')} list shows all")


def overview(runs: Sequence[Run]) -> str:
    """All runs, newest last, as a Markdown table."""
    grid = Grid(
        "", ["run", "status", "model", "method", "schedule", "seed", "tasks", "mean score", "started", "code"], left=5
    )
    for run in sorted(runs, key=lambda run: (run.record.started_at, run.folder)):
        spec = run.record.spec
        scores = [run.score(task) for task in run.record.results]
        mean = percent(fmean(scores)) if run.done and scores and all(0 <= s <= 1 for s in scores) else DASH
        cells = [
            run.record.run_id,
            state(run.path, run.record.status, run.record.error),
            spec.model,
            spec.method,
            spec.schedule or DASH,
        ]
        cells += [str(spec.seed), str(len(spec.tasks)), mean, run.record.started_at, commit(run)]
        grid.rows.append([Text(cell) for cell in cells])
    return grid.markdown()


def explain(run: Run) -> str:
    """Where a run's numbers come from, in words."""
    record, spec = run.record, run.record.spec
    drops = f"drops visual tokens by {spec.method} at {spec.schedule}" if run.drops else "drops nothing"
    limit = "all samples" if spec.limit is None else f"the first {spec.limit} samples"
    text = [
        f"Run {record.run_id} ({run.path}) is {record.status}.",
        f"It {drops}, model {spec.model} ({spec.weights} weights, fingerprint {spec.model_fingerprint[:12]}), "
        f"positions {spec.positions}, method arguments {spec.method_args or '{}'}, seed {spec.seed}.",
        f"It asked {limit} of {len(spec.tasks)} tasks in {spec.dtype} with {attention_of(spec)} attention, batches of "
        f"{spec.batch_size}; asked with: {spec.asked_with}.",
        f"Code {commit(run)}, sources {spec.code or 'unknown'}; {hardware(run)}; "
        f"started {record.started_at}, took {record.wall_s:.0f} s.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in sorted(json.loads(spec.versions or '{}').items()))}.",
        f"Command: {' '.join(record.command) or 'not recorded'}",
    ]
    if record.error:
        text.append(f"Error: {record.error.strip()}")
    if record.results:
        anew = f", scored anew from stored answers at {record.rescored[-1].get('at')}" if record.rescored else ""
        text.append(f"Scores{anew}:")
    for task, result in record.results.items():
        main = result.scores[result.main_metric]
        others = [f"{name} {s.value:.4g}" for name, s in result.scores.items() if name != result.main_metric]
        text.append(
            f"  {task}: {result.main_metric} {main.value:.4f} over {main.n} of {result.n_total} samples"
            + ("" if result.invalid is None else f", {result.invalid} answers invalid")
            + (f" (also {', '.join(others)})" if others else "")
            + f"; data {result.data_hash[:12]}, prompts {result.prompt_hash[:12]}; answers: "
            f"{typed('analysis')} samples {record.run_id} {task}"
        )
    if cost := record.cost:
        layers = " ".join(f"{tokens:.4g}" for tokens in cost.visual_tokens_per_layer)
        text += [
            f"Cost, mean over {cost.samples} prompts: {cost.visual_tokens:.1f} visual and {cost.text_tokens:.1f} other "
            f"tokens; visual tokens entering layers 0, 1, ...: {layers}; "
            f"mean keep {percent(cost.mean_keep)} %.",
            f"  Prefill {cost.prefill_flops:.4g} FLOPs ({percent(cost.prefill_flops_ratio)} % of dropping nothing), "
            f"paper's count {cost.paper_macs_visual:.4g} MACs over visual tokens; KV cache {cost.kv_bytes:.4g} bytes "
            f"({percent(cost.kv_ratio)} %).",
        ]
        if cost.prefill_time_ratio:
            text.append(
                f"  Prefill time / dropping nothing: {timed(cost.prefill_time_ratio)}, interleaved in one process."
            )
    return "\n".join(text) + "\n"


def timed(measured: Interval) -> str:
    """A measured quantity in words."""
    return f"{measured.median:.3f} [{measured.low:.3f}, {measured.high:.3f}], median of {len(measured.values)}"


def diff(first: Run, second: Run) -> str:
    """Why two runs differ: settings, code, machine, and then scores, paired if both answered the same samples."""
    text = [f"A = {first.folder} ({first.record.status}), B = {second.folder} ({second.record.status})"]
    a, b = asdict(first.record.spec), asdict(second.record.spec)
    changed = [name for name in a if a[name] != b[name]]
    text.append("Settings that differ:" if changed else "Same settings.")
    text += [f"  {name}: {a[name]} | {b[name]} - {MEANING.get(name, 'part of the identity')}" for name in changed]
    left, right = first.record.environment, second.record.environment
    moved = [name for name in sorted({*left, *right} - {"time"}) if left.get(name) != right.get(name)]
    text.append("Environment that differs:" if moved else "Same code, machine and versions.")
    text += [f"  {name}: {left.get(name)} | {right.get(name)}" for name in moved]
    if not (first.done and second.done):
        return "\n".join([*text, "Scores: not compared, a run is not done."]) + "\n"
    text.append("Scores: A | B | B minus A [95 % interval], in points; lost: right in A, wrong in B")
    for task, result in first.record.results.items():
        other = second.record.results.get(task)
        if other is None:
            text.append(f"  {task}: only in A")
        elif differing := [
            n for n in ("data_hash", "prompt_hash", "version", "n") if getattr(result, n) != getattr(other, n)
        ]:
            text.append(f"  {task}: not compared, {' and '.join(differing)} differ")
        else:
            text.append(f"  {task}: {score_difference(first, second, task)}")
    text += [f"  {task}: only in B" for task in second.record.results if task not in first.record.results]
    text += agreement(first, second)
    return "\n".join(text) + "\n"


def agreement(first: Run, second: Run) -> list[str]:
    """The overlap of the kept sets of two runs, one line per boundary that both have."""
    left, right = (Schedule.parse(run.record.spec.schedule).stages for run in (first, second))
    if any(
        first.record.results[task].data_hash != result.data_hash
        for task, result in second.record.results.items()
        if task in first.record.results
    ):
        return []
    text = []
    for stage, (a, b) in enumerate(zip(left, right)):
        found = overlap(kept_sets(first, stage), kept_sets(second, stage))
        if found is not None:
            text.append(
                f"  boundary {a} | {b}: {percent(found.shared.value)} {bounds(found.shared)}, chance "
                f"{percent(found.chance)}, over {found.samples} samples"
            )
    head = "Kept sets: intersection over union in % [95 % interval], and what random sets of these sizes would share"
    return [head, *text] if text else []


def score_difference(first: Run, second: Run, task: str) -> str:
    """The scores on one task of two runs that answered the same samples, and their difference."""
    rows = [Row([run], "", run.record.status) for run in (first, second)]
    scores = [run.score(task) for run in (first, second)]
    change, flipped = between(rows[1], rows[0], [task])
    if change.low is None:
        text = f"{scores[0]:.4f} | {scores[1]:.4f} | {change.value:+.4f}"
        return f"{text} (no interval: what the score is made of is not known)"
    text = f"{percent(scores[0])} | {percent(scores[1])} | {signed(change)}"
    if flipped is None:
        return text
    return f"{text}; {flipped.lost} lost, {flipped.gained} gained, McNemar p {probability(flipped.p)}"
