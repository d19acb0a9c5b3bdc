"""Checks of what a method is shown, and of the places of the tokens that it merges."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pdrop.conformance.batches import FLOAT, RAGGED, batch_of
from pdrop.conformance.families import MERGED_TOWERS, build
from pdrop.conformance.subject import NotApplicable, Subject, equal, must, no_grad, tolerance
from pdrop.methods.base import Merged, View


def listening(subject: Subject, name: str, hears: Callable[[View, Any], None]) -> Subject:
    """The subject with a method whose `name` (score or merge) records what it was shown and what it returned."""
    kind = type(subject.method)
    if getattr(kind, "at", None) is not None and subject.method.at(subject.schedule.stages[0]) is not subject.method:
        raise NotApplicable("the method is made of others, which are looked at by themselves")
    own = getattr(kind, name)

    def heard(self: Any, view: View, *more: Any) -> Any:
        given = own(self, view, *more)
        hears(view, given)
        return given

    method: Any = object.__new__(type("Listening", (kind,), {name: heard}))
    method.__dict__.update(vars(subject.method))
    return replace(subject, method=method)


@no_grad
def shown(subject: Subject, family: str, backend: str) -> None:
    """At its first boundary a method is shown what the unattached model computes: states, keys, the vision tower."""
    model = build(family, backend, FLOAT[backend])
    batch = batch_of(family, model, RAGGED)
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    entering: list[Tensor] = []  # a model's own hidden_states leave out what is added between its layers
    with contextlib.ExitStack() as stack:
        for layer in model.get_decoder().layers:
            handle = layer.register_forward_pre_hook(lambda module, args: entering.append(args[0].clone()))
            stack.callback(handle.remove)
        model(**batch, past_key_values=cache)
    close = tolerance(backend)
    received = merged_attention(model, batch) if family in MERGED_TOWERS else {}
    seen: list[int] = []
    real = batch["attention_mask"].bool()

    def hears(view: View, given: Any) -> None:
        if seen:
            return
        seen.append(view.layer)
        alike(view.hidden, entering[view.layer], "hidden")
        if view.output is not None and view.layer + 1 < len(model.get_decoder().layers):
            alike(view.output, entering[view.layer + 1], "output")
        alike(view.keys().transpose(1, 2), cache.layers[view.layer].keys.transpose(1, 2), "keys")
        must(view.stays is None or len(view.stays) == len(real), "no number of tokens for each prompt in stays")
        if subject.method.looks_at() is None:
            return
        tower = view.tower
        at = tower.at(view.index)
        made = tower.project(tower.states).flatten(0, 1)[at.clamp(min=0)]
        equal(
            made[at >= 0], view.hidden[at >= 0], close, "rows of the tower, projected, are not the tokens they became"
        )
        for layer in (subject.method.looks_at_merged() if tower.merges > 1 else subject.method.looks_at()) or ():
            rows = tower.rows(layer).sum(-1)
            equal(rows, torch.ones_like(rows), 1e-5, f"attention of tower layer {layer}")
            if layer in received:
                got = tower.of(view.index, tower.rows(layer).mean(1))[at >= 0]
                equal(got, received[layer], 1e-5, f"attention of tower layer {layer} is another token's")

    def alike(got: Tensor, want: Tensor, words: str) -> None:
        equal(got[real].to(want.dtype), want[real], close, f"{words} at layer {seen[0]} is not the unattached model's")

    heard = listening(subject, "score", hears)
    with heard.attached(model):
        model(**batch)
    must(bool(seen), "the method was not asked")


def merged_attention(model: Any, batch: Any) -> dict[float, Tensor]:
    """The attention that each token's patches get in a tower's last layer, mean over rows and heads, in the order of
    the prompts, under that layer's number: computed from the inputs and outputs of the unattached model's modules.

    Which token a patch became follows from the merger's rows, found again among those that the tower returns.
    """
    tower = model.model.visual
    last, kept = tower.blocks[-1].attn, {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: kept.update({name: (args, kwargs, output)})

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in (("attention", last), ("merger", tower.merger), ("tower", tower))
    ]
    try:
        tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    finally:
        for handle in handles:
            handle.remove()
    (states, *_), called, _ = kept["attention"]
    query, key, _ = last.qkv(states).unflatten(-1, (3, last.num_heads, -1)).double().unbind(1)
    cos, sin = (part.double().unsqueeze(1) for part in called["position_embeddings"])

    def turned(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        rotated: Tensor = x * cos + torch.cat([-two, one], -1) * sin
        return rotated

    logits = torch.einsum("qhd,khd->hqk", turned(query), turned(key)) * last.scaling
    sizes = [height * width for frames, height, width in batch["image_grid_thw"].tolist() for _ in range(frames)]
    picture = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    logits = logits.masked_fill(picture[:, None] != picture, -torch.inf)
    shares = logits.softmax(-1).mean(0) / torch.tensor(sizes)[picture][:, None]
    tokens = shares.sum(0).unflatten(0, (-1, tower.spatial_merge_size**2)).sum(1)
    order = torch.cdist(kept["tower"][2].pooler_output.double(), kept["merger"][2].double()).argmin(1)
    return {-1: tokens[order].float()}


@no_grad
def placed(subject: Subject, family: str, backend: str) -> None:
    """Merged tokens are at the places that the method gives, in its order."""
    model = build(family, backend, FLOAT[backend])
    batch = batch_of(family, model, RAGGED)
    told: list[tuple[View, Merged]] = []
    heard = listening(subject, "merge", lambda view, given: told.append((view, given)))
    with heard.attached(model) as trace:
        model(**batch)
    if not told or told[0][1].after is None:
        raise NotApplicable("the method makes no token, or leaves it to the engine where it stands")
    view, after = told[0][0], told[0][1].after
    boundary = next(n for n, made in enumerate(trace.merged) if any(made))
    visual = (view.visual & view.valid).cumsum(
        1
    ) - 1  # number of the visual token at each place, or of the one before it
    for row, order in enumerate(trace.order[boundary]):
        made = trace.merged[boundary][row]
        names = order.tolist()
        want = []
        for name in names:
            if name >= 0:
                want.append((name, 0, 0, name))
            else:
                number = next(at for at, token in enumerate(made) if -1 - token.number == name)
                place = int(after[row, number])
                want.append((int(visual[row, place]) if place >= 0 else -1, 1, number, name))
        must(
            [one[3] for one in sorted(want)] == names,
            f"prompt {row}: made tokens stand elsewhere than they were told to",
        )
