"""The command line: compose a configuration, resolve it to plain arguments, run one cell (pdrop/cell.py).

    python run.py -m ratio=0.3,0.5,0.7 method=none,pyramiddrop,fastv,random

Hydra and omegaconf stop in this file. Heavy imports wait until a run really starts, so `--help` answers at once.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdrop.choices import complaint, hint
from pdrop.names import printable

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
    visual_tokens: int | None = None  # of the prompt that budgets and ledgers are reckoned with
    text_tokens: int | None = None


@dataclass
class RunConfig:
    """The dials, typed. conf/run.yaml holds the defaults, `python run.py --help` explains them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: Any = None  # an object with _target_, or null
    schedule: Any = MISSING
    latency: Any = MISSING
    stages: int = 4
    ratio: float = 0.5
    layers: list[int] | None = None
    budget: str | None = None
    positions: str | None = None
    twin: bool = False
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
def job(cfg: Any) -> float | None:
    """One job of a sweep. Returns the mean of the main scores, for sweepers that optimise; `stop`s if it fails."""
    from pdrop.cell import RunFailed, mean_score, run_cell

    try:
        config: Any = OmegaConf.to_object(cfg)
        # where the store lies is no part of a run: it may be moved. Sweeps escape colons, single runs need not
        overrides = [o.replace("\\:", ":") for o in HydraConfig.get().overrides.task if not o.startswith("results=")]
        if config.budget is not None and any(o.startswith("ratio=") for o in overrides):
            raise ValueError(f"budget={config.budget} finds the ratio: leave out ratio=")
        return mean_score(run_cell(settings(config), *dropping(cfg, config), overrides))
    except OmegaConfBaseException as error:  # such as a value that a file of conf/ leaves to the user
        stop("; ".join(line.strip() for line in str(error).splitlines() if line.strip()))
    except (ValueError, OSError, RunFailed) as error:
        log.debug("%s", traceback.format_exc())
        stop(str(error))


def dropping(cfg: Any, config: Any) -> tuple[str, Any, Callable[..., Any]]:
    """What the dials of dropping say: the method's name, the method, and the schedule for a number of layers.

    Args:
        cfg: The composed configuration, whose dials a budget turns.
        config: The same as an object.
    """
    if config.positions is not None and config.method is not None:
        config.method["positions"] = config.positions
    method = None if config.method is None else instantiate(config.method)
    name = HydraConfig.get().runtime.choices["method"]
    if config.twin and method is not None:
        from pdrop.methods.random_drop import twin_of

        method, name = twin_of(method, config.seed), f"random_{name}"
    return name, method, functools.partial(schedule_of, cfg)


def schedule_of(cfg: Any, num_layers: int, ratio: float | None = None, layers: Sequence[int] | None = None) -> Any:
    """The schedule of a configuration, for a decoder of that many layers; with these dials turned where they are given.

    Raises:
        ValueError: As the schedule says it.
    """
    turned: dict[str, Any] = {} if ratio is None else {"ratio": ratio}
    turned |= {} if layers is None else {"layers": list(layers)}
    config: Any = OmegaConf.to_object(OmegaConf.merge(cfg, turned))
    return instantiate(config.schedule, num_layers=num_layers)


def stop(message: str) -> NoReturn:
    """End the job with one line. In a sweep the others go on; at its end Hydra names the first failure again.

    Raises:
        RunError: In a sweep.
    """
    message = printable(message)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(f"error: {message}")
    log.error("error: %s", message)
    raise RunError(f"error: {message}")


def instantiate(node: Any, **arguments: Any) -> Any:
    """Build what a node with _target_ names; what its constructor refuses is the user's error, not Hydra's.

    Raises:
        ValueError: As the constructor says it.
    """
    try:
        return hydra.utils.instantiate(node, **arguments)
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, TypeError)):
            raise ValueError(str(cause)) from error
        raise


def settings(config: RunConfig) -> Any:
    """The configuration as plain, resolved settings.

    Raises:
        ValueError: If a choice is none.
    """
    from pdrop.settings import Settings

    model = config.model
    if model.weights not in ("pretrained", "random"):
        raise ValueError(f"model.weights is pretrained or random, not {model.weights!r}")
    return Settings(
        model=model.name,
        path=model.path,
        revision=model.revision,
        weights=model.weights,  # type: ignore[arg-type]
        dtype=config.dtype or model.dtype,
        attn_implementation=config.attn_implementation,
        device=config.device or default_device(),
        batch_size=model.batch_size if config.batch_size is None else config.batch_size,
        prompt=model.prompt,
        image_mode=model.image_mode,
        tasks=task_names(config.tasks, config.task_folders),
        task_folders=tuple(config.task_folders),
        limit=config.limit,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        latency=instantiate(config.latency),
        results=Path(config.results),
        experiment=config.experiment,
        force=config.force,
        layers=None if config.layers is None else tuple(config.layers),
        budget=config.budget,
        visual_tokens=model.visual_tokens,
        text_tokens=model.text_tokens,
    )


def default_device() -> str:
    """Cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def task_names(tasks: Any, folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of lmms-eval tasks: `tasks` is a set's name (conf/task_sets/), a task's name, or a list of both.

    Raises:
        ValueError: If a name is unknown; close matches are named.
    """
    from pdrop.scoring import task_index

    names: list[str] = []
    given = [tasks] if isinstance(tasks, str) else [] if tasks is None else tasks
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"tasks is a set, a task, or a list of them such as tasks=[pope,mme], not {tasks!r}")
    for name in given:
        if name in choices("task_sets"):
            group: Any = OmegaConf.to_object(OmegaConf.load(CONF / "task_sets" / f"{name}.yaml"))
            names += group["tasks"]
        else:
            names.append(name)
    task_index.find(names, folders, also=choices("task_sets"))
    return tuple(dict.fromkeys(names))


def check_dials(arguments: list[str], known: list[str] | None = None) -> str | None:
    """A misspelt dial as one line that lists the right ones (`known`: another command's); None if all are known."""
    dials = known or [f.name for f in fields(RunConfig)] + ["experiments", "hydra"]
    for argument in arguments:
        dial = argument.split("=", 1)[0].lstrip("+~").split("@")[0].split(".")[0].split("/")[0]
        if "=" in argument and not argument.startswith("-") and dial not in dials:
            near = difflib.get_close_matches(dial, dials, 1)
            hint = f", did you mean {near[0]}?" if near else "."
            return f"error: there is no dial {dial!r}{hint} Dials: {', '.join(sorted(dials))}"
    return None


def check_command(arguments: list[str], known: list[str] | None = None) -> None:
    """Leave with one line if a dial or a choice is none (`known`: as in `check_dials`)."""
    if told := check_dials(arguments, known):
        sys.exit(told)
    if told := complaint(arguments, CONF):
        sys.exit(f"error: {told}")


def main() -> None:
    """The command line. The exit code is 0 only if every run is done."""
    # on cores that others use too, OpenMP threads that spin while they wait cost ten times what they compute
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    check_command(sys.argv[1:])
    if told := hint(sys.argv[1:], CONF):
        print(told, file=sys.stderr)  # noqa: T201
    try:
        job()
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)  # noqa: T201
        sys.exit(130)
