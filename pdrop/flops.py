"""What a forward costs, in closed form from the model's config and the tokens that enter each layer.

Why closed form: it needs no weights, no GPU and no run, it splits the cost into parts, and it can be read. It is held
against torch's FlopCounterMode (`counted_prefill_flops`) and fvcore (`fvcore_prefill_flops`) by tests/test_flops.py.

    arch = Architecture.from_config(model.config)
    visual = pyramid(num_layers=32).tokens_per_layer(576, 32)
    paper_macs_visual(arch.hidden, arch.intermediate, visual)                   # 1.777e12: the paper's 1.78 "TFLOPs"
    prefill_flops(arch, visual, text_tokens=60, boundaries=(8, 16, 24))["total"]    # everything, a multiply-add = 2

Two conventions, never mixed: the papers count multiply-adds (MACs) of visual tokens alone; `prefill_flops` counts
floating-point operations (1 FLOP = one multiply or one add) of matrix products over all tokens. As every FLOP
counter does, it leaves out norms, activations, rotary embeddings, softmax and sorting: they are no matrix products.

A prefill is what `generate` does before the first token: tower, projector, decoder, and lm_head on the LAST position
alone (`logits_to_keep=1`). Attention is summed as full squares, as a counter sees it; what a causal kernel needs of
them is named `attention_causal` (and `total_causal`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pdrop.record import Cost
from pdrop.schedule import Schedule
from pdrop.sizes import Architecture, Images

if TYPE_CHECKING:
    from pdrop.methods.base import Method

SUMMED = ("vision_tower", "projector", "attention_projections", "attention", "mlp", "ranking", "lm_head")


class Prompt(Protocol):
    """What `cost` reads of a prompt; and, where it is there, `images`: see `prefill_flops`."""

    @property
    def text(self) -> int: ...  # tokens that are not visual
    @property
    def visual(self) -> int: ...  # visual tokens before dropping
    @property
    def visual_per_layer(self) -> Sequence[int]: ...  # visual tokens that entered each layer


def paper_macs_visual(
    hidden: int, intermediate: int, visual_per_layer: Sequence[float], mlp_matrices: int = 3
) -> float:
    """Multiply-adds of the visual tokens alone, the papers' "TFLOPs" (PyramidDrop, arXiv 2410.17247, Eq. 5).

    Sum over the layers of 4nd² + 2n²d + 3ndm with n = visual tokens entering the layer, d = hidden, m = intermediate.
    No text token, no tower, no lm_head, no ranking, attention not halved, and no saving where keys are shared (GQA).

    Args:
        hidden: d, the decoder's hidden size.
        intermediate: m, its MLP's inner size.
        visual_per_layer: n of each layer.
        mlp_matrices: 3 for a gated MLP (PyramidDrop and SparseVLM); FastV's and DivPrune's formula has 2, which for
            Llama is one too few.
    """
    d, m = hidden, intermediate
    return float(sum(4 * n * d * d + 2 * n * n * d + mlp_matrices * n * d * m for n in visual_per_layer))


def prefill_flops(
    arch: Architecture,
    visual_per_layer: Sequence[float],
    text_tokens: float,
    *,
    boundaries: Sequence[int] = (),
    asking: float = 1,
    own_macs: float = 0,
    keys_cached: bool = False,
    images: Images | None = None,
    logits: int = 1,
    visual: float | None = None,
) -> dict[str, float]:
    """FLOPs of one prompt's prefill, by part.

    Args:
        arch: The model's sizes.
        visual_per_layer: Visual tokens that enter each layer.
        text_tokens: The other tokens.
        boundaries: Layers in front of which a method ranks by attention rows that it computes itself.
        asking: How many rows of attention it asks for at each (Method.asking).
        own_macs: Multiply-adds of its own matrix products (Method.own_macs).
        keys_cached: It ranks by a layer that has run already (Method.observe = -1) and left its keys in a cache;
            otherwise they are computed for the ranking.
        images: What went through the tower: the number of crops (towers of a fixed size), or the grid (frames,
            height, width) in patches of each image (towers of any size). None: worked out from the visual tokens, as
            one image, which counts too few crops where a model cuts padding away (LLaVA-NeXT). 0 or (): decoder alone.
        logits: Positions that go through the lm_head; `generate` needs one.
        visual: Visual tokens that the prompt came with; None: as many as enter layer 0 (no boundary 0).

    Returns:
        vision_tower, projector, attention_projections (q, k, v, o), attention (both products, full square), mlp,
        ranking, lm_head; their sum `total`; and, not summed, `attention_causal` (pairs that a causal mask leaves)
        and `total_causal`.

    Raises:
        ValueError: If the layers do not match the architecture's.
    """
    if len(visual_per_layer) != arch.layers:
        raise ValueError(f"visual_per_layer has {len(visual_per_layer)} entries for {arch.layers} layers")
    if outside := [k for k in boundaries if not 0 <= k < arch.layers]:
        raise ValueError(f"boundaries {outside} are not among the layers 0..{arch.layers - 1}")
    d, queries, keys = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    tokens = [visual + text_tokens for visual in visual_per_layer]
    came = visual_per_layer[0] if visual is None else visual
    seen = arch.tower.flops(came, images) if came else (0.0, 0.0)
    # all tokens that reach a boundary give keys, those that ask queries; layers k-1 and k in front of the cut see
    # equally many, so it does not matter which of them the method observes
    made = 0 if keys_cached else keys
    ranked = [tokens[k - 1] if k else came + text_tokens for k in boundaries] if came else []
    flops = {
        "vision_tower": seen[0],
        "projector": seen[1],
        "attention_projections": sum(2.0 * n * d * (2 * queries + 2 * keys) for n in tokens),
        "attention": sum(2.0 * 2 * n * n * queries for n in tokens),
        "mlp": sum(2.0 * n * d * arch.intermediate * 3 for n in tokens),
        "ranking": sum(2.0 * (n * d * made + asking * (d + n) * queries) for n in ranked) + 2.0 * own_macs,
        "lm_head": 2.0 * logits * d * arch.vocab,
    }
    flops["total"] = sum(flops[name] for name in SUMMED)
    flops["attention_causal"] = sum(2.0 * n * (n + 1) * queries for n in tokens)
    flops["total_causal"] = flops["total"] - flops["attention"] + flops["attention_causal"]
    return flops


def decode_flops_per_token(arch: Architecture, tokens_per_layer: Sequence[float]) -> float:
    """FLOPs of one decoding step, in which each layer sees that many keys, the new token's included."""
    d, queries, keys = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    fixed = d * (2 * queries + 2 * keys) + 3 * d * arch.intermediate
    return 2.0 * (sum(fixed + 2 * n * queries for n in tokens_per_layer) + d * arch.vocab)


