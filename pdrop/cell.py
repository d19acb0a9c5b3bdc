"""One cell of a sweep: find it done, or score, count and time it, and write its record.

Plain arguments come in, a RunRecord and a folder under results/runs/ come out. A finished cell is skipped; one that
was killed goes on from its stored answers; one that fails keeps its error and raises.
"""

from __future__ import annotations

import functools
import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrop.environment import environment
from pdrop.record import RunRecord, RunSpec, write_atomically
from pdrop.schedule import Schedule
from pdrop.settings import Settings, identity

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint
    from pdrop.methods.base import Method

log = logging.getLogger("pdrop")

QUESTION = "What is shown in this picture, and where in it? Answer with a single word or phrase."
NOISE_SIDE = 336  # pixels of the square picture that is timed; the processor resizes it to what the model takes


class RunFailed(RuntimeError):
    """A run that started and did not finish; its record holds the traceback."""


def run_cell(
    settings: Settings,
    method_name: str,
    method: Method | None,
    make_schedule: Callable[[int], Schedule],
    overrides: Sequence[str] = (),
) -> RunRecord:
    """Do one run, or find it done.

    Args:
        settings: What to run it on.
        method_name: What tables call the method.
        method: Ranks the visual tokens; None drops nothing.
        make_schedule: The schedule for a decoder of that many layers.
        overrides: The command line's, for the record.

    Raises:
        ValueError: If something asked for cannot be had; nothing has been written then.
        RunFailed: If the run broke; its record says status "failed" and holds the traceback.
    """
    from pdrop import evaluate

    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit is a number of samples from 1 on, or null for all, not {settings.limit}")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size is a number of prompts from 1 on, not {settings.batch_size}")
    evaluate.check_tasks(settings.tasks, settings.task_folders)
    fingerprint, layers = describe(settings.path, settings.revision, settings.weights, weight_seed(settings))
    schedule = make_schedule(layers)
    spec = identity(settings, method_name, method, schedule, fingerprint)
    folder = settings.results / "runs" / spec.folder
    if (folder / "record.json").exists() and not settings.force:
        record = RunRecord.read(folder)
        if record.status == "done":
            mark(settings, spec, overrides)
            log.info("done already  %s", summary(record, folder))
            return record
    checkpoint = load(settings)
    if settings.force:
        (folder / "answers.jsonl").unlink(missing_ok=True)
    mark(settings, spec, overrides)
    record = RunRecord(spec, "running", started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    record.environment, record.command = environment() | accelerator(settings.device), ["run.py", *overrides]
    record.write(folder)
    log.info("running       %s  %s", f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]", folder)
    started = time.perf_counter()
    try:
        measure(record, checkpoint, method, schedule, settings, folder)
    except BaseException as error:  # also an interrupt: the record must not say "running" for ever
        record.status, record.error, record.wall_s = "failed", traceback.format_exc(), time.perf_counter() - started
        record.write(folder)
        if not isinstance(error, Exception):
            raise
        raise RunFailed(
            f"{spec.folder} failed: {type(error).__name__}: {error} (traceback in {folder}/record.json)"
        ) from error
    record.status, record.wall_s = "done", time.perf_counter() - started
    record.write(folder)
    log.info("done          %s", summary(record, folder))
    return record


def measure(
    record: RunRecord,
    checkpoint: Checkpoint,
    method: Method | None,
    schedule: Schedule,
    settings: Settings,
    folder: Path,
) -> None:
    """Score, count and time; fills in `record`."""
    from pdrop import evaluate, flops, latency
    from pdrop.sizes import Architecture

    spec = record.spec
    arch = Architecture.from_config(checkpoint.model.config)  # first: what cannot be counted is refused before scoring
    prompts: Sequence[Any] = ()
    if spec.tasks:
        evaluation = evaluate.evaluate(
            checkpoint,
            method,
            schedule,
            tasks=spec.tasks,
            folder=folder,
            limit=spec.limit,
            seed=spec.seed,
            batch_size=spec.batch_size,
            prompt=spec.prompt,
            image_mode=spec.image_mode,
            max_new_tokens=spec.max_new_tokens,
            task_dirs=settings.task_folders,
            progress=True,
        )
        record.results, prompts = evaluation.results, evaluation.prompts
    inputs = timing_inputs(checkpoint, settings)
    if not spec.tasks:
        prompts = [one_prompt(checkpoint, inputs, method, schedule)]
    record.cost = flops.cost(arch, prompts, schedule, method, checkpoint.model.dtype.itemsize)
    if settings.latency.measures and schedule and method is not None:
        timed = latency.prefill_ratio(checkpoint.model, inputs, method, schedule, settings.latency)
        record.cost.prefill_ms, record.cost.baseline_prefill_ms, record.cost.prefill_time_ratio = timed


def timing_inputs(checkpoint: Checkpoint, settings: Settings) -> Any:
    """What is timed, the same in every run: a seeded noise picture and a fixed question, `batch_size` times."""
    import numpy as np
    from PIL import Image

    from pdrop.scoring.prompts import Prompter

    pixels = np.random.default_rng(0).integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
    prompter = Prompter(checkpoint.processor, settings.prompt, settings.image_mode)  # type: ignore[arg-type]
    prompts = [prompter.render(QUESTION, 1)] * settings.batch_size
    inputs = prompter.encode(prompts, [[Image.fromarray(pixels)]] * settings.batch_size)
    return inputs.to(checkpoint.model.device, checkpoint.model.dtype)


def one_prompt(checkpoint: Checkpoint, inputs: Any, method: Method | None, schedule: Schedule) -> Any:
    """Where nothing is scored: the tokens of the timed prompt, seen in one forward."""
    import torch

    from pdrop import attach
    from pdrop.evaluate import PromptTokens

    with torch.inference_mode(), attach(checkpoint.model, method, schedule) as trace:
        checkpoint.model(**inputs, use_cache=True, logits_to_keep=1)
    visual = trace.visual[0]
    return PromptTokens(trace.tokens[0][0] - visual, visual, [row[0] for row in trace.visual_tokens])


@functools.cache
def describe(path: str, revision: str | None, weights: Any, seed: int) -> tuple[str, int]:
    """(fingerprint, decoder layers) of a checkpoint, without loading its weights."""
    from pdrop import checkpoint

    folder = checkpoint.locate(path, revision=revision, weights=weights)
    text = json.loads((folder / "config.json").read_text(encoding="utf8")).get("text_config") or {}
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):  # left out where it is the architecture's default: transformers knows it
        layers = checkpoint.read_config(folder, path).get_text_config(decoder=True).num_hidden_layers
    return checkpoint.fingerprint(folder, weights=weights, seed=seed), int(layers)


