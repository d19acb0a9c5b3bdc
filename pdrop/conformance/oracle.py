"""The oracle that the engine is compared with: dropping by masks, in plain loops, float64, with nothing removed.

Why: an engine that removes rows must give each remaining token exactly what it would get if the dropped tokens were
still there but hidden. So the oracle runs all tokens through all layers, one row of the batch at a time, and hides
dropped tokens as keys from their boundary on. It has its own attention, ranking, rotation and renumbering, shares no
code with the engine, and takes from the model only what is not attention: embeddings (recorded on the unattached
model), normalisation, projections, MLP, lm_head.

    truth = forward(model, batch, FASTV, {2: 0.5}, labels=labels)
    truth.logits, truth.kept[boundary][row], truth.scores[boundary][row]

Everything is differentiable with respect to the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VISION_KEYS = ("image_token_id", "video_token_id")


@dataclass(frozen=True)
class Rule:
    """How a method drops: `observe` layers before the boundary it looks at attention; `count` is its rounding."""

    observe: int
    count: Callable[[float], int]


PYRAMIDDROP = Rule(observe=0, count=int)
FASTV = Rule(observe=1, count=round)


@dataclass
class Truth:
    """What the engine must give. `logits` is [batch, tokens, vocabulary], meaningful where `alive[row]` says so.

    `kept` and `scores` are as in the engine's trace. `margin` is the smallest gap between the scores of a kept and a
    dropped token, relative to the larger: gaps that float32 does not resolve prove nothing.
    """

    logits: Tensor
    alive: list[list[int]]
    kept: list[list[list[int]]]
    scores: list[list[list[float]]]
    tokens: list[list[int]]
    margin: float = math.inf
    visual: list[int] = field(default_factory=list)


class _Recorded(Exception):
    """Raised to stop the model once its decoder's inputs are known."""


