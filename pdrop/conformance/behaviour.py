"""Checks of what the model computes: identity, causality, batches, decoding, positions, gradients, detaching."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pdrop.conformance import oracle
from pdrop.conformance.batches import FLOAT, GREEDY, ONE, RAGGED, STEPS, batch_of, kept_of, picture, prolong
from pdrop.conformance.families import build, fresh
from pdrop.conformance.prompts import collate, single
from pdrop.conformance.subject import (
    NotApplicable,
    Subject,
    equal,
    merges,
    must,
    no_grad,
    order_of,
    real,
    samples_of,
    tolerance,
)
from pdrop.engine.early import returned_cache
from pdrop.methods.base import Method
from pdrop.schedule import Schedule, Stage

STEP = 2e-5  # step of a weight along a random direction
NOISE = 2e-6  # tolerance of a loss: norms and rotary embeddings are computed in float32


@no_grad
def identity(subject: Subject, family: str, backend: str) -> None:
    """With keep 1 at the method's boundaries, logits and answers are those of the unattached model."""
    if any(stage.adaptive for stage in subject.schedule):
        raise NotApplicable("the method finds its own numbers: nothing can be asked to stay")
    model = build(family, backend, FLOAT[backend])
    batch = batch_of(family, model, RAGGED)
    want, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    whole = Schedule(tuple(Stage(stage.layer, 1.0) for stage in subject.schedule))
    with subject.attached(model, whole) as trace:
        got, again = model(**batch).logits, model.generate(**batch, **GREEDY)
    must(torch.equal(got, want), "logits of a forward differ from the unattached model's")
    must(torch.equal(again.sequences, answer.sequences), "answers differ from the unattached model's")
    must(all(torch.equal(a, b) for a, b in zip(again.logits, answer.logits)), "logits of decoding differ")
    must(len(trace.kept) == len(whole), "boundaries that drop nothing are missing from the trace")


def answered(batch: dict[str, Tensor], new: int) -> tuple[dict[str, Tensor], Tensor]:
    """The left-padded batch with `new` tokens after each prompt, labelled: so the end of the prompt ranks."""
    ids = torch.arange(20, 20 + new).expand(len(batch["input_ids"]), -1)
    whole = prolong(batch, torch.cat([batch["input_ids"], ids], 1))
    labels = torch.full_like(whole["input_ids"], -100)
    labels[:, -new:] = ids
    return whole, labels


def numbered(family: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the position ids that `generate` makes: without them, transformers' forward counts padding."""
    if "qwen" in family:
        return batch
    return dict(batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0))


@no_grad
def causal(subject: Subject, family: str, backend: str) -> None:
    """A different token after the prompt changes nothing before it."""
    model = build(family, backend, FLOAT[backend])
    whole, labels = answered(batch_of(family, model, RAGGED), 3)
    with subject.attached(model) as trace:
        before, order = model(**whole, labels=labels).logits, order_of(trace)
        for place in (-1, -2):
            other = dict(whole, input_ids=whole["input_ids"].clone())
            other["input_ids"][:, place] += 7
            after = model(**other, labels=labels).logits
            must(order_of(trace) == order, "a token after the query decides what goes")
            there = whole["attention_mask"][:, :place].bool()  # padding rows of unattached models hold anything
            words = f"another token at {place} moved what stands before it"
            equal(after[:, :place][there], before[:, :place][there], 1e-6, words)


