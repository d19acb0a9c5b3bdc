"""Generation with shortened caches: every way of it gives what one forward over everything would give.

Cached decoding equals a full recompute exactly when the query is pinned to the end of the prompt; the oracle takes that
position explicitly, and labels pin it in the engine itself (teacher forcing). So three programs must agree.

    pytest tests/engine/test_generation.py -k beams
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pdrop import FastV, PyramidDrop, attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, build
from pdrop.conformance.prompts import collate, sample, single
from tests.support.cases import (
    BOUNDARIES,
    FLOAT,
    GREEDY,
    HALVES,
    RAGGED,
    STEPS,
    TOLERANCE,
    batch_of,
    kept_of,
    methods,
    prolong,
    rule_of,
)


def teacher_forced(model: Any, batch: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """Logits [batch, steps, vocabulary] of the generated tokens from one forward, the answer given as labels."""
    length, ids = batch["input_ids"].shape[1], sequences[:, :-1]
    labels = ids.clone()
    labels[:, :length] = -100
    return model(**prolong(batch, ids), labels=labels).logits[:, length - 1 :]


@pytest.mark.product(4)
@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CORE)
def test_cached_decoding_equals_recomputing_everything(family: str, backend: str) -> None:
    model, reference = build(family, backend, FLOAT[backend]), build(family)
    batch, truth_batch = batch_of(family, model, RAGGED), batch_of(family, reference, RAGGED)
    rows, length = batch["input_ids"].shape
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            out = model.generate(**batch, **GREEDY)
        rule = rule_of(method)
        kept = kept_of(trace)
        everything = prolong(truth_batch, out.sequences[:, :-1])
        pinned = [[length - 1]] * rows
        truth = oracle.forward(
            reference, everything, rule, BOUNDARIES, method.positions, queries=pinned, kept=None if rule else kept
        )
        assert kept == truth.kept
        for step, logits in enumerate(out.logits):
            want = truth.logits[:, length - 1 + step]
            torch.testing.assert_close(logits.double(), want.double(), rtol=0, atol=TOLERANCE[backend])
        generated = out.sequences.shape[1] - 1 - length
        assert trace.prefills == 1
        assert trace.tokens == [[tokens - generated for tokens in layer] for layer in truth.tokens]
        cached = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        # before the first boundary the padding is cached as in any model; after it the longest row counts
        first = HALVES.layers[0]
        assert cached == [length + generated] * first + [max(layer) + generated for layer in trace.tokens[first:]]


@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_cached_decoding_equals_teacher_forcing(family: str) -> None:
    model = build(family)
    batch = batch_of(family, model, RAGGED)
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            out = model.generate(**batch, **GREEDY)
            kept = kept_of(trace)
            forced = teacher_forced(model, batch, out.sequences)
        assert kept_of(trace) == kept
        torch.testing.assert_close(torch.stack(out.logits, 1).double(), forced.double(), rtol=0, atol=5e-5)


@pytest.mark.product(4)
@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("how", ["beams", "sampling"])
def test_beams_and_samples_equal_teacher_forcing(family: str, how: str) -> None:
    model = build(family)
    samples = [sample(family, model, (3, 5), 0), sample(family, model, (2, 4, 6), 1)]
    options: dict[str, Any] = GREEDY | dict(num_return_sequences=2)
    if how == "beams":
        options |= dict(num_beams=3, length_penalty=0.0, output_scores=True)
    else:
        options |= dict(do_sample=True)
    repeated = collate(family, [one for one in samples for _ in range(2)])
    length = repeated["input_ids"].shape[1]
    for method in methods(family):
        torch.manual_seed(0)
        with attach(model, method, HALVES):
            out = model.generate(**collate(family, samples), **options)
            forced = teacher_forced(model, repeated, out.sequences)
        assert len(out.sequences) == 4
        assert out.sequences[0].tolist() != out.sequences[1].tolist()
        if how == "sampling":
            torch.testing.assert_close(torch.stack(out.logits, 1).double(), forced.double(), rtol=0, atol=5e-5)
        else:
            likely = forced.log_softmax(-1).gather(2, out.sequences[:, length:, None])[..., 0].sum(1)
            torch.testing.assert_close(likely.float(), out.sequences_scores.float(), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_a_static_cache_gives_the_same_tokens(family: str) -> None:
    model = build(family)
    batch = batch_of(family, model, RAGGED)
    for method in methods(family):
        with attach(model, method, HALVES):
            dynamic = model.generate(**batch, **GREEDY).sequences
            static = model.generate(**batch, **GREEDY, cache_implementation="static", disable_compile=True).sequences
        assert torch.equal(dynamic, static)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_prompt_lookup_gives_the_same_tokens(family: str) -> None:
    """The prompt comes with guesses after it; those refused are cropped off caches of different lengths per layer."""
    model = build(family)
    batch = single(family, sample(family, model, (3, 8)))
    ids = batch["input_ids"]
    ids[0, -4:] = ids[0, -8:-4]  # a repetition at the end of the prompt: there is something to look up
    options = dict(max_new_tokens=8, do_sample=False, suppress_tokens=GREEDY["suppress_tokens"])
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            greedy = model.generate(**batch, **options)
            kept = kept_of(trace)
            looked_up = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
            assert kept_of(trace) == kept
            assert trace.tokens[0][0] > ids.shape[1], "the first forward brought no guess: nothing was tested"
            assert torch.equal(greedy, looked_up)


@torch.no_grad()
@pytest.mark.parametrize("method", [PyramidDrop(), FastV(several=True)], ids=["pyramiddrop", "fastv"])
def test_without_a_cache_every_step_ranks_by_its_newest_token(method: Any) -> None:
    """`use_cache=False` is another procedure, by definition; it is documented and must stay what it is."""
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    with attach(model, method, HALVES) as trace:
        got = model.generate(**batch, **GREEDY, use_cache=False)
        assert trace.prefills == STEPS
        ids = batch["input_ids"]
        for step in range(STEPS):
            inputs = prolong(batch, ids)
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = model(**inputs, use_cache=False).logits[:, -1]
            torch.testing.assert_close(got.logits[step].double(), logits.double(), rtol=0, atol=5e-5)
            ids = got.sequences[:, : ids.shape[1] + 1]
