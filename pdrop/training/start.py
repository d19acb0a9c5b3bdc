"""The start of a pre-training: a language model, a separately trained vision tower, and a random projector.

A checkpoint gives the architecture and the processor; parts of its weights are replaced here. LLaVA-1.5's first stage:

    python train.py train=llava_1_5_pretrain model=llava_1_5_7b train.start.language_model=lmsys/vicuna-7b-v1.5 \\
        train.start.new_projector=true train.data=... train.images=...

(LLaVA-1.5's tower is the published CLIP's, so it can stay; LLaVA-NeXT's was trained: give vision_tower, too.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdrop.models.checkpoint import Checkpoint, fingerprint, locate, refuse_own_code
from pdrop.models.quantised import refuse_training
from pdrop.models.weights import first_line, headers, refuse_misfit, refuse_not_finite
from pdrop.training.parts import part_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Folders or Hub names of a causal language model and of a CLIP model; None or False: the checkpoint's own."""

    language_model: str | None = None
    vision_tower: str | None = None
    new_projector: bool = False


def begin(checkpoint: Checkpoint, start: Start, seed: int) -> dict[str, str]:
    """Replace weights of the checkpoint's model in place; returns their identity, empty if nothing is replaced.

    Raises:
        ValueError: If a part is not available, or does not fit.
    """
    model, taken = checkpoint.model, {}
    if start.language_model is not None:
        from transformers import AutoModelForCausalLM

        folder = locate(start.language_model)
        other = read_part(AutoModelForCausalLM, folder, start.language_model, model.dtype)
        taken["language_model"] = f"{start.language_model} {fingerprint(folder)}"
        _copy(other.get_decoder(), model.get_decoder(), start.language_model)
        _copy(other.get_output_embeddings(), model.get_output_embeddings(), start.language_model)
    if start.vision_tower is not None:
        from transformers import AutoModel

        folder = locate(start.vision_tower)
        loaded = read_part(AutoModel, folder, start.vision_tower, model.dtype)
        taken["vision_tower"] = f"{start.vision_tower} {fingerprint(folder)}"
        tower = model.model.vision_tower
        _copy(getattr(loaded, "vision_model", loaded), getattr(tower, "vision_model", tower), start.vision_tower)
    if start.new_projector:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name, module in model.named_modules():
                if part_of(name) == "projector" and isinstance(module, nn.Linear):
                    module.reset_parameters()
            for name, weight in model.named_parameters():
                if name.endswith("image_newline"):  # as LLaVA's code draws it
                    nn.init.normal_(weight, std=weight.numel() ** -0.5)
        taken["projector"] = f"random, seed {seed}"
        log.info("the projector begins with random weights (seed %d)", seed)
    return taken


def read_part(auto: Any, folder: Path, path: str, dtype: torch.dtype) -> Any:
    """A model that a part is taken from.

    Raises:
        ValueError: If it cannot be read whole, or its weights are not numbers.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a field of a wrong kind may raise anything
        refuse_own_code(error, path)
        raise ValueError(f"{path}: transformers cannot read its config.json ({first_line(error)})") from error
    refuse_training(config, path)
    refuse_misfit(auto, config, headers(folder, path), path)
    model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    refuse_not_finite(model, path)
    return model


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, path: str) -> None:
    """Copy all weights of `target` from `source`; of embeddings the rows that both have, as LLaVA adds tokens."""
    given: dict[str, Tensor] = dict(source.named_parameters())
    for name, weight in target.named_parameters():
        if name not in given:
            raise ValueError(f"{path} has no weight {name}: it is of another architecture than the checkpoint")
        value = given[name]
        rows = min(len(weight), len(value))
        vocabulary = "embed_tokens" in name or name == "weight"
        if weight.shape[1:] != value.shape[1:] or (len(weight) != len(value) and not vocabulary):
            raise ValueError(
                f"{path}: its weight {name} is {list(value.shape)}, the checkpoint's {list(weight.shape)}: "
                "give one of the same sizes"
            )
        weight[:rows] = value[:rows]
    log.info("%s: %d weights taken over", path, len(given))
