"""One run: compose its configuration, load the model once a process, score, count, time, write one record.

    python run.py -m ratio=0.3,0.5,0.7 method=none,pyramiddrop,fastv,random

Hydra and omegaconf stop in this file: below it everything gets plain arguments. Heavy imports wait until a run really
starts, so `--help` and a sweep of finished runs are quick.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import MISSING, OmegaConf

from pdrop.record import RunRecord, RunSpec, canonical_json, environment, versions, write_atomically
from pdrop.schedule import Schedule

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint
    from pdrop.methods.base import Method

log = logging.getLogger("pdrop")

HERE = Path(__file__).resolve().parent
# in a checkout the configuration lies beside the package, in an installed package inside it
CONF = next(folder for folder in (HERE.parent / "conf", HERE / "conf") if (folder / "run.yaml").exists())


class RunError(CompactHydraException):
    """A run that cannot start or did not finish: one line for the user, no traceback."""


@dataclass
class ModelConfig:
    """A file of conf/model/."""

    name: str = MISSING
    path: str = MISSING  # a folder, a hub id, or package://package.name/folder
    revision: str | None = None
    weights: str = "pretrained"  # "random": from the config alone, for measuring speed
    dtype: str = "float32"
    batch_size: int = 1
    prompt: str = "chat"
    image_mode: str = "crop"


@dataclass
class RunConfig:
    """The dials, typed. conf/run.yaml holds the defaults and explains them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = None  # an object with _target_, or null
    schedule: Any = MISSING
    latency: Any = MISSING
    stages: int = 4
    ratio: float = 0.5
    layers: list[int] | None = None
    positions: str | None = None
    seed: int = 0
    tasks: Any = "embedded"
    task_folders: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    attn_implementation: str = "sdpa"
    device: str | None = None
    max_new_tokens: int = 16
    results: str = "results"
    experiment: str | None = None
    force: bool = False


def choices(group: str) -> list[str]:
    """The files of a folder of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


ConfigStore.instance().store("schema", RunConfig)
OmegaConf.register_new_resolver("choices", lambda group: " | ".join(choices(group)), replace=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def compose(cfg: Any) -> float | None:
    """One job of a sweep. Returns the mean of the main scores, for sweepers that optimise.

    Raises:
        RunError: If the run cannot start or fails; the other jobs of a sweep go on, and the exit code tells.
    """
    try:
        config: Any = OmegaConf.to_object(cfg)
        choice = HydraConfig.get().runtime.choices
        overrides = list(HydraConfig.get().overrides.task)
        return run(config, choice["method"], choice["latency"], overrides)
    except (ValueError, RuntimeError, OSError) as error:
        log.debug("%s", traceback.format_exc())
        raise RunError(f"error: {error}") from error


def run(config: RunConfig, method_name: str, latency_name: str, overrides: list[str]) -> float | None:
    """Do one run, or find it done. See `compose`."""
    from pdrop import evaluate

    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit is a number of samples from 1 on, or null for all, not {config.limit}")
    tasks = task_names(config.tasks)
    evaluate.check_tasks(tasks, config.task_folders)
    if config.positions is not None and config.method is not None:
        config.method["positions"] = config.positions
    method: Method | None = None if config.method is None else hydra.utils.instantiate(config.method)
    checkpoint = load(config.model, dtype_of(config), config.attn_implementation, device_of(config), config.seed)
    schedule: Schedule = hydra.utils.instantiate(config.schedule, num_layers=checkpoint.num_layers)
    spec = identity(config, method_name, latency_name, method, schedule, tasks, checkpoint)

    results = Path(config.results)
    folder = results / "runs" / spec.folder
    if config.experiment is not None:
        mark = results / "experiments" / config.experiment / spec.folder
        write_atomically(mark, json.dumps(overrides) + "\n")
    if (folder / "record.json").exists() and not config.force:
        record = RunRecord.read(folder)
        if record.status == "done":
            log.info("done already   %s", summary(record, folder))
            return mean_score(record)
    if config.force and (folder / "answers.jsonl").exists():
        (folder / "answers.jsonl").unlink()
    record = RunRecord(spec, "running", started_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    record.environment = environment() | checkpoint.environment()
    record.command = ["run.py", *overrides]
    record.write(folder)
    started = time.perf_counter()
    try:
        measure(record, checkpoint, method, schedule, config, folder)
    except (Exception, KeyboardInterrupt) as error:
        record.status, record.error = "failed", traceback.format_exc()
        record.wall_s = time.perf_counter() - started
        record.write(folder)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RunError(
            f"failed         {spec.folder}: {type(error).__name__}: {error} (see {folder}/record.json)"
        ) from error
    record.status, record.wall_s = "done", time.perf_counter() - started
    record.write(folder)
    log.info("done           %s", summary(record, folder))
    return mean_score(record)


def measure(
    record: RunRecord,
    checkpoint: Checkpoint,
    method: Method | None,
    schedule: Schedule,
    config: RunConfig,
    folder: Path,
) -> None:
    """Score, count and time; fills in `record`."""
    from pdrop import evaluate, flops, latency

    spec = record.spec
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
            task_dirs=config.task_folders,
            progress=True,
        )
        record.results = evaluation.results
        record.cost = flops.cost(checkpoint, evaluation.prompts, schedule, method)
        if spec.latency != "off":
            protocol = latency.Protocol(name=spec.latency, **(config.latency or {}))
            inputs = evaluate.timing_inputs(checkpoint, evaluation, spec.prompt, spec.image_mode)
            timed = latency.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol)
            record.cost.prefill_ms, record.cost.baseline_prefill_ms, record.cost.prefill_time_ratio = timed


def identity(
    config: RunConfig,
    method_name: str,
    latency_name: str,
    method: Method | None,
    schedule: Schedule,
    tasks: tuple[str, ...],
    checkpoint: Checkpoint,
) -> RunSpec:
    """The run's spec, with every dial that cannot change its numbers collapsed."""
    arguments = {} if method is None else {k: v for k, v in asdict(method).items() if k != "positions"}
    return RunSpec(
        model=config.model.name,
        model_path=config.model.path,
        revision=config.model.revision,
        weights="random" if config.model.weights == "random" else "pretrained",
        model_fingerprint=checkpoint.fingerprint,
        method=method_name,
        method_args=canonical_json(arguments),
        schedule=str(schedule),
        positions=method.positions if method is not None and schedule else "original",
        tasks=tasks,
        limit=config.limit,
        seed=config.seed if "seed" in arguments or config.model.weights == "random" else 0,
        batch_size=config.batch_size or config.model.batch_size,
        dtype=dtype_of(config),
        attn_implementation=config.attn_implementation,
        device=device_of(config),
        prompt=config.model.prompt,
        image_mode=config.model.image_mode,
        max_new_tokens=config.max_new_tokens,
        latency=latency_name if schedule else "off",
        versions=canonical_json(versions()),
    )