def kv_bytes(arch: Architecture, tokens_per_layer: Sequence[float], bytes_per_value: int) -> float:
    """Bytes of keys and values in the cache after a prefill of one prompt."""
    return 2.0 * arch.kv_heads * arch.head_dim * bytes_per_value * sum(tokens_per_layer)


def cost(
    arch: Architecture, prompts: Sequence[Prompt], schedule: Schedule, method: Method | None, dtype_bytes: int
) -> Cost:
    """What a run's prefills cost, as means over its samples; times are left None.

    Ratios are of the means: all the prompts' FLOPs (KV bytes) to all of them with nothing dropped.

    Args:
        arch: The model's sizes.
        prompts: The run's samples, with the tokens that really entered each layer.
        schedule: Its boundaries are where a method that ranks by attention pays for it.
        method: None where nothing is dropped.
        dtype_bytes: Bytes of a number in the cache.

    Raises:
        ValueError: If there is no prompt.
    """
    if not prompts:
        raise ValueError("a cost is a mean over prompts: there are none")
    boundaries = schedule.layers if method is not None and method.ranks_by_attention else ()
    kinds = Counter(
        (p.text, p.visual, tuple(p.visual_per_layer), hashable(getattr(p, "images", None))) for p in prompts
    )
    parts: Any = Counter()
    whole: Any = Counter()
    kv = decode = macs = text_tokens = visual_tokens = 0.0
    per_layer = [0.0] * arch.layers
    for (text, visual, layers, images), times in kinds.items():
        share = times / len(prompts)
        entering = [n + text for n in layers]
        own: dict[str, Any] = {}
        if method is not None:
            extra = method.own_macs(schedule, visual, text, arch.layers, arch.hidden, arch.head_dim, layers)
            own = {"asking": method.asking(text), "own_macs": extra, "keys_cached": method.observe < 0}
        flops = prefill_flops(arch, layers, text, boundaries=boundaries, images=images, visual=visual, **own)
        parts.update({name: value * share for name, value in flops.items()})
        undropped = prefill_flops(arch, [visual] * arch.layers, text, images=images)
        whole.update({name: share * undropped[name] for name in ("total", "total_causal")})
        decode += share * decode_flops_per_token(arch, [n + 1 for n in entering])
        whole["decode"] += share * decode_flops_per_token(arch, [visual + text + 1] * arch.layers)
        kv += share * kv_bytes(arch, entering, dtype_bytes)
        whole["kv"] += share * kv_bytes(arch, [visual + text] * arch.layers, dtype_bytes)
        macs += share * paper_macs_visual(arch.hidden, arch.intermediate, layers)
        text_tokens += share * text
        visual_tokens += share * visual
        per_layer = [mean + share * n for mean, n in zip(per_layer, layers)]
    return Cost(
        samples=len(prompts),
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
        visual_tokens_per_layer=per_layer,
        tokens_per_layer=[n + text_tokens for n in per_layer],
        mean_keep=sum(per_layer) / (visual_tokens * arch.layers) if visual_tokens else 1.0,
        paper_macs_visual=macs,
        prefill_flops=parts["total"],
        prefill_flops_ratio=parts["total"] / whole["total"],
        kv_bytes=kv,
        kv_ratio=kv / whole["kv"],
        flops_parts={name: parts[name] for name in (*SUMMED, "attention_causal")},
        prefill_flops_causal=parts["total_causal"],
        prefill_flops_causal_ratio=parts["total_causal"] / whole["total_causal"],
        decode_flops_per_token=decode,
        decode_flops_ratio=decode / whole["decode"],
        kv_bytes_per_layer=[kv_bytes(arch, [n + text_tokens], dtype_bytes) for n in per_layer],
    )


