"""Checks of how many tokens stay and which: counts, text, order, seeds, cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache

from pdrop.conformance.batches import FLOAT
from pdrop.conformance.families import IMAGE, LAYERS, VIDEO, build
from pdrop.conformance.prompts import collate, sample, single
from pdrop.conformance.subject import Subject, equal, must, no_grad, order_of, real, samples_of
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import kv_bytes, prefill_flops
from pdrop.methods.base import Method
from pdrop.methods.random_drop import RandomAdaptive
from pdrop.shapes import ModelSizes, PromptSize

IMAGE_TOKENS = 16  # tokens of a LLaVA image here: one square, which methods' own numbers are for


@no_grad
def counts(subject: Subject, family: str, backend: str) -> None:
    """The tokens in each layer are as many as the method declares, and as the cache then holds."""
    method, schedule, model = subject.method, subject.schedule, build(family, backend, FLOAT[backend])
    batch = collate(family, samples_of(family, model, subject))
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    with subject.attached(model) as trace:
        model(**batch, past_key_values=cache)
    must(trace.prefills == 1, f"{trace.prefills} prefills seen in one forward")
    held = [layer.keys.shape[2] for layer in cache.layers]
    must(held == [max(layer) for layer in trace.tokens], f"the cache holds {held}, the trace says {trace.tokens}")
    length = batch["input_ids"].shape[1]
    must(cache.get_seq_length() == length, f"the cache says {cache.get_seq_length()} tokens, the prompts have {length}")
    adaptive = any(stage.adaptive for stage in schedule)
    by_grid = type(method).plan is not Method.plan
    for row, visual in enumerate(trace.visual):
        got = [layer[row] for layer in trace.visual_tokens]
        must(got == sorted(got, reverse=True), f"dropped tokens came back: {got}")
        if adaptive or (by_grid and not (family.startswith("llava") and visual in (0, IMAGE_TOKENS))):
            continue
        want = method.tokens_per_layer(schedule, visual, LAYERS)
        must(got == want, f"of {visual} visual tokens {got} enter the layers, not {want} as the method says")


@no_grad
def text_stays(subject: Subject, family: str, backend: str) -> None:
    """Every text token reaches the end, and is counted in every layer."""
    model = build(family, backend, FLOAT[backend])
    batch = collate(family, samples_of(family, model, subject))
    with subject.attached(model) as trace:
        logits = model(**batch).logits
    for row, visual in enumerate(trace.visual):
        text = int(real(batch, row).sum()) - visual
        found = [layer[row] - other[row] for layer, other in zip(trace.tokens, trace.visual_tokens)]
        must(found == [text] * LAYERS, f"a prompt of {text} text tokens has {found} of them in the layers")
        ids, reached = batch["input_ids"][row], logits[row].abs().sum(-1) > 0
        words = real(batch, row) & (ids != IMAGE) & (ids != VIDEO)
        gone = (words & ~reached).nonzero()[:, 0].tolist()
        must(not gone, f"text tokens at {gone} have no logits")
        left = int((reached & ~words & real(batch, row)).sum())
        must(left == trace.visual_tokens[-1][row], f"{left} visual tokens have logits, not what the trace says")


@no_grad
def order(subject: Subject, family: str, backend: str) -> None:
    """The kept tokens are the best by the method's own scores, each once, in the order of the prompt."""
    model = build(family, backend, FLOAT[backend])
    batch = collate(family, samples_of(family, model, subject))
    with subject.attached(model) as trace:
        model(**batch)
    before = [list(range(n)) for n in trace.visual]
    for boundary, (stays, scores) in enumerate(zip(order_of(trace), trace.scores)):
        for row, names in enumerate(stays):
            where = f"boundary {boundary}, prompt {row}"
            kept = [name for name in names if name in before[row]]
            must(len(set(names)) == len(names), f"{where}: a token twice in {names}")
            must(kept == [name for name in before[row] if name in kept], f"{where}: order of {kept}")
            must(all(name < trace.visual[row] for name in names), f"{where}: no such visual token in {names}")
            score = dict(zip(before[row], scores[row].tolist()))
            gone = [score[name] for name in before[row] if name not in kept]
            if kept and gone and len(score) == len(before[row]):
                worst = min(score[name] for name in kept)
                must(worst >= max(gone), f"{where}: a token of score {max(gone)} went, one of {worst} stays")
            before[row] = names


@no_grad
def seeds(subject: Subject, family: str, backend: str) -> None:
    """The same tokens twice, whatever is drawn elsewhere and in any order of the prompts."""
    model = build(family, backend, FLOAT[backend])
    samples = samples_of(family, model, subject)
    batch, turned = collate(family, samples), collate(family, samples[::-1])
    found = []
    for inputs, noise in ((batch, 1), (batch, 2), (turned, 3)):
        torch.manual_seed(noise)
        with subject.attached(model) as trace:
            model(**inputs)
        found.append(order_of(trace))
    must(found[0] == found[1], "the same prompts lost other tokens the second time")
    must([boundary[::-1] for boundary in found[2]] == found[0], "the order of the prompts decides what goes")
    if "seed" in vars(subject.method) and any(0 < len(row) < n for row, n in zip(found[0][0], trace.visual[::-1])):
        other = replace(subject.method, seed=subject.method.seed + 1)  # type: ignore[attr-defined, call-arg]
        with replace(subject, method=other).attached(model) as trace:
            model(**batch)
        must(order_of(trace) != found[0], "another seed draws the same tokens")


def unequal(counted: float, closed: float) -> str:
    """A message: the difference in FLOPs, and where the missing ones belong."""
    missing = (counted - closed) / 2
    text = f"{counted:.0f} FLOPs counted, {closed:.0f} in closed form: {abs(missing):.0f} multiply-adds "
    if missing > 0:
        return text + "are missing; a method's own products belong into the `macs` of what its `selection` returns"
    return text + "too many; the method's `selection` counts products that were not computed"


@no_grad
def cost(subject: Subject, family: str, backend: str) -> None:
    """The closed form equals torch's counter, and the bytes are those of the cache's tensors."""
    method, schedule, model = subject.method, subject.schedule, build(family, backend, torch.float32)
    inputs = single(family, sample(family, model))
    sizes = ModelSizes.from_config(model.config)
    cache: Any = DynamicCache(config=model.config.text_config)
    with subject.attached(model) as trace:
        counted = counted_prefill_flops(model, inputs)["total"]
        model(**inputs, past_key_values=cache)
    visual = trace.visual[0]
    text, layers = inputs["input_ids"].shape[1] - visual, [row[0] for row in trace.visual_tokens]
    prompt = PromptSize(text, visual, tuple(layers), images=1)
    closed = prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))["total"]
    if isinstance(method, RandomAdaptive):
        must(counted <= closed, f"{counted:.0f} FLOPs counted, more than the bound of {closed:.0f}")
    else:
        slack = 1e-3 if method.adaptive else 1e-6  # how many were dropped is not certain if tokens were merged
        must(abs(counted - closed) <= slack * closed, unequal(counted, closed))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    want = kv_bytes(sizes, prompt.tokens_per_layer, 4)
    equal(torch.tensor(float(held)), torch.tensor(want), 0.0, "bytes of keys and values")
