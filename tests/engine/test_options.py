"""Ways to call a model that must keep working around the engine: positions of one's own, outputs, precision, tuples.

pytest tests/engine/test_options.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, LAYERS, build, fresh
from pdrop.conformance.prompts import collate, sample
from tests.support.cases import BOUNDARIES, GREEDY, HALVES, RAGGED, batch_of, kept_of, methods, rule_of


@torch.no_grad()
@pytest.mark.parametrize("method", methods("llava"), ids=lambda m: f"{type(m).__name__}-{m.positions}")
@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_of_ones_own(method: Any, side: str) -> None:
    """With gaps, and from the mask as `generate` makes them; "compact" numbers anew from its first boundary on."""
    model = build("llava")
    batch = batch_of("llava", model, RAGGED, side)
    batch["position_ids"] = 3 * (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 7
    with attach(model, method, HALVES) as trace:
        logits = model(**batch).logits
    rule = rule_of(method)
    kept = None if rule else kept_of(trace)
    truth = oracle.forward(model, batch, rule, BOUNDARIES, "original", kept=kept)
    if method.positions == "original":
        assert kept_of(trace) == truth.kept
        for row, alive in enumerate(truth.alive):
            torch.testing.assert_close(logits[row, alive], truth.logits[row, alive], rtol=0, atol=5e-5)
    else:
        assert kept_of(trace)[0] == truth.kept[0], "up to its first boundary, compact has the positions it was given"


@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_hidden_states_show_the_real_lengths(family: str) -> None:
    model = build(family)
    batch = batch_of(family, model, RAGGED)
    length = batch["input_ids"].shape[1]
    with attach(model, FastV(several=True), HALVES) as trace:
        want = model(**batch).logits
        out = model(**batch, output_hidden_states=True)
    assert torch.equal(out.logits, want)
    longest = [max(layer) for layer in trace.tokens]
    first = HALVES.layers[0]
    # what enters each layer: recorded before the hooks' work at a boundary, so one layer later there
    entered = [state.shape[1] for state in out.hidden_states[:LAYERS]]
    assert entered[:first] == [length] * first
    assert entered[first + 1 : 4] == longest[first + 1 : 4]
    assert entered[5] == longest[5]
    assert out.hidden_states[-1].shape[1] == length


@torch.no_grad()
def test_attentions_show_the_real_lengths() -> None:
    model = build("llava", "eager", torch.float32)
    batch = batch_of("llava", model, RAGGED)
    with attach(model, PyramidDrop(), HALVES) as trace:
        want = model(**batch).logits
        out = model(**batch, output_attentions=True)
    assert torch.equal(out.logits, want)
    keys = [weights.shape[-1] for weights in out.attentions]
    assert keys[2:] == [max(layer) for layer in trace.tokens][2:]


@torch.no_grad()
def test_logits_to_keep_and_tuples() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    with attach(model, PyramidDrop(), HALVES):
        full = model(**batch).logits
        assert torch.equal(model(**batch, logits_to_keep=1).logits, full[:, -1:])
        places = torch.tensor([0, full.shape[1] - 1])
        assert torch.equal(model(**batch, logits_to_keep=places).logits, full[:, places])
        assert torch.equal(model(**batch, return_dict=False)[0], full)
        ids, rest = batch["input_ids"], {key: value for key, value in batch.items() if key != "input_ids"}
        assert torch.equal(model(ids, **rest).logits, full), "arguments by position"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_half_precision_under_inference_mode(dtype: torch.dtype, backend: str) -> None:
    """No NaN, the counts hold, and the kept tokens are mostly float64's: scores are computed in float32."""
    model, reference = fresh("llava", backend, dtype), build("llava")
    batch = batch_of("llava", model, RAGGED)
    with torch.inference_mode():
        with attach(model, PyramidDrop(), HALVES) as trace:
            out = model.generate(**batch, **GREEDY)
            assert all(logits.isfinite().all() for logits in out.logits)
        with attach(reference, PyramidDrop(), HALVES) as truth:
            reference(**batch_of("llava", reference, RAGGED))
    assert trace.tokens == truth.tokens
    for kept, want in zip(trace.kept[0], truth.kept[0]):
        common = len(set(kept.tolist()) & set(want.tolist()))
        assert common >= 0.8 * len(want)


@torch.no_grad()
def test_autocast() -> None:
    model = build("llava", dtype=torch.float32)
    batch = batch_of("llava", model, RAGGED)
    with attach(model, PyramidDrop(), HALVES) as trace, torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).logits.isfinite().all()
    assert all(row.dtype == torch.float32 for stage in trace.scores for row in stage)


@torch.no_grad()
def test_named_samples_draw_apart_and_the_same_in_any_batch() -> None:
    model = build("llava")
    one = sample("llava", model, (3, 5), seed=1)
    pair, alone = collate("llava", [one, one]), collate("llava", [one])
    with attach(model, RandomDrop(seed=3), Schedule((Stage(2, 0.25),))) as trace:
        trace.samples = ["first picture", "second picture"]
        model(**pair)
        first, second = trace.kept[0]
        trace.samples = ["second picture"]
        model(**alone)
        assert torch.equal(trace.kept[0][0], second) and not torch.equal(first, second)
        trace.samples = ["a", "b", "c"]
        with pytest.raises(ValueError, match=r"trace\.samples names 3 prompts, but the batch has 2"):
            model(**pair)