def hashable(images: Any) -> Any:
    """Grids as tuples, so that equal prompts are counted once."""
    return images if images is None or isinstance(images, int) else tuple(tuple(grid) for grid in images)


def counted_prefill_flops(model: Any, inputs: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs that torch's FlopCounterMode sees in one prefill, by operator, and their `total`.

    Counts through attached hooks (dropping, ranking). On the meta device (no memory, real shapes in seconds) the
    parts are called one by one, since transformers looks at values when it merges images into the text.

    Args:
        model: An image-text-to-text model of transformers under sdpa or eager; flash-attention is not counted.
        inputs: input_ids [1, n] and what the tower needs, e.g. pixel_values.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        if inputs["input_ids"].is_meta:
            ids = inputs["input_ids"]
            images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
            if images:
                model.get_image_features(**images, return_dict=True)
            mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device="meta")
            embedded = torch.empty(*ids.shape, model.config.text_config.hidden_size, dtype=model.dtype, device="meta")
            given = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": torch.empty_like(ids)}
            hidden = model.get_decoder()(**given, use_cache=False)
            model.lm_head(hidden.last_hidden_state[:, -1:])
        else:
            model(**inputs, logits_to_keep=1)
    counts = {str(operator): float(flops) for operator, flops in counter.get_flop_counts()["Global"].items()}
    return {**counts, "total": float(counter.get_total_flops())}


def fvcore_prefill_flops(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """FLOPs that fvcore sees in one prefill (twice its multiply-adds), and the calls of operators it cannot count.

    Norms, which it also counts, are left out: the other two do not have them. Only for the eager attention path of a
    model without hooks: sdpa is not among its operators, and its tracing breaks when hooks are attached.

    Raises:
        ValueError: If the attention backend is not eager.
    """
    import torch
    from fvcore.nn import FlopCountAnalysis

    if model.config._attn_implementation != "eager":
        raise ValueError(f"fvcore cannot see {model.config._attn_implementation} attention: count an eager model")
    names = list(inputs)

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, values)), logits_to_keep=1, use_cache=False).logits

    with torch.no_grad():
        analysis = FlopCountAnalysis(Prefill().eval(), tuple(inputs.values()))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        flops = {name: 2.0 * macs for name, macs in analysis.by_operator().items() if not name.endswith("_norm")}
    return {**flops, "total": sum(flops.values())}, dict(analysis.unsupported_ops())
