"""Which weights are trained and at what rate: vision tower, projector, language model, or LoRA adapters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

log = logging.getLogger(__name__)

Part = Literal["vision_tower", "projector", "language_model"]
PROJECTOR_NAMES = ("projector", "merger", "connector", "image_newline")


@dataclass(frozen=True)
class Lora:
    """LoRA on every linear layer of the decoder (arXiv 2106.09685); LLaVA uses r=128, alpha=256, dropout .05."""

    r: int
    alpha: int
    dropout: float = 0.05


@dataclass(frozen=True)
class Rates:
    """Learning rate of each part; 0 freezes it."""

    vision_tower: float
    projector: float
    language_model: float


def part_of(name: str) -> Part:
    """The part that a parameter belongs to, by its name. LLaVA-NeXT's newline embedding belongs to the projector."""
    if any(word in name for word in PROJECTOR_NAMES):
        return "projector"
    return "vision_tower" if "vision" in name or ".visual." in f".{name}" else "language_model"


def prepare(model: Any, rates: Rates, lora: Lora | None) -> Any:
    """The model with untrained weights frozen; with LoRA, wrapped by PEFT.

    Raises:
        ValueError: If nothing is left to train, or LoRA cannot be combined with the settings.
    """
    if lora is not None:
        model = _adapted(model, rates, lora)
    else:
        unread = unread_weights(model)
        for name, weight in model.named_parameters():
            weight.requires_grad_(getattr(rates, part_of(name)) > 0 and name not in unread)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if not trained:
        raise ValueError("every part's learning rate is 0: nothing is left to train")
    log.info("%.1f M of %.1f M weights are trained", trained / 1e6, sum(w.numel() for w in model.parameters()) / 1e6)
    return model


def unread_weights(model: Any) -> set[str]:
    """Names of the tower's weights after the last layer that is read (`vision_feature_layer`): the last norm, SigLIP's
    pooling, often the last layer. None of a tower that is read at its end, such as Qwen's.

    They never get a gradient. Trained, they would have no state in an optimizer, which FSDP refuses to load.
    """
    places = getattr(model.config, "vision_feature_layer", None)
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and "vision" in name]
    if places is None or len(stacks) != 1:
        return set()
    (stack,) = stacks
    layers = len(model.get_submodule(stack))
    # an index of hidden states; the first is before all layers
    read = max(place % (layers + 1) for place in (places if isinstance(places, (list, tuple)) else [places]))
    unread = (*(f"{stack}.{layer}." for layer in range(read, layers)), ".post_layernorm.", ".head.")
    names = (name for name, _ in model.named_parameters() if "vision" in name)
    return {name for name in names if any(part in name for part in unread)}


def layers_of(model: Any) -> list[str]:
    """Classes of the modules that FSDP shards one by one: those that the model declares not to be split, and contains.

    accelerate requires all declared classes to exist, and CLIP declares one of its text model, which a vision tower
    lacks.
    """
    there = {type(module).__name__ for module in model.modules()}
    return sorted(there & set(getattr(model, "_no_split_modules", None) or ()))


def checkpoint_activations(model: Any) -> None:
    """Keep the inputs of each layer alone and run it again in the backward pass, in the model (not its wrapper).

    transformers' own switch also lets the outputs of the embeddings require gradients, those of a frozen vision tower
    among them, which is then run again and differentiated for nothing. Only reentrant checkpointing needs that.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def _adapted(model: Any, rates: Rates, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    if rates.vision_tower > 0:
        raise ValueError("LoRA adapts the decoder, and the projector can be trained whole: set rates.vision_tower=0")
    if not rates.language_model > 0:
        raise ValueError("LoRA adapts the decoder, but its learning rate is 0: set rates.language_model, or lora=null")
    inside = {id(module) for module in model.get_decoder().modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    # a projector is a module with one of these names, and not inside another such module
    whole = [name for name, _ in model.named_modules() if name.rpartition(".")[2].endswith(PROJECTOR_NAMES[:3])]
    saved = whole if rates.projector > 0 else None
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, modules_to_save=saved
    )
    return get_peft_model(model, config)


def groups(model: nn.Module, rates: Rates, decayed: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: by learning rate, and with or without weight decay.

    Args:
        model: The model that is trained.
        rates: The rates of its parts.
        decayed: Names of the parameters with weight decay.
        weight_decay: Their weight decay.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            key = (getattr(rates, part_of(name)), weight_decay if name in decayed else 0.0)
            found.setdefault(key, []).append(weight)
    return [{"params": weights, "lr": rate, "weight_decay": decay} for (rate, decay), weights in found.items()]


def resolve(
    learning_rate: float,
    vision_tower: float | None = None,
    projector: float | None = None,
    language_model: float | None = None,
) -> Rates:
    """The parts' rates; a part without one gets the recipe's.

    Raises:
        ValueError: If a rate is below 0.
    """
    given = {"vision_tower": vision_tower, "projector": projector, "language_model": language_model}
    rates = {name: learning_rate if rate is None else rate for name, rate in given.items()}
    if low := [f"{name}={rate}" for name, rate in rates.items() if not rate >= 0]:
        raise ValueError(f"a learning rate is 0 (frozen) or more, not {', '.join(low)}")
    return Rates(**rates)
