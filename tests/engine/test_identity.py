"""What the engine must not change: models that drop nothing, rows of a batch, and the model after the block.

pytest tests/engine/test_identity.py
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach
from pdrop.conformance.families import CORE, FAMILIES, LAYERS, build, fresh
from pdrop.conformance.prompts import collate, sample, single
from tests.support.cases import FLOAT, HALVES, ONE, RAGGED, batch_of, kept_of, methods, picture

EVERYTHING = Schedule((Stage(1, 1.0), Stage(3, 1.0)))


@pytest.mark.product(8)
@torch.no_grad()
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CORE)
def test_keeping_everything_is_bit_identical(family: str, backend: str, rows: Any) -> None:
    model = build(family, backend, FLOAT[backend])
    batch = batch_of(family, model, rows)
    generation = dict(max_new_tokens=4, do_sample=False)
    logits, tokens = model(**batch).logits, model.generate(**batch, **generation)
    for method, schedule in [(None, Schedule()), *((method, EVERYTHING) for method in methods(family))]:
        with attach(model, method, schedule) as trace:
            assert torch.equal(model(**batch).logits, logits)
            assert torch.equal(model.generate(**batch, **generation), tokens)
        assert trace.prefills == 2
        assert trace.tokens == [batch["attention_mask"].sum(1).tolist()] * LAYERS
        assert len(trace.kept) == len(trace.scores) == len(schedule)
        for kept, scores in zip(trace.kept, trace.scores):
            assert [row.tolist() for row in kept] == [list(range(visual)) for visual in trace.visual]
            assert [len(row) for row in scores] == trace.visual, "a boundary that keeps everything still ranks"


@pytest.mark.product(8)
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_its_batch_is_the_row_alone(family: str, side: str) -> None:
    model = build(family)
    samples = [sample(family, model, texts, seed) for seed, texts in enumerate(RAGGED)]
    batch = collate(family, samples, side)
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            together = model(**batch).logits
        kept, tokens, scores = trace.kept, trace.tokens, trace.scores
        for row, one in enumerate(samples):
            with attach(model, method, HALVES) as alone:
                logits = model(**single(family, one)).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], logits, rtol=0, atol=5e-5)
            for stage in range(len(HALVES)):
                assert alone.kept[stage][0].tolist() == kept[stage][row].tolist()
                torch.testing.assert_close(alone.scores[stage][0], scores[stage][row], rtol=0, atol=1e-5)
            assert [layer[0] for layer in alone.tokens] == [layer[row] for layer in tokens]


@pytest.mark.product(3)
@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_generation_of_a_batch_is_that_of_its_rows(family: str) -> None:
    model = build(family)
    samples = [sample(family, model, texts, seed) for seed, texts in enumerate(RAGGED)]
    for method in methods(family):
        with attach(model, method, HALVES):
            together = model.generate(**collate(family, samples), max_new_tokens=5, do_sample=False)[:, -5:]
            for row, one in enumerate(samples):
                alone = model.generate(**single(family, one), max_new_tokens=5, do_sample=False)[0, -5:]
                assert together[row].tolist() == alone.tolist()


@torch.no_grad()
def test_random_depends_on_the_seed_and_the_prompt_alone() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    kept = {}
    for name, method in {"0": RandomDrop(), "0 again": RandomDrop(seed=0), "1": RandomDrop(seed=1)}.items():
        with attach(model, method, HALVES) as trace:
            model(**batch)
        kept[name] = kept_of(trace)
    assert kept["0"] == kept["0 again"]
    assert kept["0"] != kept["1"]
    assert kept["0"][0][0] != kept["0"][0][3], "two prompts with equally many tokens lose different ones"


@torch.no_grad()
def test_scores_are_float32_and_decide_in_bfloat16() -> None:
    """Attention in bfloat16 ties near the cut; the ranking must not."""
    model = fresh("llava", dtype=torch.bfloat16)
    with attach(model, PyramidDrop(), HALVES) as trace:
        logits = model(**batch_of("llava", model, RAGGED)).logits
    assert logits.dtype == torch.bfloat16
    alive = [list(range(visual)) for visual in trace.visual]
    for kept, scores in zip(trace.kept, trace.scores):
        for row, (indices, values) in enumerate(zip(kept, scores)):
            assert values.dtype == torch.float32
            order = sorted(range(len(values)), key=lambda i: -float(values[i]))
            alive[row] = sorted(alive[row][i] for i in order[: len(indices)])
            assert alive[row] == indices.tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("how", ["plain", "error in the block", "error in a layer", "error in the model's arguments"])
def test_the_model_is_as_it_was(family: str, how: str) -> None:
    model = fresh(family)
    batch = batch_of(family, model, RAGGED)
    logits = model(**batch).logits
    before = picture(model)
    raised: Exception | None = None
    with contextlib.suppress(ArithmeticError), attach(model, FastV(several=True), HALVES) as trace:
        pruned = model(**batch).logits
        if how == "error in the block":
            raise ArithmeticError
        if how == "error in a layer":

            def fail(*args: Any) -> None:
                raise ArithmeticError

            handle = model.get_decoder().layers[3].mlp.register_forward_hook(fail)
            try:
                model(**batch)
            except ArithmeticError as error:
                raised = error
            finally:
                handle.remove()
        elif how == "error in the model's arguments":
            try:
                model(**batch, position_ids=torch.zeros(9, 9, 9, dtype=torch.long))
            except (RuntimeError, ValueError, IndexError) as error:
                raised = error
        # after a forward that failed, the next one in the same block is as if nothing had been
        assert torch.equal(model(**batch).logits, pruned)
        assert trace.tokens[0] == batch["attention_mask"].sum(1).tolist()
    assert (raised is not None) == (how == "error in a layer" or "arguments" in how)
    assert picture(model) == before
    assert torch.equal(model(**batch).logits, logits)
    assert not torch.equal(pruned, logits)


@torch.no_grad()
def test_attaching_again_after_the_block() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    with attach(model, PyramidDrop(), HALVES):
        first = model(**batch).logits
    with attach(model, FastV(several=True), HALVES):
        other = model(**batch).logits
    attachment = attach(model, PyramidDrop(), HALVES)
    for _ in range(2):  # the same attachment may be entered again
        with attachment:
            assert torch.equal(model(**batch).logits, first)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_nothing_is_left_on_outputs_of_text_only_prompts() -> None:
    for family in CORE:
        model = build(family)
        batch = batch_of(family, model, ((9,), (5,)))
        generation = dict(max_new_tokens=5, do_sample=False)
        logits, tokens = model(**batch).logits, model.generate(**batch, **generation)
        for method in methods(family):
            with attach(model, method, HALVES) as trace:
                assert torch.equal(model(**batch).logits, logits)
                assert torch.equal(model.generate(**batch, **generation), tokens)
            assert trace.visual == [0, 0]
            assert trace.tokens == [[10, 6]] * LAYERS