def load(settings: Settings) -> Checkpoint:
    """The loaded checkpoint: once a process, so that a further cell costs its own forward passes only."""
    return load_once(
        settings.path,
        settings.model,
        settings.revision,
        settings.weights,
        settings.dtype,
        settings.attn_implementation,
        settings.device,
        weight_seed(settings),
    )


@functools.cache
def load_once(
    path: str, name: str, revision: str | None, weights: Any, dtype: str, attention: str, device: str, seed: int
) -> Checkpoint:
    """See `load`."""
    from pdrop import checkpoint

    return checkpoint.load(
        path,
        name=name,
        revision=revision,
        weights=weights,
        dtype=dtype,
        attn_implementation=attention,
        device=device,
        seed=seed,
    )


def weight_seed(settings: Settings) -> int:
    """The seed, as far as it makes the weights."""
    return settings.seed if settings.weights == "random" else 0


def accelerator(device: str) -> dict[str, Any]:
    """What only torch knows of the machine: the device's name, threads."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"device_name": name, "threads": torch.get_num_threads()}


def mark(settings: Settings, spec: RunSpec, overrides: Sequence[str]) -> None:
    """Note that an experiment asked for this run: an experiment is the list of such notes."""
    if settings.experiment is not None:
        path = settings.results / "experiments" / settings.experiment / spec.folder
        write_atomically(path, json.dumps(list(overrides)) + "\n")


def mean_score(record: RunRecord) -> float | None:
    """Mean of the tasks' main metrics."""
    values = [result.scores[result.main_metric].value for result in record.results.values()]
    return sum(values) / len(values) if values else None


def summary(record: RunRecord, folder: Path) -> str:
    """One line for the console."""
    spec, cost, mean = record.spec, record.cost, mean_score(record)
    parts = [f"{spec.method:12s} [{spec.schedule or 'nothing dropped'}]"]
    parts += [f"mean score {mean:.3f}"] if mean is not None else []
    if cost is not None:
        parts.append(f"prefill FLOPs x{cost.prefill_flops_ratio:.3f}")
        parts += [f"time x{cost.prefill_time_ratio.median:.3f}"] if cost.prefill_time_ratio is not None else []
    return "  ".join([*parts, f"({record.wall_s:.0f} s)", str(folder)])
