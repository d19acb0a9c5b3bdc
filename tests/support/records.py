"""A made-up results folder for the tests of analysis/: nine finished runs in seven rows of a table, one failed run."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.comparison.comparable import parts, refuse_mixtures
from analysis.comparison.compare import compare
from analysis.store.load import Run, load_experiment, load_runs
from pdrop.record import Cost, Interval, RunRecord, RunSpec, Score, TaskResult
from pdrop.schedule import Schedule, pyramid, single

LAYERS, VISUAL = 12, 64
TASKS = ("toy_exist", "toy_count", "toy_ocr")
STRENGTH = {"none": 0.0, "pyramiddrop": 0.15, "fastv": 0.35, "random": 0.6}


def schedule_of(method: str, ratio: float) -> Schedule:
    """The method's own schedule at a ratio."""
    if method == "none":
        return Schedule()
    return single(2, ratio) if method == "fastv" else pyramid(LAYERS, ratio=ratio)


def make_record(
    method: str, ratio: float, tasks: tuple[str, ...] = TASKS, at: int | None = None, **spec_changes: Any
) -> RunRecord:
    """A finished run without results; cost as its schedule gives: the method's own, or one cut at layer `at`."""
    schedule = schedule_of(method, ratio) if at is None else single(at, ratio)
    spec = RunSpec(
        model="toy", model_path="toy", revision=None, weights="pretrained", model_fingerprint="f" * 64,
        method=method, method_args='{"seed":0}' if method == "random" else "{}", schedule=str(schedule),
        positions="compact" if schedule else "original", tasks=tasks, limit=None, seed=0, batch_size=8,
        dtype="float32", attn_implementation="sdpa", device="cpu", prompt="chat", image_mode="crop",
        max_new_tokens=16, latency="quick" if schedule else "off", versions='{"torch":"2.15.0"}',
    )  # fmt: skip
    tokens = [float(n) for n in schedule.tokens_per_layer(VISUAL, LAYERS)]
    keep = schedule.mean_keep(LAYERS)
    share = 0.2 + 0.8 * keep
    ratio_ms = Interval("ratio", 1.02 * share, 0.01, 1.02 * share - 0.012, 1.02 * share + 0.012, [1.02 * share] * 5)
    cost = Cost(
        samples=30, text_tokens=20.0, visual_tokens=float(VISUAL), visual_tokens_per_layer=tokens,
        tokens_per_layer=[n + 20 for n in tokens], mean_keep=keep, paper_macs_visual=1e9 * keep,
        prefill_flops=4e9 * share, prefill_flops_ratio=share, kv_bytes=1e6 * keep, kv_ratio=keep,
        prefill_time_ratio=ratio_ms if schedule else None,
    )  # fmt: skip
    environment = {
        "time": "2026-01-02T03:04:05Z", "python": "3.12.1", "packages": {"pdrop": "0.1.0", "numpy": "2.4.6"},
        "processor": "Test CPU", "cores": 2, "threads": 1, "git_commit": "0123456789abcdef", "git_dirty": False,
    }  # fmt: skip
    command = ["run.py", f"method={method}"]
    record = RunRecord(spec, "done", "2026-01-02T03:04:05Z", 12.0, None, {}, cost, environment, command)
    if spec_changes.get("latency") == "off":
        cost.prefill_time_ratio = None
    if "seed" in spec_changes:
        spec_changes["method_args"] = json.dumps({"seed": spec_changes["seed"]})
    return replace(record, spec=replace(spec, **spec_changes))


def answers(record: RunRecord, task: str, n: int) -> np.ndarray:
    """Right or wrong per sample: dropping loses what the model knows, the same hard samples first for every method."""
    number = record.spec.tasks.index(task)
    task_rng = np.random.default_rng([7, number])
    knows = task_rng.random(n) < 0.95 - 0.4 * number / len(record.spec.tasks)
    hardness, luck = task_rng.random(n), np.random.default_rng([8, number, record.spec.seed, len(record.spec.method)])
    keep = record.cost.mean_keep if record.cost else 1.0
    lost = hardness + 0.15 * luck.standard_normal(n) < STRENGTH[record.spec.method] * (1 - keep) * (0.3 + 0.35 * number)
    won = luck.random(n) < 0.03
    return (knows & ~lost | won if record.spec.method != "none" else knows).astype(float)


def masks(record: RunRecord, doc_id: int) -> list[str]:
    """One bit mask per boundary: the same ranking at every layer, but a random method draws anew at each."""
    blind = record.spec.method.startswith("random")
    return list(_masks(record.spec.schedule, record.spec.seed if blind else None, doc_id))


