"""The cost of a forward, in closed form from the model's sizes and the tokens that enter each layer.

Why closed form: it needs no weights, no GPU and no run, it splits the cost into parts, and it can be read.
tests/cost/test_flops.py compares it with torch's FlopCounterMode and fvcore (pdrop/cost/counters.py).

    sizes, method, schedule = ModelSizes.from_config(model.config), PyramidDrop(), pyramid(num_layers=32)
    prompt = PromptSize(text=60, visual=576).under(method, schedule, sizes.layers)
    prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))["total"]    # everything, a multiply-add = 2
    paper_macs_visual(sizes.hidden, sizes.intermediate, prompt.visual_per_layer)    # 1.777e12: the paper's 1.78 T

Two conventions, never mixed: the papers count multiply-adds (MACs) of visual tokens alone, each paper its own;
`prefill_flops` counts floating-point operations (1 FLOP = one multiply or one add) of matrix products over all tokens.
Like every FLOP counter, it leaves out norms, activations, rotary embeddings, softmax and sorting, which are not matrix
products.

A prefill is what `generate` does before the first token: tower, projector, decoder, and lm_head on the LAST position
alone (`logits_to_keep=1`). Attention is summed as full squares, as a counter sees it; the part that a causal kernel
computes is `attention_causal` (and `total_causal`).

What papers call FLOPs has a separate name per paper, so that printed figures can be reproduced and are not mixed up.
All are multiply-adds of decoder layers, attention as full squares, without tower, lm_head and ranking; d = hidden size,
m = the MLP's inner size, n = tokens entering a layer. Llama's MLP has three matrices: FastV's formula leaves one out.

    paper_macs_visual       PyramidDrop (arXiv 2410.17247, Eq. 5)     visual tokens   4nd² + 2n²d + 3ndm
    fastv_macs_visual       FastV (arXiv 2403.06764), DivPrune         visual tokens   4nd² + 2n²d + 2ndm
    sparsevlm_macs          SparseVLM's code (arXiv 2410.04417)        all tokens      4nd² + 2n²d + 3ndm
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdrop.record import Cost
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from pdrop.methods.base import Method

SUMMED = ("vision_tower", "projector", "attention_projections", "attention", "mlp", "ranking", "lm_head")


def paper_macs_visual(
    hidden: int, intermediate: int, visual_per_layer: Sequence[float], mlp_matrices: int = 3
) -> float:
    """Multiply-adds of the visual tokens only, the papers' "TFLOPs" (PyramidDrop, arXiv 2410.17247, Eq. 5).

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


def fastv_macs_visual(hidden: int, intermediate: int, visual_per_layer: Sequence[float]) -> float:
    """FastV's "FLOPs": multiply-adds of the visual tokens with an MLP of two matrices (section 4 of its paper).

    Args:
        hidden: d.
        intermediate: m.
        visual_per_layer: n of each layer.
    """
    return paper_macs_visual(hidden, intermediate, visual_per_layer, mlp_matrices=2)


def fastv_reduction(
    hidden: int, intermediate: int, visual: float, layer: int, dropped: float, num_layers: int
) -> float:
    """The share of FLOPs saved, by the formula of FastV's paper: 1 - (K f(n) + (T - K) f((1 - R) n)) / (T f(n)).

    Args:
        hidden: d.
        intermediate: m.
        visual: n.
        layer: K.
        dropped: R, the share that goes.
        num_layers: T.
    """
    left = [visual] * layer + [(1 - dropped) * visual] * (num_layers - layer)
    whole = fastv_macs_visual(hidden, intermediate, [visual] * num_layers)
    return 1 - fastv_macs_visual(hidden, intermediate, left) / whole


def sparsevlm_macs(hidden: int, intermediate: int, tokens_per_layer: Sequence[float]) -> float:
    """SparseVLM's "FLOPs": multiply-adds of all tokens, text and merged ones too, with an MLP of three matrices.

    Its paper's 4.62 T for LLaVA-1.5-7B results for 576 visual and 118 other tokens (fitted: the paper gives no number).

    Args:
        hidden: d.
        intermediate: m.
        tokens_per_layer: n of each layer.
    """
    return paper_macs_visual(hidden, intermediate, tokens_per_layer)


def prefill_flops(
    sizes: ModelSizes, prompt: PromptSize, selection: SelectionCost | None = None, *, logits: float = 1
) -> dict[str, float]:
    """FLOPs of one prompt's prefill, by part.

    Args:
        sizes: The model's.
        prompt: The prompt with the visual tokens that enter each layer (`PromptSize.under`, `PromptSize.undropped`).
        selection: What choosing them costs (`Method.selection`); None: nothing is chosen.
        logits: Positions that go through the lm_head; `generate` needs one.

    Returns:
        vision_tower, projector, attention_projections (q, k, v, o), attention (both products, full square), mlp,
        ranking, lm_head; their sum `total`; and, not summed, `attention_causal` (pairs that a causal mask leaves)
        and `total_causal`.

    Raises:
        ValueError: If the layers do not match the model's.
    """
    if len(prompt.visual_per_layer) != sizes.layers:
        raise ValueError(f"visual_per_layer has {len(prompt.visual_per_layer)} entries for {sizes.layers} layers")
    d, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    tokens = prompt.tokens_per_layer
    seen = sizes.tower.flops(prompt.visual, prompt.images) if prompt.visual else (0.0, 0.0)
    flops = {
        "vision_tower": seen[0],
        "projector": seen[1],
        "attention_projections": sum(2.0 * n * d * (2 * queries + 2 * keys) for n in tokens),
        "attention": sum(2.0 * 2 * n * n * queries for n in tokens),
        "mlp": sum(2.0 * n * d * sizes.intermediate * 3 for n in tokens),
        "ranking": selection_flops(sizes, prompt, selection or SelectionCost()),
        "lm_head": 2.0 * logits * d * sizes.vocab,
    }
    flops["total"] = sum(flops[name] for name in SUMMED)
    flops["attention_causal"] = sum(2.0 * n * (n + 1) * queries for n in tokens)
    flops["total_causal"] = flops["total"] - flops["attention"] + flops["attention_causal"]
    return flops