@functools.cache
def load_once(
    path: str, name: str, revision: str | None, weights: str, dtype: str, attention: str, device: str, seed: int
) -> Checkpoint:
    """Loaded once a process: a further cell of a sweep costs its own forward passes only."""
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


def load(model: ModelConfig, dtype: str, attention: str, device: str, seed: int) -> Checkpoint:
    """The checkpoint of a run. The seed matters to random weights alone."""
    if model.weights not in ("pretrained", "random"):
        raise ValueError(f"model.weights is pretrained or random, not {model.weights!r}")
    seed = seed if model.weights == "random" else 0
    return load_once(model.path, model.name, model.revision, model.weights, dtype, attention, device, seed)


def dtype_of(config: RunConfig) -> str:
    """The dial, or the model's default."""
    return config.dtype or config.model.dtype


def device_of(config: RunConfig) -> str:
    """The dial, or cuda where there is one."""
    if config.device is not None:
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def task_names(tasks: Any) -> tuple[str, ...]:
    """Names of lmms-eval tasks: `tasks` is a set's name (conf/tasks/), a task's name, or a list of both."""
    names: list[str] = []
    for name in [tasks] if isinstance(tasks, str) else list(tasks or []):
        if name in choices("tasks"):
            names += OmegaConf.to_object(OmegaConf.load(CONF / "tasks" / f"{name}.yaml"))["tasks"]  # type: ignore[index]
        else:
            names.append(name)
    return tuple(dict.fromkeys(names))


def mean_score(record: RunRecord) -> float | None:
    """Mean of the tasks' main metrics."""
    values = [result.scores[result.main_metric].value for result in record.results.values()]
    return sum(values) / len(values) if values else None


def summary(record: RunRecord, folder: Path) -> str:
    """One line for the console."""
    spec, cost, mean = record.spec, record.cost, mean_score(record)
    parts = [f"{spec.method:12s}", f"[{spec.schedule}]" if spec.schedule else "[nothing dropped]"]
    if mean is not None:
        parts.append(f"mean score {mean:.3f}")
    if cost is not None:
        parts.append(f"prefill FLOPs x{cost.prefill_flops_ratio:.3f}")
        if cost.prefill_time_ratio is not None:
            parts.append(f"time x{cost.prefill_time_ratio.median:.3f}")
    return "  ".join([*parts, f"({record.wall_s:.0f} s)", str(folder)])


def check_dials(arguments: list[str]) -> str | None:
    """A misspelt dial as one line that lists the right ones; None if all are known."""
    dials = [f.name for f in fields(RunConfig)] + ["experiments", "hydra"]
    for argument in arguments:
        dial = argument.split("=", 1)[0].lstrip("+~").split("@")[0].split(".")[0].split("/")[0]
        if "=" in argument and not argument.startswith("-") and dial not in dials:
            near = difflib.get_close_matches(dial, dials, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            return f"error: there is no dial {dial!r}{hint} Dials: {', '.join(sorted(dials))}"
    return None


def main() -> None:
    """The command line. Exit code 0 only if every run is done."""
    complaint = check_dials(sys.argv[1:])
    if complaint:
        sys.exit(complaint)
    compose()
