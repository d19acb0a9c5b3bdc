"""A method at a layer: its view, the attention rows it may ask for, and the cut by its scores.

Shapes: B prompts, T tokens alive, Q attention rows, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from pdrop.engine import autocast, deepstack
from pdrop.engine.architecture import Rotary
from pdrop.engine.prefill import Ranked
from pdrop.engine.sequence import Prompts, take
from pdrop.engine.state import Forward, Turns
from pdrop.methods.base import AttentionRows, Method, Ranking, View
from pdrop.methods.transfer import moved
from pdrop.schedule import Stage


def view(
    run: Forward,
    number: int,
    layer: nn.Module,
    hidden: Tensor,
    rotary: Rotary,
    stage: Stage | None = None,
    keys: Tensor | None = None,
    output: Tensor | None = None,
) -> View:
    """The view of layer `number`'s input, hidden [B, T, D], for a method that ranks for `stage`.

    `keys` [B, kv heads, T, head size] and `output` [B, T, D] are the layer's own, if it has already run.
    """
    prompts, alive = run.prompts, run.alive
    assert prompts is not None and alive is not None
    cos, sin = (x.to(hidden.device) for x in rotary)
    turns = run.turns[number]

    def attention(rows: Tensor | None, most: int | range | None, rotated: bool) -> AttentionRows:
        asking: Tensor | None = alive.query if rows is None else rows
        if alive.block is not None:  # there is no padding
            query = alive.block.query
            asking, most = (None, range(query, query + 1)) if rows is None else (rows, most)
        elif rows is not None:
            asking = rows & alive.valid
        if most is None:
            most = prompts.max_queries if asking is None or rows is None else int(asking.sum(1).max())
        if rotated:
            return attention_rows(layer, hidden, (cos, sin), alive.valid, asking, most, keys, turns)
        return attention_rows(layer, hidden, (cos, sin), alive.valid, asking, most, None, "nothing")

    def draw(seed: int) -> Tensor:
        return take(moved(prompts.draw(seed, number, run.samples), hidden.device), alive.index)

    def own_keys() -> Tensor:
        return keys if keys is not None else layer_keys(layer, hidden, (cos, sin), turns)

    text = [length - visual for length, visual in zip(alive.lengths, alive.visual_counts)]
    return View(
        number,
        hidden,
        alive.index,
        alive.valid,
        alive.candidates,
        alive.query,
        alive.visual_counts,
        text,
        prompts.protected_counts,
        stage,
        run.begun,
        prompts.visual_counts,
        None,
        output,
        alive.block,
        lambda: take(prompts.ids.to(hidden.device), alive.index),
        autocast.as_here(hidden, attention),
        draw,
        run.images,
        autocast.as_here(hidden, own_keys),
        run.norm,
        autocast.as_here(hidden, run.tower),
        run.texts,
    )


def with_plan(run: Forward, method: Method, seen: View) -> View:
    """The view with the planned numbers that stay, for methods that choose a set."""
    if seen.stage is None or seen.stage.adaptive:
        return seen
    assert run.prompts is not None
    return replace(seen, stays=[stay for stay, _ in planned(run.prompts, method, seen, None)])


def layer_keys(layer: nn.Module, hidden: Tensor, rotary: Rotary, turns: Turns) -> Tensor:
    """The keys of `layer`, rotated, [B, kv heads, T, head size], computed because no cache holds them."""
    norm: Any = layer.input_layernorm
    return projected(layer, "k", norm(hidden), rotary, turns)


def cut(run: Forward, method: Method, seen: View, ranked: Tensor | Ranking) -> tuple[Tensor, Ranked]:
    """Keep the tokens that stay, and merge some that go; records in `run` which are left.

    Args:
        seen: The boundary layer's input, T tokens.
        ranked: Their scores, [B, T], or a `Ranking`.

    Returns:
        Hidden states of the tokens left, [B, T', D], and the boundary's record for the trace.
    """
    prompts, alive, hidden = run.prompts, run.alive, seen.hidden
    assert prompts is not None and alive is not None
    # under a device map it may have been observed on another device
    scores = (ranked.scores if isinstance(ranked, Ranking) else ranked).to(hidden.device)
    protected, now = prompts.protected_counts, alive.visual_counts
    plan = planned(prompts, method, seen, ranked)
    keep, makes = [stay for stay, _ in plan], [made for _, made in plan]
    if keep == now:
        return hidden, Ranked(scores, alive, alive, alive.names)
    going = [n - k for n, k in zip(now, keep)]
    inside, run.dropped = alive.best_of_block(scores, keep), True
    if not any(makes):
        if inside is None:
            run.alive, rows = alive.shorten(alive.best(scores, keep, protected), keep)
        else:
            run.alive, rows = alive.shorten_block(inside)
        deepstack.shorten(run, rows)
        return take(hidden, rows), Ranked(scores, alive, run.alive, alive.names)
    if inside is None:
        goes = alive.candidates & ~alive.best(scores, keep, protected)
    else:
        goes = alive.visual.scatter(1, inside, False)
    merged, names = method.merge(seen, scores, goes, going), run.names(hidden.device)
    if inside is None or merged.after is not None or min(makes) != merged.centres.shape[1]:
        stays = alive.valid ^ goes
        run.alive, rows = alive.shorten_with(stays, keep, merged.centres, makes, names, merged.after)
    else:
        run.alive, rows = alive.shorten_block(inside, merged.centres, names)
    deepstack.shorten(run, rows, merged.weights)
    hidden = take(torch.cat([hidden, merged.states.to(hidden)], 1), rows)
    return hidden, Ranked(scores, alive, run.alive, names, merged.centres, merged.weights, merged.moved)


def planned(prompts: Prompts, method: Method, seen: View, ranked: Tensor | Ranking | None) -> list[tuple[int, int]]:
    """For each prompt, how many visual tokens stay and how many are made: the method's plan within what is possible.

    Query tokens stay; prompts that may lose nothing keep everything.

    Raises:
        ValueError: If the stage is adaptive and the method has found no numbers.
    """
    now = seen.visual_counts
    if isinstance(ranked, Ranking):
        if ranked.makes is None:
            counts = [(n, method.merges(max(0, before - n))) for n, before in zip(ranked.stays.tolist(), now)]
        else:
            pairs = torch.stack([ranked.stays, ranked.makes.to(ranked.stays.device)], 1).tolist()
            counts = [(stay, made) for stay, made in pairs]
    elif seen.stage is not None and seen.stage.adaptive:
        raise ValueError(
            f"{type(method).__name__}.score says nothing of how many stay at {seen.stage}: return a Ranking"
        )
    else:
        counts = method.plan(seen, prompts.visual_counts)
    plan = []
    for (stay, made), least, n, droppable in zip(counts, prompts.protected_counts, now, prompts.droppable):
        possible = max(least, min(n, stay)) if droppable else n
        plan.append((possible, made if possible == stay else method.merges(n - possible) if possible < n else 0))
    return plan


def cached_keys(cache: Any, number: int, new: int) -> Tensor | None:
    """The keys that layer `number` has just cached for `new` tokens; None if the cache stores them in another form.

    An offloaded cache has moved them to the host by then.
    """
    layers = () if getattr(cache, "offloading", False) else getattr(cache, "layers", ())
    if number >= len(layers) or type(layers[number]) is not DynamicLayer:
        return None
    keys: Tensor = layers[number].keys[:, :, -new:]
    return keys


@torch.no_grad()
def attention_rows(
    layer: nn.Module,
    hidden: Tensor,
    rotary: Rotary,
    valid: Tensor,
    asking: Tensor | None,
    most: int | range,
    keys: Tensor | None = None,
    turns: Turns = "all",
) -> AttentionRows:
    """Rows of the attention in `layer`.

    Costs the layer's query projection over `most` tokens and, if the layer has not run yet, its key projection over all
    tokens; the layer's modules are called as modules, so sharding and adapters work.

    Args:
        hidden: The layer's input, [B, T, D].
        rotary: (cos, sin), each [B or 1, T, head size or the rotated part of it].
        valid: Which are tokens, not padding, [B, T] bool.
        asking: Tokens whose rows are computed, [B, T] bool; None: all at the places `most`.
        most: An upper bound on the rows of a prompt; or, without padding, a range of places that contains them.
        keys: The layer's own keys for these tokens, rotated, [B, kv heads, T, head size]; None: to be computed.
        turns: The part of each head that the layer rotates: see pdrop.engine.probe.
    """
    attention: Any = layer.self_attn
    cos, sin = rotary
    if isinstance(most, range):
        asked = partial(at_places, places=most)
    else:  # [B, Q] places of the rows; rows not asked for have no weight
        assert asking is not None
        at = asking.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        asked = partial(take, index=at)
    asks = (asked(cos), asked(sin))
    norm: Any = layer.input_layernorm  # with keys given, only query rows need it
    if keys is None:
        hidden = norm(hidden)
        q, k = projected(layer, "q", asked(hidden), asks, turns), projected(layer, "k", hidden, rotary, turns)
    else:
        q, k = projected(layer, "q", norm(asked(hidden)), asks, turns), keys
    # grouped-query attention: the heads of a group are rows of one product, so its keys are neither repeated nor copied
    wide = torch.promote_types(k.dtype, torch.float32)  # half precision overflows before it is scaled
    q, k = (
        q.to(wide).unflatten(1, (k.shape[1], -1)),
        k.to(wide),
    )  # [B, kv heads, group, Q, size], [B, kv heads, T, size]
    with autocast.off(hidden):
        logits = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4]).float() * attention.scaling
    # the lowest finite number, not -inf: a row that sees nothing (padding) must not become NaN
    lowest, places = torch.finfo(logits.dtype).min, partial(torch.arange, k.shape[2], device=hidden.device)
    if not isinstance(most, range):
        seen = valid[:, None] & (places() <= at[..., None])
        logits = logits.masked_fill(~seen[:, None, None], lowest)
    elif most.start < k.shape[2] - 1:
        keys_at = places()
        logits = logits.masked_fill(keys_at > keys_at[most.start : most.stop, None], lowest)
    probabilities = logits.softmax(-1).flatten(1, 2)

    def rotation() -> Tensor:
        ones = (x.new_ones(*x.shape[:2], attention.head_dim, dtype=torch.float32)[:, None] for x in (asks[0], cos))
        q, k = (rotate(layer, x, angles, turns)[:, 0] for x, angles in zip(ones, (floats(asks), floats((cos, sin)))))
        logits: Tensor = q @ k.transpose(1, 2) * attention.scaling
        return logits

    which = asked(valid if asking is None else asking)
    return AttentionRows(probabilities, which, partial(torch.no_grad()(rotation)), asking is None)


def at_places(x: Tensor, places: range) -> Tensor:
    """[B or 1, T, ...] -> [B or 1, Q, ...], without a copy."""
    return x[:, places.start : places.stop]


def rotate(layer: nn.Module, x: Tensor, rotary: Rotary, turns: Turns) -> Tensor:
    """Heads rotated as the layer does it, [B, heads, T, head size]."""
    if turns == "nothing":
        return x
    rope: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb
    reach = rotary[0].shape[-1] if turns == "part" else x.shape[-1]
    # the function rotates queries and keys at once: hand it no second half to rotate
    turned = rope(x[..., :reach], x[:, :0, :, :reach], *rotary)[0]
    return torch.cat([turned, x[..., reach:]], -1) if turns == "part" else turned


def projected(layer: nn.Module, name: str, x: Tensor, rotary: Rotary, turns: Turns) -> Tensor:
    """Queries ("q") or keys ("k") with the model's own norms and rotation, [B, T, D] -> [B, heads, T, head size]."""
    attention: Any = layer.self_attn
    x = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    x = (norm(x) if norm is not None else x).transpose(1, 2)
    norm = getattr(attention, f"{name}_layernorm", None)  # for each head, if there is one
    return rotate(layer, norm(x) if norm is not None else x, rotary, turns)


def floats(rotary: Rotary) -> Rotary:
    """In float32, since SparseVLM+ divides by differences of rotations near zero."""
    return rotary[0].float(), rotary[1].float()