def decoder_inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model's decoder: embeddings with the image features in place, position ids, deepstack."""
    seen: dict[str, Any] = {}

    def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _Recorded

    handle = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    try:
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    except _Recorded:
        return seen
    finally:
        handle.remove()
    raise AssertionError("the decoder was never called")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoFormer's rotation in the two-halves layout: x is [heads, tokens, d], cos and sin are [tokens, d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, alive: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Attention probabilities [heads, tokens, tokens] and values [heads, tokens, d] of one row x [tokens, width].

    Keys are the alive tokens up to each query; every token also sees itself, so that dropped ones stay finite.
    """
    module, tokens = layer.self_attn, len(x)
    normed = layer.input_layernorm(x)
    query, key, value = (
        getattr(module, f"{name}_proj")(normed).view(tokens, -1, module.head_dim) for name in ("q", "k", "v")
    )
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    groups = len(query) // len(key)
    key, value = rotate(key, cos, sin).repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    visible[:, list(alive)] = True
    visible = (visible & torch.ones_like(visible).tril()) | torch.eye(tokens, dtype=torch.bool)
    logits = rotate(query, cos, sin) @ key.transpose(1, 2) / math.sqrt(module.head_dim)
    return logits.masked_fill(~visible, -math.inf).softmax(-1), value


def run_layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, alive: Sequence[int]) -> Tensor:
    """One decoder layer on one row x [tokens, width]: see `attention`."""
    weights, value = attention(layer, x, cos, sin, alive)
    x = x + layer.self_attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def positions_of(decoder: Any, seen: dict[str, Any], length: int) -> Tensor:
    """Position ids that the decoder was given, [rows or 1, tokens], or of three axes (time, height, width)."""
    given = seen.get("position_ids")
    given = torch.arange(length)[None] if given is None else given
    if given.ndim == 3 and len(given) == 4:  # Qwen: text positions for flash attention, then time, height, width
        given = given[1:]
    if given.ndim == 2 and "mrope_section" in (decoder.config.rope_parameters or {}):
        given = given[None].expand(3, -1, -1)
    return given


def queries_of(labels: Tensor | None, real: list[int]) -> list[int]:
    """Query positions of a row: the last real token, or with labels those before each answer span."""
    if labels is None:
        return [real[-1]]
    return [p for p in real if p + 1 < len(labels) and labels[p] == -100 and labels[p + 1] != -100]


def forward(
    model: Any,
    batch: dict[str, Any],
    rule: Rule | None,
    boundaries: dict[int, float],
    positions: str = "original",
    labels: Tensor | None = None,
    queries: list[list[int]] | None = None,
    kept: list[list[list[int]]] | None = None,
) -> Truth:
    """Run a batch with tokens hidden.

    Args:
        rule: The method; None takes the kept indices from `kept` instead of ranking.
        boundaries: {layer: share of the original visual tokens that stays}.
        labels: The queries are the tokens before each answer, as in training; rows without an answer lose nothing.
        queries: The query positions of each row, if they are given.
    """
    decoder, seen = model.get_decoder(), decoder_inputs(model, batch)
    embeddings, ids = seen["inputs_embeds"], batch["input_ids"]
    rows, length = ids.shape
    mask = batch.get("attention_mask", torch.ones_like(ids))
    given = positions_of(decoder, seen, length)
    deep = seen.get("deepstack_visual_embeds") or ()
    vision_ids = [getattr(model.config, key, None) for key in VISION_KEYS]
    truth = Truth(embeddings, [], [[] for _ in boundaries], [[] for _ in boundaries], [])
    outputs = []
    for row in range(rows):
        real = [p for p in range(length) if mask[row, p]]
        visual = [p for p in real if int(ids[row, p]) in vision_ids]
        asking = queries[row] if queries is not None else queries_of(None if labels is None else labels[row], real)
        x, alive, entering = embeddings[row], list(real), []
        rotation = decoder.rotary_emb(x[None], given[..., row : row + 1, :] if given.shape[-2] > 1 else given)
        scores: dict[int, Tensor] = {}
        for number, layer in enumerate(decoder.layers):
            where = {p: i for i, p in enumerate(visual)}  # position -> original visual index
            for stage, boundary in enumerate(boundaries):
                if rule and number == boundary - rule.observe:
                    truth.scores[stage].append([])
                    if asking and visual:
                        turned = _rotation(decoder, x, rotation, alive, positions)
                        scores[stage] = attention(layer, x, *turned, alive)[0].detach()[:, asking].mean((0, 1))
                        ranked = [p for p in visual if p in alive and p not in asking]
                        truth.scores[stage][-1] += scores[stage][ranked].tolist()
                if number != boundary:
                    continue
                ranked = [p for p in visual if p in alive]
                if kept is not None:
                    stays = [visual[i] for i in kept[stage][row]]
                elif rule is None or not asking or not visual:
                    stays = ranked
                else:
                    stays = _best(truth, scores[stage], ranked, asking, rule.count(len(visual) * boundaries[boundary]))
                alive = [p for p in alive if p not in where or p in stays]
                truth.kept[stage].append([where[p] for p in stays])
            entering.append(len(alive))
            x = run_layer(layer, x, *_rotation(decoder, x, rotation, alive, positions), alive)
            if number < len(deep):
                places = seen["visual_pos_masks"][..., None]
                x = x + torch.zeros_like(embeddings).masked_scatter(places, deep[number].to(x))[row]
        outputs.append(model.lm_head(decoder.norm(x)))
        truth.alive.append(alive)
        truth.tokens.append(entering)
        truth.visual.append(len(visual))
    truth.logits = torch.stack(outputs)
    truth.tokens = [list(layer) for layer in zip(*truth.tokens)]
    return truth


def _best(truth: Truth, scores: Tensor, ranked: list[int], asking: list[int], count: int) -> list[int]:
    """The `count` visual positions with the highest scores, the earlier one of a tie; query tokens always stay."""
    pinned = [p for p in ranked if p in asking]
    free = sorted((p for p in ranked if p not in asking), key=lambda p: (-float(scores[p]), p))
    count = min(max(count - len(pinned), 0), len(free))
    if 0 < count < len(free):
        last, first_out = float(scores[free[count - 1]]), float(scores[free[count]])
        if last > 0:  # exact zeros (tokens no query can see) tie in every precision
            truth.margin = min(truth.margin, (last - first_out) / last)
    return sorted(pinned + free[:count])


def _rotation(
    decoder: Any, x: Tensor, rotation: tuple[Tensor, Tensor], alive: Sequence[int], positions: str
) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, d]: as the model made them, or for the alive tokens numbered 0, 1, 2, ..."""
    if positions == "original":
        return rotation[0][0], rotation[1][0]
    numbers = torch.zeros(1, len(x), dtype=torch.long)
    numbers[0, list(alive)] = torch.arange(len(alive))
    cos, sin = decoder.rotary_emb(x[None], numbers)
    return cos[0], sin[0]


def answers_only(batch: dict[str, Any], spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Labels on only the given span of each row's real tokens, (start, stop) as in a Python slice."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, row_spans in enumerate(spans):
        real = batch["attention_mask"][row].nonzero()[:, 0]
        for start, stop in row_spans:
            places = real[slice(start, stop or None)]
            labels[row, places] = batch["input_ids"][row, places]
    return labels
