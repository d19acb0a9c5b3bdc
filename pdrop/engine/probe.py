"""Checks at attach, on a small twin of the decoder, that the attention rows for ranking equal the layers' own.

The engine computes rows of attention by itself (pdrop/engine/ranking.py): projections, norms, rotary positions,
scaling, softmax. Layers differ: some do not rotate by position at all (every fourth of SmolLM3), some rotate a part of
each head (Phi, StableLM), some are not causal or bias their logits. So a twin of the same class with the same number of
layers, a few heads wide and with random weights, runs six tokens with transformers' eager attention, and each layer's
weights are compared with the rows. A decoder that differs is refused.

The twin only uses the class and the configuration: the model, its weights (sharded, quantised, on any device), its
hooks and the random state are not touched. The result is cached, so a second attachment costs nothing.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pdrop.engine.ranking import attention_rows
from pdrop.engine.state import Turns

TOKENS = 6
CLOSE = 1e-4  # both are float32, from the same states; even a gentle cap of the logits makes a difference of 1e-3
FOUND: dict[tuple[type, str], tuple[tuple[Turns, ...], list[type]]] = {}
GUARD = threading.Lock()


def probe(decoder: Any, layers: Sequence[nn.Module]) -> tuple[Turns, ...]:
    """The part of each head that each layer rotates, with which the computed attention rows equal the layer's own.

    Raises:
        ValueError: If no choice fits a layer, or a twin cannot be run.
    """
    decoder = getattr(decoder, "_fsdp_wrapped_module", decoder)
    key = type(decoder), decoder.config.to_json_string(use_diff=False)
    with GUARD:
        if key not in FOUND:
            # in a separate thread, where the caller's autocast, inference mode, default device and counters do not
            # apply
            with ThreadPoolExecutor(1) as pool:
                FOUND[key] = pool.submit(try_out, decoder).result()
        found, kinds = FOUND[key]
    for number, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if not isinstance(layer.self_attn, kind):
            other = type(layer.self_attn).__name__
            raise unsupported(decoder, f"layer {number} has a {other} where its config names a {kind.__name__}")
    return found


def unsupported(decoder: Any, why: str) -> ValueError:
    """The error for a decoder whose attention rows cannot be computed."""
    return ValueError(f"visual tokens cannot be ranked by the attention of {type(decoder).__name__}: {why}")


@torch.no_grad()
def try_out(decoder: Any) -> tuple[tuple[Turns, ...], list[type]]:
    """What each layer of a twin rotates, and the classes of the layers' attention.

    Raises:
        ValueError: As `probe`.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            twin = twin_of(decoder)
        seen = watched(twin)
    except Exception as error:  # a model's own code may raise anything for a small configuration
        raise unsupported(decoder, f"a small one cannot be tried out ({type(error).__name__}: {error})") from error
    try:
        alike = all(torch.equal(own, again) for (*_, own), (*_, again) in zip(seen, watched(twin, told=False)))
    except (RuntimeError, TypeError, AttributeError):
        alike = False
    if not alike:
        raise unsupported(decoder, "its layers read position_ids besides their rotary positions")
    turns = []
    for number, (layer, states, rotary, own) in enumerate(seen):
        errors = {way: difference(layer, states, rotary, own, way) for way in get_args(Turns)}
        best = min(errors, key=lambda way: errors[way])
        if not errors[best] < CLOSE:
            raise unsupported(
                decoder,
                f"in layer {number} it is not what q_proj, k_proj, rotary positions and a softmax "
                f"make (off by {errors[best]:.2g})",
            )
        turns.append(best)
    return tuple(turns), [type(layer.self_attn) for layer, *_ in seen]


def twin_of(decoder: Any) -> Any:
    """A decoder of the same class and layers, narrow and with random weights, on the CPU."""
    config = copy.deepcopy(decoder.config)
    head = decoder.layers[0].self_attn.head_dim
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 0
    groups = groups or heads
    narrow = {"num_key_value_heads": min(2, groups)}
    narrow["num_attention_heads"] = narrow["num_key_value_heads"] * min(2, heads // groups)
    narrow["hidden_size"] = narrow["num_attention_heads"] * head
    narrow |= {"intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    narrow |= {"vocab_size": 8, "pad_token_id": None, "n_group": 1, "topk_group": 1}
    experts = getattr(config, "num_experts_per_tok", None) or 1
    narrow |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    for name, value in narrow.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    config._attn_implementation = "eager"
    twin = type(decoder)(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():
        parameter.uniform_(-1, 1, generator=generator)
        # wide enough that attention is far from uniform; norms and biases away from their initial values
        parameter.mul_(4 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5).add_(parameter.ndim == 1)
    return twin


def watched(twin: Any, told: bool = True) -> list[tuple[nn.Module, Tensor, tuple[Tensor, Tensor], Tensor]]:
    """For each layer of a forward: the layer, its input [1, T, D], (cos, sin), its attention [1, heads, T, T].

    With `told` false, layers get no position_ids, as after a drop.
    """
    seen, weights, handles = [], [], []

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append((layer, args[0], kwargs["position_embeddings"]))
        return args, kwargs if told else kwargs | {"position_ids": None}

    def attended(attention: nn.Module, args: Any, output: Any) -> None:
        weights.append(output[1])

    for layer in twin.layers:
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(attended))
    states = torch.randn(1, TOKENS, twin.config.hidden_size, generator=torch.Generator().manual_seed(1))
    # positions near and far, for layers that scale by position; the mask says that they are one prompt, not packed
    last = getattr(twin.config, "max_position_embeddings", None) or 4096
    places = torch.tensor([[0, 1, 2, last // 3, last // 2, last - 1]])
    try:
        twin(inputs_embeds=states, position_ids=places, attention_mask=torch.ones_like(places), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(*layer, own) for layer, own in zip(seen, weights, strict=True)]


def difference(layer: nn.Module, states: Tensor, rotary: tuple[Tensor, Tensor], own: Tensor, turns: Turns) -> float:
    """The largest difference between the rows and the layer's own attention; infinite if rows cannot be computed."""
    everyone = torch.ones(1, TOKENS, dtype=torch.bool)
    try:
        rows = attention_rows(layer, states, rotary, everyone, everyone, TOKENS, turns=turns).probabilities
        return float((rows - own).abs().max())
    except (RuntimeError, TypeError, ValueError, IndexError):  # the shapes do not fit this choice
        return float("inf")
