"""What the engine needs to know about a model, read from its structure, without a list of model names.

Any decoder-only vision-language model of transformers is supported whose decoder is a stack of `layers`, each called
with ready `position_embeddings` and holding a `self_attn` of `q_proj` and `k_proj`, under a causal mask. Everything
else is refused, with the reason.
"""

from __future__ import annotations

import inspect
import logging
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pdrop.engine.visual import check_arguments, visual_ids
from pdrop.methods.base import Method
from pdrop.schedule import Schedule

log = logging.getLogger("pdrop")

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Architecture:
    """The parts of a vision-language model that the engine touches."""

    vlm: PreTrainedModel  # the module that takes input_ids, labels and images
    decoder: PreTrainedModel  # its language model without head
    layers: list[nn.Module]


def read_architecture(model: nn.Module) -> Architecture:
    """Find the vision-language model inside `model` (which may be wrapped by PEFT, DDP or FSDP) and check it.

    Raises:
        ValueError: If there is none, or its decoder does not work the way the engine needs it.
    """
    vlm = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and visual_ids(m.config)), None)
    if vlm is None:
        raise ValueError(
            f"{type(model).__name__} holds no vision-language model: no config in it names an image_token_id"
        )
    name = type(vlm).__name__
    if getattr(vlm.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: visual tokens can be dropped in decoder-only models")
    if hasattr(vlm, "create_masks_for_generate"):
        raise ValueError(f"{name} lets image tokens attend to each other in both directions: only causal decoders work")
    decoder = vlm.get_decoder()
    stack = getattr(decoder, "layers", None)
    layers = [getattr(layer, "_fsdp_wrapped_module", layer) for layer in stack] if stack is not None else []
    if not layers:
        raise ValueError(f"the decoder of {name}, {type(decoder).__name__}, has no list of `layers`")
    for number, layer in enumerate(layers):
        check_layer(layer, number, type(decoder).__name__)
    kinds = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (not getattr(decoder.config, "layer_types", None) and getattr(decoder.config, "sliding_window", None)):
        found = ", ".join(sorted(kinds)) or "sliding_attention"
        raise ValueError(f"{type(decoder).__name__} has layers of type {found}: only full_attention layers can drop")
    if any(p.is_meta for p in decoder.parameters()):
        raise ValueError(
            f"the weights of {type(decoder).__name__} are on the meta device or offloaded: load them first"
        )
    if (getattr(vlm, "tp_size", None) or 1) > 1:
        raise ValueError("under tensor parallelism each device would rank by its own heads: use one device per model")
    check_arguments(vlm)
    return Architecture(vlm, decoder, layers)


def check_layer(layer: nn.Module, number: int, decoder: str) -> None:
    """Refuse a decoder layer whose attention rows cannot be computed, or whose inputs cannot be shortened.

    Raises:
        ValueError: Naming what the layer lacks.
    """
    attention = getattr(layer, "self_attn", None)
    takes = inspect.signature(type(layer).forward).parameters
    lacks = [f"an argument `{arg}`" for arg in ("position_embeddings", "attention_mask") if arg not in takes]
    lacks += [] if hasattr(layer, "input_layernorm") else ["`input_layernorm`"]
    lacks += [
        f"`self_attn.{part}`" for part in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, part)
    ]
    if attention is not None and not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        lacks.append("rotary positions")
    if lacks:
        raise ValueError(
            f"layer {number} of {decoder} ({type(layer).__name__}) lacks {', '.join(lacks)}: "
            "this architecture is not supported"
        )


def check_fit(architecture: Architecture, model: nn.Module, method: Method | None, schedule: Schedule) -> None:
    """Refuse a model, method and schedule that cannot be attached together.

    Raises:
        ValueError: If boundaries are outside the decoder, positions are undefined, there is no method to rank, or a
            compiled module would silently skip the hooks.
    """
    decoder = architecture.decoder
    schedule.check(len(architecture.layers))
    if method is None and schedule:
        raise ValueError(f"schedule {schedule} needs a method to rank the visual tokens")
    if method is not None:
        method.check(schedule)
    for module in (model, *model.modules()):
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} is compiled as a whole, and compiled modules do not see hooks registered "
                "later: compile each layer's forward instead, layer.forward = torch.compile(layer.forward)"
            )
    if schedule and "flex" in str(decoder.config._attn_implementation or ""):
        log.warning(
            "flex_attention compiles for each length of keys, and dropping has one per stage; sdpa does not compile"
        )
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    if method is not None and schedule and method.positions == "compact" and "mrope_section" in rope:
        raise ValueError(
            f"compact positions are not defined for the multimodal rotary positions of {type(decoder).__name__}: "
            "use positions='original'"
        )
