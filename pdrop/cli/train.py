"""The command line of trainings: compose a configuration, resolve it to settings, do one (pdrop/training/job.py).

    python train.py -m method=none,pyramiddrop,fastv ratio=0.5 seed=0,1,2

The dials of dropping are run.py's.
"""

from __future__ import annotations

import logging
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pdrop.cli.compose import CONF, CheckpointConfig, DroppingDials, dropping, families, typed
from pdrop.cli.run import called, stop
from pdrop.garbage import not_collected
from pdrop.record import ImageMode, check_seed
from pdrop.runs.device import chosen, out_of_memory
from pdrop.store import in_words

if TYPE_CHECKING:
    from pdrop.training.settings import TrainingSettings

log = logging.getLogger("pdrop")

# dials that only the user can set, and how
NEEDED = {
    "train.data": "train.data=FILE, conversations in LLaVA's format (docs/training.md)",
    "model.name": "model=folder takes model.name=NAME model.path=FOLDER",
    "model.path": "model=folder takes model.name=NAME model.path=FOLDER",
}


@dataclass
class RatesConfig:
    """Learning rates of the parts: 0 freezes one, null is train.learning_rate."""

    vision_tower: float | None = None
    projector: float | None = None
    language_model: float | None = None


@dataclass
class StartConfig:
    """Where parts of the model come from if not from the checkpoint: see pdrop/training/start.py."""

    language_model: str | None = None
    vision_tower: str | None = None
    new_projector: bool = False


@dataclass
class RecipeConfig:
    """A file of conf/train/."""

    name: str = MISSING
    data: str = MISSING  # LLaVA's conversation JSON, or .jsonl
    images: str | None = None  # folder of images; default: where the data is
    format: str = "chat"  # vicuna_v1 | plain | chat
    image_mode: str | None = None  # crop | pad; default: the model's
    max_length: int = 2048  # tokens of a record
    overlong: str = "stop"  # or skip: for a record whose images do not fit into max_length
    steps: int | None = None  # optimizer steps; default: epochs
    epochs: float = 1.0
    batch_size: int = MISSING  # records per step, over all devices
    micro_batch: int = MISSING  # records at once on a device
    learning_rate: float = MISSING
    rates: RatesConfig = field(default_factory=RatesConfig)
    scheduler: str = "cosine"
    warmup: float = 0.03  # share of the steps, or a number of them
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grouped: bool = True  # batches of one modality and similar lengths
    lora: Any = None  # {r: 128, alpha: 256, dropout: 0.05}
    start: StartConfig = field(default_factory=StartConfig)
    gradient_checkpointing: bool = False
    bf16: bool = False
    tf32: bool = False
    save_steps: int = 500
    log_steps: int = 1
    workers: int = 0
    args: dict[str, Any] = field(default_factory=dict)  # other arguments of transformers' TrainingArguments


@dataclass
class ParallelConfig:
    """A file of conf/parallel/."""

    name: str = "none"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainDials(DroppingDials):
    """The dials of train.py that are not fields of RunSpec; conf/train.yaml has their defaults."""

    train: RecipeConfig = field(default_factory=RecipeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output: str = MISSING
    force: bool = MISSING


TrainConfig = typed(TrainDials, "train.yaml", model=CheckpointConfig)
ConfigStore.instance().store("train_schema", TrainConfig)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def job(cfg: Any) -> float | None:
    """Do one training. Returns its final loss, for sweepers that optimise; `stop`s if it fails."""
    with not_collected():
        from pdrop.training.job import train
        from pdrop.training.loop import TrainingFailed

    try:
        config: Any = OmegaConf.to_object(cfg)
        name = HydraConfig.get().runtime.choices["method"]
        overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("output=")]
        return train(settings(config), *dropping(cfg, name), overrides).final_loss
    except MissingMandatoryValue as error:
        stop(f"{error.full_key} has no value and needs one: {NEEDED.get(str(error.full_key), f'{error.full_key}=...')}")
    except OmegaConfBaseException as error:
        stop("; ".join(line.strip() for line in str(error).splitlines() if line.strip()))
    except (ValueError, OSError, TrainingFailed) as error:
        log.debug("%s", traceback.format_exc())
        less = "; a smaller train.micro_batch, train.gradient_checkpointing=true or train.lora need less memory"
        told = in_words(error, "output") if isinstance(error, OSError) else str(error)
        stop(told + less if out_of_memory(error) else told)