def selection_flops(sizes: ModelSizes, prompt: PromptSize, selection: SelectionCost) -> float:
    """FLOPs of choosing tokens: rows of attention before the boundaries and in the tower, and a method's own.

    Raises:
        ValueError: If a boundary is outside the decoder.
    """
    if outside := [k for k in selection.boundaries if not 0 <= k < sizes.layers]:
        raise ValueError(f"boundaries {outside} are not among the layers 0..{sizes.layers - 1}")
    if not prompt.visual:
        return 0.0
    d, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # all tokens that reach a boundary give keys, the query rows queries; layers k-1 and k before the cut see
    # equally many tokens, so it does not matter which of the two the method observes
    reaching = [prompt.visual + prompt.text, *prompt.tokens_per_layer]
    made, rows = 0 if selection.keys_cached else keys, selection.query_rows
    macs = sum(n * d * made + rows * (d + n) * queries for n in (reaching[k] for k in selection.boundaries))
    macs += sum(sizes.tower.rows_macs(asked, prompt.visual, prompt.images) for asked in selection.tower_rows)
    return 2.0 * (macs + selection.macs)


def decode_flops_per_token(sizes: ModelSizes, tokens_per_layer: Sequence[float]) -> float:
    """FLOPs of one decoding step, in which each layer sees this many keys, the new token's included."""
    d, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    fixed = d * (2 * queries + 2 * keys) + 3 * d * sizes.intermediate
    return 2.0 * (sum(fixed + 2 * n * queries for n in tokens_per_layer) + d * sizes.vocab)


def kv_bytes(sizes: ModelSizes, tokens_per_layer: Sequence[float], bytes_per_value: int) -> float:
    """Bytes of keys and values in the cache after a prefill of one prompt."""
    return 2.0 * sizes.kv_heads * sizes.head_dim * bytes_per_value * sum(tokens_per_layer)


def cost(
    sizes: ModelSizes, prompts: Sequence[PromptSize], schedule: Schedule, method: Method | None, dtype_bytes: int
) -> Cost:
    """The cost of a run's prefills, as means over its samples; times are None.

    Ratios are ratios of means: all prompts' FLOPs (KV bytes) to those with nothing dropped.

    Args:
        sizes: The model's.
        prompts: The run's samples, with the visual tokens that actually entered each layer.
        schedule: The boundaries at which the method drops, and pays for choosing.
        method: None if nothing is dropped.
        dtype_bytes: Bytes of a number in the cache.

    Raises:
        ValueError: If there is no prompt.
    """
    if not prompts:
        raise ValueError("a cost is a mean over prompts: there are none")
    parts: Any = Counter()
    whole: Any = Counter()
    kv = decode = macs = text_tokens = visual_tokens = 0.0
    per_layer = [0.0] * sizes.layers
    for prompt, times in Counter(prompts).items():
        share, plain = times / len(prompts), prompt.undropped(sizes.layers)
        selection = None if method is None else method.selection(schedule, prompt, sizes)
        parts.update({name: value * share for name, value in prefill_flops(sizes, prompt, selection).items()})
        undropped = prefill_flops(sizes, plain)
        whole.update({name: share * undropped[name] for name in ("total", "total_causal")})
        decode += share * decode_flops_per_token(sizes, [n + 1 for n in prompt.tokens_per_layer])
        whole["decode"] += share * decode_flops_per_token(sizes, [n + 1 for n in plain.tokens_per_layer])
        kv += share * kv_bytes(sizes, prompt.tokens_per_layer, dtype_bytes)
        whole["kv"] += share * kv_bytes(sizes, plain.tokens_per_layer, dtype_bytes)
        macs += share * paper_macs_visual(sizes.hidden, sizes.intermediate, prompt.visual_per_layer)
        text_tokens += share * prompt.text
        visual_tokens += share * prompt.visual
        per_layer = [mean + share * n for mean, n in zip(per_layer, prompt.visual_per_layer)]
    return Cost(
        samples=len(prompts),
        text_tokens=text_tokens,
        visual_tokens=visual_tokens,
        visual_tokens_per_layer=per_layer,
        tokens_per_layer=[n + text_tokens for n in per_layer],
        mean_keep=sum(per_layer) / (visual_tokens * sizes.layers) if visual_tokens else 1.0,
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
        kv_bytes_per_layer=[kv_bytes(sizes, [n + text_tokens], dtype_bytes) for n in per_layer],
    )
