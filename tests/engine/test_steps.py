"""What a decoding step does not do: call layer hooks that have nothing to do, make what was made before."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch

from pdrop import FastV, PyramidDrop, SparseVLM, attach
from pdrop.conformance.families import _llava, fresh
from pdrop.engine import angles, state
from tests.support.cases import GREEDY, HALVES, RAGGED, batch_of

GREEDILY: dict[str, Any] = dict(do_sample=False, suppress_tokens=[2])


def hooks_of(model: Any) -> int:
    """How many hooks lie on the decoder's layers."""
    layers = model.get_decoder().layers
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers)


def hooks_in_each_forward(model: Any, batch: Any, steps: int = 3) -> list[int]:
    """Of a prefill and of the steps after it."""
    seen: list[int] = []
    handle = model.get_decoder().norm.register_forward_pre_hook(lambda *_: seen.append(hooks_of(model)))
    model.generate(**batch, **GREEDILY, max_new_tokens=steps)
    handle.remove()
    return seen


@torch.no_grad()
def test_layers_have_no_hooks_in_plain_steps_and_have_them_again_in_the_next_prefill() -> None:
    model = fresh("llava", "sdpa", torch.float32).eval()
    one, ragged = batch_of("llava", model, RAGGED[:1]), batch_of("llava", model, RAGGED)
    want = {}
    for rows, batch in (("one", one), ("ragged", ragged)):
        with attach(model, FastV(several=True), HALVES):
            want[rows] = model.generate(**batch, **GREEDILY, max_new_tokens=4)
    with attach(model, FastV(several=True), HALVES):
        on = hooks_of(model)
        assert on == 5 + 2 + 1  # enter from layer 1 on, two that watch, one that leaves; Llava adds no features
        for _ in range(2):
            assert hooks_in_each_forward(model, one) == [on, 0, 0]
            assert hooks_in_each_forward(model, ragged) == [on, on, on]  # each step hands out masks
            assert torch.equal(model.generate(**one, **GREEDILY, max_new_tokens=4), want["one"])
            assert torch.equal(model.generate(**ragged, **GREEDILY, max_new_tokens=4), want["ragged"])
    assert hooks_of(model) == 0
    with attach(model, PyramidDrop(), HALVES):
        assert hooks_in_each_forward(model, one) == [4 + 1] * 3  # renumbered positions are handed out
    model = fresh("qwen3_vl", "sdpa", torch.float32).eval()
    with attach(model, FastV(several=True), HALVES):
        batch = batch_of("qwen3_vl", model, RAGGED[:1])
        assert hooks_in_each_forward(model, batch) == [8 + 6, 0, 0], "its features are added after every layer"


@torch.no_grad()
def test_hooks_of_others_keep_their_turn() -> None:
    """One that was registered after ours sees what ours hands on, in the second prefill too."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED[:1])
    entered: list[int] = []
    with attach(model, FastV(several=True), HALVES) as trace:
        layer = model.get_decoder().layers[2]
        handle = layer.register_forward_pre_hook(lambda module, args: entered.append(args[0].shape[1]))
        for _ in range(2):
            model.generate(**batch, **GREEDILY, max_new_tokens=3)
            assert entered == [trace.tokens[2][0], 1, 1]
            entered.clear()
        handle.remove()


@torch.no_grad()
def test_a_plain_step_leaves_another_threads_prefill_its_hooks() -> None:
    """The step comes while the other thread's prefill is in the middle of its layers."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED[:1])
    stepped, inside, got = threading.Event(), threading.Event(), []
    with attach(model, FastV(several=True), HALVES):
        want = model(**batch, logits_to_keep=1).logits
        cache = model(**batch).past_key_values

        def stop(*_: Any) -> None:
            if threading.current_thread() is other:
                inside.set()
                assert stepped.wait(60)

        def prefill() -> None:
            with torch.no_grad():
                got.append(model(**batch, logits_to_keep=1).logits)

        handle = model.get_decoder().layers[1].mlp.register_forward_hook(stop)
        other = threading.Thread(target=prefill)
        other.start()
        assert inside.wait(60)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        stepped.set()
        other.join()
        handle.remove()
        assert hooks_of(model)
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert not hooks_of(model)
    assert torch.equal(got[0], want)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [PyramidDrop(), FastV(several=True), SparseVLM()], ids=lambda method: type(method).__name__
)
def test_tables_grow_as_an_answer_does(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that outgrows what was noted beforehand is the same, on one cache, on its copy, and cropped."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch, mask = batch_of("llava", model, RAGGED), None

    def answers() -> list[Any]:
        nonlocal mask
        with attach(model, method, HALVES):
            cache = model(**batch, use_cache=True).past_key_values
            logits, mask = [], batch["attention_mask"]
            for _ in range(3):
                longer = torch.cat([mask, mask.new_ones(len(mask), 5)], 1)
                kept = copy.deepcopy(cache)
                for length in range(mask.shape[1] + 1, longer.shape[1] + 1):
                    ids = torch.full((len(mask), 1), length % 7 + 5)
                    step = model(input_ids=ids, attention_mask=longer[:, :length], past_key_values=cache)
                    logits.append(step.logits)
                cache, mask = (kept, mask) if len(logits) == 10 else (cache, longer)
            cache.crop(-4)
            mask = mask[:, :-3]
            logits.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
            return [torch.cat(logits, 1), *(layer.keys for layer in cache.layers)]

    want = answers()
    monkeypatch.setattr(state, "AHEAD", 1)
    monkeypatch.setattr(angles, "LEAST", 2)
    for got, expected in zip(answers(), want):
        assert torch.equal(got, expected)
    monkeypatch.setattr(angles, "BY_LENGTH", ("default",))  # all are made anew
    for got, expected in zip(answers(), want):
        assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["default", "llama3", "linear", "yarn", "dynamic"])
def test_a_table_is_what_the_decoder_makes(kind: str) -> None:
    """To the bit; angles that change with the length are made when they are asked for."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    decoder = _llava(rope_parameters=rope, max_position_embeddings=128).get_decoder()
    for dtype in (torch.float32, torch.bfloat16):
        hidden, made = torch.zeros(2, 3, 32, dtype=dtype), angles.Angles(decoder.rotary_emb)
        places = torch.tensor([[0, 5, 120], [7, 7, 99]])
        for got, want in zip(made.at(hidden, places, 121), decoder.rotary_emb(hidden, places)):
            assert torch.equal(got, want) and got.dtype == dtype
        for got, want in zip(made.between(hidden, 600, 607), decoder.rotary_emb(hidden, torch.arange(600, 607)[None])):
            assert torch.equal(got, want)
            assert got.shape == want.shape and got.stride() == want.stride()
        assert bool(made.tables) == (kind != "dynamic")


def test_what_inference_mode_made_serves_outside_it() -> None:
    """The table outlives the mode: training that follows may save its rows for the backward pass."""
    model = fresh("llava", "sdpa", torch.float32)
    batch = batch_of("llava", model, RAGGED[:1])
    with attach(model, PyramidDrop(), HALVES):
        with torch.inference_mode():
            model.generate(**batch, **GREEDY)
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100
        model.train()
        model(**batch, labels=labels, use_cache=False).loss.backward()
    assert model.get_decoder().layers[5].self_attn.k_proj.weight.grad.abs().sum() > 0
