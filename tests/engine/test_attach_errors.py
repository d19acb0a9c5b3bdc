"""Misuse is a clear error that says what to do, and leaves nothing behind.

pytest tests/engine/test_attach_errors.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach, single
from pdrop.conformance.families import CLIP, IMAGE, MROPE_FAMILIES, SIGLIP, TEXT, build, fresh
from tests.support.cases import HALVES, RAGGED, batch_of, methods, picture


def llava_of(kind: str, **more: Any) -> Any:
    """A LLaVA around a language model of another kind, random weights."""
    text = {"model_type": kind, **TEXT, **more}
    config = transformers.LlavaConfig(text_config=text, vision_config=CLIP, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def language_model() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def mllama() -> Any:
    text: dict[str, Any] = {
        **TEXT,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_global_layers=1, attention_heads=2
    )
    vision |= dict(image_size=28, patch_size=7, vision_output_dim=48, intermediate_layers_indices=[0])
    vision |= dict(max_num_tiles=1, supported_aspect_ratios=[[1, 1]])
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


def gemma3() -> Any:
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=SIGLIP, image_token_index=IMAGE, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        vision_config=dict(SIGLIP, projection_dim=32, vocab_size=200),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def on_meta() -> Any:
    with torch.device("meta"):
        return llava_of("llama")


def offloaded() -> Any:
    import accelerate

    return accelerate.cpu_offload(fresh("llava"))


def compiled() -> Any:
    return torch.compile(fresh("llava"), backend="eager")


def compiled_in_place() -> Any:
    model = fresh("llava")
    model.compile(backend="eager")
    return model


UNSUPPORTED = [
    pytest.param(language_model, "no vision-language model", id="text-only-model"),
    pytest.param(lambda: torch.nn.Linear(2, 2), "Linear", id="no-transformers-model"),
    pytest.param(lambda: build("llava").lm_head, "Linear", id="a-part-of-a-model"),
    pytest.param(mllama, "Mllama", id="cross-attention"),
    pytest.param(gemma3, "both directions", id="bidirectional-image-tokens"),
    pytest.param(paligemma, "both directions", id="prefix-attention"),
    pytest.param(lambda: llava_of("phi3"), "q_proj", id="fused-qkv"),
    pytest.param(lambda: llava_of("mistral", sliding_window=8), "sliding_attention", id="sliding-window"),
    pytest.param(lambda: llava_of("gpt_neox"), "not supported|no list of `layers`", id="other-decoder"),
    pytest.param(on_meta, "meta", id="meta-weights"),
    pytest.param(offloaded, "offloaded", id="offloaded-weights"),
    pytest.param(compiled, "compile each layer's forward", id="compiled-whole"),
    pytest.param(compiled_in_place, "compile each layer's forward", id="compiled-in-place"),
]


@pytest.mark.parametrize(("make", "words"), UNSUPPORTED)
def test_models_that_cannot_drop_are_refused_at_attach(make: Any, words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=words):
        attach(model, FastV(several=True), single(2, 0.5))
    assert not any(module._forward_pre_hooks for module in model.modules() if make is not offloaded)


@pytest.mark.parametrize("family", MROPE_FAMILIES)
@pytest.mark.parametrize("kind", [PyramidDrop, partial(FastV, several=True), RandomDrop])
def test_compact_positions_are_undefined_for_multimodal_rope(family: str, kind: Any) -> None:
    model = build(family)
    before = picture(model)
    with pytest.raises(ValueError, match="positions='original'"):
        attach(model, kind(positions="compact"), HALVES)
    assert picture(model) == before


FIT = [
    pytest.param(FastV(), HALVES, "FastV prunes once: give it one boundary", id="fastv-at-two"),
    pytest.param(FastV(several=True), single(6, 0.5), "numbered 0..5", id="layer-after-the-last"),
    pytest.param(
        FastV(several=True), Schedule((Stage(2, 0.5), Stage(40, 0.2))), "boundary at layer 40", id="layer-40-of-6"
    ),
    pytest.param(None, single(2, 0.5), "needs a method", id="no-method"),
]


@pytest.mark.parametrize(("method", "schedule", "words"), FIT)
def test_what_does_not_fit_is_refused_at_attach(method: Any, schedule: Schedule, words: str) -> None:
    model = build("llava")
    before = picture(model)
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        attach(model, method, schedule)
    assert picture(model) == before


def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="compact, original"):
        PyramidDrop(positions="packed")


@pytest.mark.parametrize("other", [FastV(several=True), None], ids=["dropping", "tracing"])
def test_two_attachments_are_refused(other: Any) -> None:
    model = fresh("llava")
    batch = batch_of("llava", model, RAGGED)
    with torch.no_grad():
        with attach(model, PyramidDrop(), HALVES):
            want, during = model(**batch).logits, picture(model)
            with pytest.raises(RuntimeError, match=r"PyramidDrop.*attached"), attach(model, other, Schedule()):
                raise AssertionError("the second one must not open")
            assert picture(model) == during
            assert torch.equal(model(**batch).logits, want)
        assert not torch.equal(model(**batch).logits, want)


def without_ids(model: Any, batch: dict[str, Any]) -> None:
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])


def packed_by_lengths(model: Any, batch: dict[str, Any]) -> None:
    ends = torch.tensor([0, 10, batch["input_ids"].shape[1]], dtype=torch.int32)
    model(**batch, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=20, max_length_k=20)


def packed_by_positions(model: Any, batch: dict[str, Any]) -> None:
    length = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(10), torch.arange(length - 10)])[None].expand(len(batch["input_ids"]), -1)
    model(**{key: value for key, value in batch.items() if key != "attention_mask"}, position_ids=positions)


def training_without_labels(model: Any, batch: dict[str, Any]) -> None:
    model.train()
    with torch.enable_grad():
        model(**batch)


def training_of_the_base_model(model: Any, batch: dict[str, Any]) -> None:
    model.train()
    with torch.enable_grad():
        model.model(**batch)


def training_around_the_hooks(model: Any, batch: dict[str, Any]) -> None:
    model.train()
    with torch.enable_grad():
        model.forward(**batch, labels=batch["input_ids"])


CALLS = [
    pytest.param(without_ids, "input_ids", id="inputs_embeds-only"),
    pytest.param(packed_by_lengths, "packed", id="packed-cu_seq_lens"),
    pytest.param(packed_by_positions, "packed", id="packed-position_ids"),
    pytest.param(training_without_labels, "labels", id="training-without-labels"),
    pytest.param(training_of_the_base_model, "labels", id="training-the-base-model"),
    pytest.param(training_around_the_hooks, "labels", id="training-through-forward"),
]


@torch.no_grad()
@pytest.mark.parametrize(("call", "words"), CALLS)
def test_calls_that_cannot_be_done_are_refused(call: Any, words: str) -> None:
    """And the next good call in the same block is as if nothing had been."""
    model = fresh("llava")
    batch = batch_of("llava", model, RAGGED)
    plain, before = model(**batch).logits, picture(model)
    for method in methods("llava"):
        with attach(model, method, HALVES):
            pruned = model(**batch).logits
            with pytest.raises(ValueError, match=words):
                call(model, batch)
            model.eval()
            assert torch.equal(model(**batch).logits, pruned)
        assert torch.equal(model(**batch).logits, plain)
    assert picture(model) == before


@torch.no_grad()
def test_a_cache_goes_on_under_its_own_schedule_only() -> None:
    model = fresh("llava")
    batch, cache = batch_of("llava", model, RAGGED[:1]), DynamicCache(config=model.config)
    with attach(model, FastV(several=True), HALVES):
        model(**batch, past_key_values=cache)
    with (
        attach(model, FastV(several=True), single(3, 0.5)),
        pytest.raises(ValueError, match=r"filled under the schedule 2:0\.5"),
    ):
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)


@torch.no_grad()
def test_the_base_model_drops_too() -> None:
    """A wrapper may call the model without head: the hidden states are those under the head."""
    model = fresh("llava")
    batch = batch_of("llava", model, RAGGED)
    with attach(model, PyramidDrop(), HALVES) as trace:
        logits = model(**batch).logits
        hidden = model.model(**batch).last_hidden_state
    assert trace.prefills == 2
    assert torch.equal(model.lm_head(hidden), logits)


def test_flex_attention_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh("llava", "flex_attention", torch.float32)
    attach(model, PyramidDrop(), HALVES)
    assert "flex_attention compiles for each length" in caplog.text
    caplog.clear()
    attach(model, None, Schedule())
    attach(fresh("llava", "sdpa", torch.float32), PyramidDrop(), HALVES)
    assert not caplog.text