@functools.cache  # asked for every task and every store
def _masks(schedule: str, seed: int | None, doc_id: int) -> tuple[str, ...]:
    found, alive = [], list(range(VISUAL))
    for stage in Schedule.parse(schedule):
        draw = np.random.default_rng([9, doc_id, *([] if seed is None else [stage.layer, seed])])
        order = draw.permutation(VISUAL)
        alive = sorted(alive, key=lambda token, order=order: order[token])[: int(VISUAL * stage.keep)]
        found.append(f"{sum(1 << token for token in alive):x}")
    return tuple(found)


def put(results: Path, record: RunRecord, n: int = 60, experiment: str | None = "demo", **marker: str) -> Path:
    """Store a record with its samples and marker, as a run does."""
    folder = results / "runs" / record.spec.folder
    if record.status == "done":
        for task in record.spec.tasks:
            values = answers(record, task, n)
            score = {"acc": Score(float(values.mean()), n), "chars": Score(3.0, n)}
            record.results[task] = TaskResult(score, n, 2 * n, "1.0", f"data-{task}", f"prompt-{task}", "acc")
            lines = [
                json.dumps(
                    {"doc_id": i, "question": f"{task}, number {i}?", "prompt": "<image> ?", "target": "yes"}
                    | {"answer": "yes" if value else "no", "scores": {"acc": value, "chars": 3.0}}
                    | {"image": f"image{i // 2}", "visual_tokens": VISUAL, "kept": masks(record, i)}
                )
                for i, value in enumerate(values)
            ]
            path = folder / "samples" / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    record.write(folder)
    if experiment:
        path = results / "experiments" / experiment / record.spec.folder
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(marker))
    return folder


def fill(results: Path, ratios: tuple[float, ...] = (0.5, 0.3), seeds: int = 2, **options: Any) -> None:
    """none, and pyramiddrop, fastv, random (several seeds) at each ratio, one of them failed."""
    tasks = options.pop("tasks", TASKS)
    put(results, make_record("none", 1.0, tasks), **options)
    for ratio in ratios:
        put(results, make_record("pyramiddrop", ratio, tasks), **options)
        put(results, make_record("fastv", ratio, tasks), **options)
        for seed in range(seeds):
            put(results, make_record("random", ratio, tasks, seed=seed), **options)


def grid(results: Path, layers: tuple[int, ...] = (1, 3, 6, 9), keeps: tuple[float, ...] = (0, 0.1, 0.25, 0.5)) -> Path:
    """The store of a redundancy study: one cut at each layer with each keep, ranked and random; returns the folder."""
    put(results, make_record("none", 1.0), experiment="cuts")
    for layer in layers:
        for keep in keeps:
            put(results, make_record("pyramiddrop", keep, at=layer), experiment="cuts")
            put(results, make_record("random", keep, at=layer), experiment="cuts")
    return results


def standard(results: Path) -> Path:
    """The store that most tests start from; returns the folder."""
    fill(results)
    failed = make_record("fastv", 0.1)
    failed.status, failed.cost = "failed", None
    failed.error = "Traceback\n  File x\nRuntimeError: toy_ocr, doc 3: no memory"
    put(results, failed)
    return results


def table_of(results: Path, name: str = "demo") -> Any:
    """The experiment's table, as the command line makes it."""
    experiment = load_experiment(results, name)
    (part,) = parts(experiment)
    refuse_mixtures(experiment, part.runs)
    return compare(part, experiment.superseded, floors_from=results)


def run_of(results: Path, method: str, keep: str = "") -> Run:
    """The first run of a method at a schedule that contains `keep`."""
    return next(r for r in load_runs(results) if r.record.spec.method == method and keep in r.record.spec.schedule)


def rewrite(run: Run, experiment: str = "demo", **changes: Any) -> None:
    """Replace a stored run by one whose spec, environment or first result differs."""
    results, record, samples = run.path.parent.parent, run.record, run.path / "samples"
    spec = {k: v for k, v in changes.items() if hasattr(record.spec, k)}
    first = next(iter(record.results.values()))
    for key, value in changes.items():
        if key not in spec:
            if hasattr(first, key):
                setattr(first, key, value)
            else:
                record.environment[key] = value
    changed = replace(record, spec=replace(record.spec, **spec))
    folder = results / "runs" / changed.spec.folder
    changed.write(folder)
    if folder != run.path:
        shutil.copytree(samples, folder / "samples")
        shutil.rmtree(run.path)
        (results / "experiments" / experiment / run.folder).unlink()
        (results / "experiments" / experiment / folder.name).write_text("[]")
