"""Where causality hides everything that must be hidden no mask is made, and the fast kernels stay in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop import FastV, SparseVLM, attach
from pdrop.conformance.families import fresh
from tests.support.cases import HALVES, RAGGED, batch_of, methods


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_after_the_first_drop_a_padded_prefill_has_no_mask(family: str, side: str) -> None:
    """Rows are filled up after their tokens, so nothing is there to be hidden; in decoding fillers lie in between."""
    model = fresh(family, "sdpa", torch.float32).eval()
    batch = batch_of(family, model, RAGGED, side)
    real = batch["attention_mask"].bool()
    plain = [SparseVLM(positions="original")]
    for method in [*methods(family), *plain]:
        with attach(model, method, HALVES):
            masks: list[Any] = []
            hooks = [
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, seen=masks: seen.append(kwargs["attention_mask"]), with_kwargs=True
                )
                for layer in model.get_decoder().layers
            ]
            got = model(**batch, use_cache=True)
            assert [mask is None for mask in masks] == [False] * 2 + [True] * 4
            model.get_decoder().config._attn_implementation = "eager"  # which always needs one
            want = model(**batch, use_cache=True)
            assert all(mask is not None for mask in masks[6:])
            model.get_decoder().config._attn_implementation = "sdpa"
            torch.testing.assert_close(got.logits[real], want.logits[real], rtol=0, atol=5e-5)
            masks.clear()
            model.generate(**batch, max_new_tokens=2, do_sample=False, suppress_tokens=[2])
            assert len(masks) == 12 and all(mask is not None for mask in masks[6:]), "a decoding step has its masks"
            for hook in hooks:
                hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_has_the_triangle_in_a_prefill_and_the_fillers_in_a_step(dtype: torch.dtype) -> None:
    """It cannot do without a mask, for nothing else makes it causal; fillers after the tokens are in none."""
    model = fresh("llava", "eager", dtype).eval()
    batch = batch_of("llava", model, RAGGED)
    masks: list[Any] = []
    with attach(model, FastV(several=True), HALVES) as trace:
        for layer in model.get_decoder().layers:
            layer.register_forward_pre_hook(lambda *given: masks.append(given[2]["attention_mask"]), with_kwargs=True)
        model.generate(**batch, max_new_tokens=2, do_sample=False, suppress_tokens=[2])
        lengths = trace.tokens
    lowest = torch.finfo(dtype).min
    for layer in (2, 4):
        prefill, step, width = masks[layer], masks[6 + layer], max(lengths[layer])
        assert prefill.dtype == step.dtype == dtype
        assert torch.equal(prefill[:, 0] == 0, torch.ones(width, width).tril().bool().expand(len(prefill), -1, -1))
        keys = torch.arange(width + 1)
        tokens = [(keys < own) | (keys == width) for own in lengths[layer]]
        assert torch.equal(step[:, 0, 0] == 0, torch.stack(tokens)) and set(step.unique().tolist()) == {0.0, lowest}


@torch.no_grad()
def test_a_later_turn_and_a_static_cache_keep_their_masks() -> None:
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED)
    greedy: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[2])
    with attach(model, FastV(several=True), HALVES):
        want = model.generate(**batch, **greedy)
        static = model.generate(**batch, **greedy, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, want)
        turn = torch.cat([batch["attention_mask"], torch.ones(len(want), 3, dtype=torch.long)], 1)
        ids, logits = torch.full((len(want), 3), 5), []
        for backend in ("sdpa", "eager"):
            model.get_decoder().config._attn_implementation = backend
            cache = model(**batch, use_cache=True).past_key_values
            logits.append(model(input_ids=ids, attention_mask=turn, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=5e-5)