def checked(config: Any) -> str:
    """Refuse settings that cannot be trained with; returns the kind of device.

    Raises:
        ValueError: If one is refused: names the dial.
    """
    from pdrop.models.checkpoint import check_weights
    from pdrop.training.parts import Lora

    recipe = config.train
    check_weights(config.model.weights)
    if recipe.lora is not None and not isinstance(recipe.lora, dict):
        raise ValueError(f"train.lora is {recipe.lora!r}: write 'train.lora={{r: 128, alpha: 256}}', in quotes")
    if unknown := set(recipe.lora or {}) - {f.name for f in fields(Lora)}:
        raise ValueError(f"train.lora has r, alpha and dropout, not {', '.join(sorted(unknown))}")
    if recipe.lora is not None and not {"r", "alpha"} <= set(recipe.lora):
        raise ValueError("train.lora needs r and alpha: 'train.lora={r: 128, alpha: 256}', in quotes")
    return checked_device(config)


def shown_as(model: Any) -> ImageMode:
    """How the model's protocol shows pictures."""
    from pdrop.evaluation import protocols
    from pdrop.models.source import ModelSource

    known = families(model.protocol)
    if protocols.ANY in known:
        return protocols.of_family(model.protocol, known, "", "").image_mode
    source = ModelSource.of(model.name, model.path, revision=model.revision, weights=model.weights)
    return protocols.of_family(model.protocol, known, *source.family).image_mode


def settings(config: Any) -> TrainingSettings:
    """The configuration as plain, resolved settings.

    Raises:
        ValueError: If a dial cannot have its value.
    """
    from pdrop.models import attention
    from pdrop.training.parts import Lora, resolve
    from pdrop.training.settings import TrainingSettings
    from pdrop.training.start import Start

    model, recipe, device = config.model, config.train, checked(config)
    own = {
        "lr_scheduler_type": recipe.scheduler,
        "warmup_steps": recipe.warmup,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
    }
    return TrainingSettings(
        recipe=recipe.name,
        model=model.name,
        path=model.path,
        revision=model.revision,
        weights=model.weights,
        dtype=config.dtype or "float32",
        attn_implementation=config.attn_implementation,
        sdpa_kernel=attention.resolved(config.sdpa_kernel, config.attn_implementation, device),
        device=device,
        data=Path(recipe.data).expanduser(),
        images=None if recipe.images is None else Path(recipe.images).expanduser(),
        format=recipe.format,
        image_mode=recipe.image_mode or model.image_mode or shown_as(model),
        max_length=recipe.max_length,
        overlong=recipe.overlong,
        steps=recipe.steps,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        rates=resolve(recipe.learning_rate, **vars(recipe.rates)),
        start=Start(**vars(recipe.start)),
        lora=None if recipe.lora is None else Lora(**recipe.lora),
        grouped=recipe.grouped,
        gradient_checkpointing=recipe.gradient_checkpointing,
        bf16=recipe.bf16,
        tf32=recipe.tf32,
        seed=config.seed,
        save_steps=recipe.save_steps,
        log_steps=recipe.log_steps,
        workers=recipe.workers,
        parallel=config.parallel.name,
        output=Path(config.output).expanduser(),
        arguments=own | dict(recipe.args),
        parallel_arguments=dict(config.parallel.args),
        force=config.force,
    )


def checked_device(config: Any) -> str:
    """The device to train on; also checks the dials that would fail only after the model is loaded.

    Raises:
        ValueError: If one is refused: names the dial and what it takes.
    """
    from pdrop.models.checkpoint import check_device

    device, _, index = chosen(config.device).partition(":")
    if index and config.device:
        raise ValueError(f"device={config.device}: choose a GPU with CUDA_VISIBLE_DEVICES={index} and device={device}")
    check_device(device)
    check_seed("seed", config.seed)
    if not config.output.strip():
        raise ValueError(f"output is the folder of the trainings, not {config.output!r}")
    if "resume_from_checkpoint" in config.train.args:
        raise ValueError(
            "train.args.resume_from_checkpoint is not read: the same command resumes from its own last checkpoint; "
            "another one's weights are model=folder model.path=..."
        )
    return str(device)


def main() -> None:
    # TrainingArguments' names are not listed here: any of them may be added
    sys.argv[1:] = [f"++{a}" if a.startswith("train.args.") else a for a in sys.argv[1:]]
    again = "the same command without force=true" if "force=true" in sys.argv else "the same command"
    called(job, [*(f.name for f in fields(TrainConfig)), "hydra"], f"{again} resumes from the last checkpoint")


if __name__ == "__main__":
    main()
