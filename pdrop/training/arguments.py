"""A training's settings as transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pdrop.training.settings import TrainingSettings

# Arguments that would not do here what their names say.
REFUSED = {
    "num_train_epochs": "set train.epochs, and train.steps=null",
    "label_smoothing_factor": "the Trainer would smooth labels of the wrong tokens here, one too early",
    "train_sampling_strategy": "set train.grouped",
    "data_seed": "seed= is that of the order, too",
}


def arguments_of(settings: TrainingSettings, folder: Path, steps: int, layers: Sequence[str] = ()) -> Any:
    """transformers' TrainingArguments.

    Args:
        settings: Of the training.
        folder: Where checkpoints go.
        steps: Optimizer steps.
        layers: Classes of the modules that FSDP shards one by one; empty: those that the model names.

    Raises:
        ValueError: If the recipe or the user sets an argument that is set elsewhere, or transformers refuses it.
    """
    from transformers import TrainingArguments

    own: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": max(settings.rates.vision_tower, settings.rates.projector, settings.rates.language_model),
        "activation_checkpointing": False,  # pdrop.training.parts.checkpoint_activations
        "bf16": settings.bf16,
        # accelerate takes DeepSpeed's device from the environment, and forgets DeepSpeed if it is given "cpu"
        "use_cpu": settings.device == "cpu" and not settings.parallel.startswith("deepspeed"),
        "seed": settings.seed,
        "save_steps": settings.save_steps,
        "save_total_limit": 2,
        "logging_steps": settings.log_steps,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "no",  # the Trainer would read a number from the device in each step
        "dataloader_num_workers": settings.workers,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    if settings.tf32 and torch.cuda.is_available():
        own["tf32"] = True
    if taken := (set(own) - {"save_total_limit"}) & set(settings.arguments):
        raise ValueError(
            f"train.args sets {', '.join(sorted(taken))}, which train's own settings decide (batch_size, micro_batch, "
            "learning_rate, bf16, ...); see conf/train/"
        )
    if useless := sorted(set(REFUSED) & set(settings.arguments)):
        raise ValueError("; ".join(f"train.args.{name}: {REFUSED[name]}" for name in useless))
    if (kept := settings.arguments.get("save_total_limit")) is not None and kept < 2:
        raise ValueError(
            f"train.args.save_total_limit is at least 2, not {kept}: the last whole checkpoint would be gone "
            "before the next one is whole"
        )
    parallel = dict(settings.parallel_arguments)
    if layers and "fsdp_config" in parallel:
        parallel["fsdp_config"] = {"transformer_layer_cls_to_wrap": list(layers)} | dict(parallel["fsdp_config"])
    try:
        return TrainingArguments(**own | parallel | dict(settings.arguments))
    except (TypeError, ImportError, ValueError) as error:
        raise ValueError(f"transformers' TrainingArguments refuse this: {error}") from error