@no_grad
def alone(subject: Subject, family: str, backend: str) -> None:
    """Each row of a ragged batch, padded on either side, has the order, token counts and logits that it has alone."""
    model = build(family, backend, FLOAT[backend])
    samples = samples_of(family, model, subject)
    found: list[Any] = []
    for one in samples:
        with subject.attached(model) as trace:
            logits = model(**single(family, one)).logits[0]
        # a batch in which nothing can go notes no boundary of its own
        found.append((logits, [row[0] for row in order_of(trace)], [layer[0] for layer in trace.tokens]))
    for side in ("left", "right"):
        batch = collate(family, samples, side)
        with subject.attached(model) as trace:
            together, order, tokens = model(**numbered(family, batch)).logits, order_of(trace), trace.tokens
        for row, (logits, its_order, its_tokens) in enumerate(found):
            where = f"prompt {row}, padded on the {side}"
            must([boundary[row] for boundary in order] == its_order, f"{where}: other tokens stay than alone")
            must([layer[row] for layer in tokens] == its_tokens, f"{where}: other numbers of tokens than alone")
            equal(together[row, real(batch, row)], logits, tolerance(backend), f"{where}: logits")
            dropped = any(sum(layer) < sum(trace.visual) for layer in trace.visual_tokens)
            padding = together[row, ~real(batch, row)]
            must(not (dropped and padding.any()), f"{where}: padding came back with values")


@no_grad
def decoding(subject: Subject, family: str, backend: str) -> None:
    """Cached decoding gives the masked oracle's result for the whole text; with merged tokens, that of one forward."""
    model, reference = build(family, backend, FLOAT[backend]), build(family)
    batch = batch_of(family, model, RAGGED)
    length, method = batch["input_ids"].shape[1], subject.method
    with subject.attached(model) as trace:
        out = model.generate(**batch, **GREEDY)
        tokens, kept, order, merged = trace.tokens, kept_of(trace), order_of(trace), merges(trace)
        held = [layer.keys.shape[2] for layer in returned_cache(out).layers]
        want = [max(layer) + STEPS - 1 for layer in tokens]
        must(held == want, f"after {STEPS} steps the cache holds {held} keys per layer, not {want}")
        whole, labels = answered(batch, STEPS - 1)
        whole["input_ids"][:, length:] = labels[:, length:] = out.sequences[:, length : length + STEPS - 1]
        forward = model(**numbered(family, whole), labels=labels).logits
        must(order_of(trace) == order, "with its answer after it and labels on that, a prompt keeps other tokens")
    steps = torch.stack(out.logits, 1)
    equal(steps, forward[:, length - 1 :], 2 * tolerance(backend), "decoding, against one forward over all of it")
    if merged:
        return
    exact = dict(prolong(batch_of(family, reference, RAGGED), whole["input_ids"]))
    boundaries = dict.fromkeys(subject.schedule.layers, 0.0)
    pinned = [[length - 1]] * len(batch["input_ids"])
    truth = oracle.forward(reference, exact, None, boundaries, method.positions, queries=pinned, kept=kept)
    equal(steps, truth.logits[:, length - 1 :], tolerance(backend), "decoding, against the oracle")
    for row, left in enumerate(truth.alive):
        equal(forward[row, left], truth.logits[row, left], tolerance(backend), f"prompt {row}, against the oracle")


@no_grad
def positions(subject: Subject, family: str, backend: str) -> None:
    """Each layer gets the rotary embeddings of the declared policy."""
    model = build(family, backend, FLOAT[backend])
    batch, method = batch_of(family, model, ONE), subject.method
    decoder, length = model.get_decoder(), batch["input_ids"].shape[1]
    options = GREEDY | {"max_new_tokens": 2}

    def rotations(context: Any) -> tuple[list[Tensor], Any]:
        """cos of every layer's call, the prompt's first and then the step's, each [tokens, d]; and the trace."""
        seen: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            trace = stack.enter_context(context)
            for layer in decoder.layers:
                handle = layer.register_forward_pre_hook(
                    lambda module, args, kwargs: seen.append(kwargs["position_embeddings"][0][0].clone()),
                    with_kwargs=True,
                )
                stack.callback(handle.remove)
            model.generate(**batch, **options)
        return seen, trace

    plain, _ = rotations(contextlib.nullcontext())
    got, trace = rotations(subject.attached(model))
    visual = (batch["input_ids"][0] >= 190).nonzero()[:, 0].tolist()
    visual = [place for place in visual if int(batch["input_ids"][0, place]) in (190, 191)]
    layers = len(decoder.layers)
    places, stage, stood = {j: place for j, place in enumerate(visual)}, 0, list(range(length))
    compact = False
    for number in range(layers):
        if stage < len(subject.schedule) and subject.schedule.layers[stage] == number:
            for token in trace.merged[stage][0]:
                places[-1 - token.number] = places[token.centre]
            names = trace.order[stage][0].tolist()
            block = [places[name] for name in names]
            dropped = len(block) < len(visual) or any(name < 0 for name in names)
            stood = [p for p in range(length) if p < visual[0]] + block + [p for p in range(length) if p > visual[-1]]
            compact, stage = method.positions == "compact" and dropped, stage + 1
        if compact:
            numbers = torch.arange(len(stood) + 1)[None]
            want = decoder.rotary_emb(got[0], numbers)[0][0]
        else:
            want = torch.cat([plain[0][stood], plain[layers]])
        equal(got[number], want[:-1], 1e-6, f"layer {number} does not have {method.positions} positions in the prompt")
        equal(got[layers + number], want[-1:], 1e-6, f"layer {number} does not decode at {method.positions} positions")


