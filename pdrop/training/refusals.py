"""Refuses, before training begins, settings that would train something other than what was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdrop.commands import script
from pdrop.models.checkpoint import locate, read_config
from pdrop.models.quantised import refuse_training
from pdrop.training.loop import PartsTrainer, TrainingFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pdrop.methods.base import Method
    from pdrop.schedule import Schedule
    from pdrop.training.settings import TrainingSettings


def refuse_data_parallel(arguments: Any) -> None:
    """Refuse one process with several GPUs: it would put copies of the model on all, and multiply the batch.

    Raises:
        ValueError: If it would.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs: CUDA_VISIBLE_DEVICES=0 trains on one of them, torchrun "
            f"--nproc_per_node={arguments.n_gpu} {script('train')} parallel=ddp (or fsdp) on all"
        )


def refuse_quantised(settings: TrainingSettings) -> None:
    """Refuse a checkpoint of quantised weights, before any is read.

    Raises:
        ValueError: If they are quantised; names the kind.
    """
    folder = locate(settings.path, revision=settings.revision, weights=settings.weights)
    refuse_training(read_config(folder, settings.path), settings.path)


def refuse_untrainable(name: str, method: Method | None, schedule: Schedule) -> None:
    """Refuse methods that have no effect in training, or whose step cost is not known.

    Raises:
        ValueError: If the method makes the picture smaller, which a prompt's processor does and no training, or finds
            its counts prompt by prompt.
    """
    if method is not None and method.pixels != 1:
        raise ValueError(f"method={name} makes pictures smaller before a prompt is scored; it cannot be trained with")
    if any(stage.adaptive for stage in schedule.stages):
        raise ValueError(
            f"{name} finds its counts prompt by prompt, and the cost of such a step is not known: choose a method "
            "with a schedule of its own, such as sparsevlm"
        )


def refuse_uneven(settings: TrainingSettings, schedule: Schedule, lengths: Sequence[int]) -> None:
    """Refuse uneven work under ZeRO-3, which gathers a module's weights when it is called in all processes.

    Args:
        settings: The training's.
        schedule: What it drops.
        lengths: The lengths of its records, negative for text only.

    Raises:
        ValueError: If one process could rank visual tokens while another, with a text-only batch, does not.
    """
    text = sum(length < 0 for length in lengths)
    if settings.parallel == "deepspeed_zero3" and settings.processes > 1 and schedule and text:
        raise ValueError(
            f"parallel=deepspeed_zero3 cannot drop tokens where records are text only, as {text} are here: a process "
            "without an image would not rank, and the others would wait for it; choose deepspeed_zero2 or fsdp"
        )


def check_parallel(trainer: PartsTrainer, asked: str, device: str) -> None:
    """Check the parallel strategy: accelerate silently ignores one that it cannot do, and trains whole copies or on
    another device.

    Args:
        trainer: The Trainer, as it was built.
        asked: The choice of conf/parallel.
        device: "cpu" or "cuda".

    Raises:
        TrainingFailed: If the weights are not split the way that was asked for, or not on that device.
    """
    split = {"fsdp": trainer.is_fsdp_enabled, "deepspeed": trainer.is_deepspeed_enabled}
    if wrong := [kind for kind, on in split.items() if on != asked.startswith(kind)]:
        there = "on" if split[wrong[0]] else "off"
        raise TrainingFailed(f"parallel={asked} was asked for, but accelerate has {wrong[0]} {there} on this machine")
    if (taken := trainer.args.device.type) != device:
        remedy = "set device=cuda, or hide the GPUs (CUDA_VISIBLE_DEVICES=)" if device == "cpu" else "set device=cpu"
        raise TrainingFailed(f"device={device} was asked for, but accelerate took {taken}: {remedy}")