def gradients(subject: Subject, family: str, backend: str) -> None:
    """The loss can be trained with: it is the same as in evaluation, and its gradients say how it changes.

    Along a random direction the loss must change as its gradient says, for the weights of the tower and projector and
    for those of the language model.
    """
    model = fresh(family, backend)
    whole, labels = answered(batch_of(family, model, RAGGED), 3)

    def loss() -> tuple[Tensor, Any]:
        with subject.attached(model) as trace:
            found: Tensor = model(**whole, labels=labels, use_cache=False).loss
        return found, order_of(trace)

    with torch.no_grad():
        want = loss()[0].item()
    model.train()
    found, order = loss()
    found.backward()
    must(abs(found.item() - want) <= 1e-6, f"the loss is {found.item()} in training and {want} otherwise")
    inner = {id(p) for p in model.get_decoder().parameters()}
    generator = torch.Generator().manual_seed(0)
    for words, inside in (("tower and projector", False), ("language model", True)):
        those = [p for p in model.parameters() if (id(p) in inner) == inside]
        steps = [torch.randn(p.shape, generator=generator).to(p) * STEP for p in those]
        said = sum(float((p.grad * step).sum()) for p, step in zip(those, steps) if p.grad is not None)
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # to one side, to the other, and back
                for p, step in zip(those, steps):
                    p.add_(step, alpha=sign)
                moved, its_order = loss()
                losses.append(moved.item())
                if its_order != order:
                    raise NotApplicable("so small a step changes what goes: the loss jumps there")
        seen = (losses[0] - losses[1]) / 2
        must(
            abs(seen - said) <= 0.02 * max(abs(seen), abs(said)) + NOISE,
            f"along a direction of the {words} the loss changes by {seen:.3g}, its gradient says {said:.3g}",
        )


@no_grad
def detaches(subject: Subject, family: str, backend: str) -> None:
    """Hooks, weights and configuration are unchanged after the block, and after an exception in it."""
    model = build(family, backend, FLOAT[backend])
    batch = batch_of(family, model, RAGGED)
    want, before = model(**batch).logits, picture(model)
    with subject.attached(model):
        model(**batch)
        model.generate(**batch, **GREEDY)
    must(picture(model) == before, "the model is not what it was")

    def fails(self: Method, view: Any) -> Any:
        raise RuntimeError("on purpose")

    kind = type(subject.method)
    failing: Any = object.__new__(type("Failing", (kind,), {"score": fails, "at": Method.at}))
    failing.__dict__.update(vars(subject.method))
    with contextlib.suppress(RuntimeError), replace(subject, method=failing).attached(model):
        model(**batch)
        must(False, "an exception of the method was swallowed")
    must(picture(model) == before, "after an exception the model is not what it was")
    must(torch.equal(model(**batch).logits, want), "the model computes something else than before")
