"""What is a prompt with pictures, and what only looks like one: ids without pixels, drafts, guidance, chunks.

pytest tests/engine/test_prefills.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pdrop import FastV, PyramidDrop, RandomDrop, attach
from pdrop.conformance.families import FAMILIES, IMAGE, VIDEO, build, fresh
from pdrop.conformance.prompts import collate, sample
from tests.support.cases import HALVES, batch_of, kept_of

VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava")
WORDS = [1, 10, 11, IMAGE, 12, 13, IMAGE, 14, 15]


def text_with(ids: list[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def report(trace: Any) -> tuple[Any, ...]:
    return trace.prefills, trace.visual, trace.tokens, trace.visual_tokens, kept_of(trace)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ids_without_pixels_are_text(family: str) -> None:
    """Quoted in a prompt without pictures, or in a draft after one with pictures: they stay, and the trace too."""
    model = build(family)
    quoted = WORDS if family not in VIDEOS else [VIDEO if word == IMAGE else word for word in WORDS]
    text, batch = text_with(quoted), batch_of(family, model, ((3, 5),))
    want = model(**text).logits
    for method in (PyramidDrop(positions="original"), RandomDrop(positions="original")):
        with attach(model, method, HALVES) as trace:
            assert torch.equal(model(**text).logits, want)
            assert trace.visual == [0] and trace.tokens == [[len(WORDS)]] * 6
            cache: Any = DynamicCache(config=model.config)
            model(**batch, past_key_values=cache)
            before, keys = report(trace), [layer.keys.shape[2] for layer in cache.layers]
            model(input_ids=text["input_ids"], past_key_values=cache)
        assert before[0] == 2 and before[1] != [0]
        assert report(trace) == before, "a draft is not a prefill"
        assert [layer.keys.shape[2] for layer in cache.layers] == [n + len(WORDS) for n in keys], "a draft lost tokens"


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEOS)
def test_image_ids_do_not_come_with_a_video(family: str) -> None:
    model = build(family)
    one = sample(family, model, (3, 5), video=True)
    stray = torch.cat([one["input_ids"], torch.tensor([IMAGE, 20])])
    with attach(model, PyramidDrop(positions="original"), HALVES) as trace:
        model(**collate(family, [one]))
        visual = trace.visual
        longer = dict(one, input_ids=stray)
        if "mm_token_type_ids" in one:
            longer["mm_token_type_ids"] = torch.cat([one["mm_token_type_ids"], torch.zeros(2, dtype=torch.int)])
        model(**collate(family, [longer]))
    assert visual == [int((one["input_ids"] == VIDEO).sum())] == trace.visual


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_drafts_that_copy_image_ids_decode_as_greedy_does(family: str) -> None:
    """Prompt lookup copies what follows an earlier occurrence: here the image, once the answer says its neighbour."""
    model = fresh(family)
    batch = batch_of(family, model, ((3, 5),))
    before = int((batch["input_ids"][0] == IMAGE).nonzero()[0]) - 1
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
    # the answer repeats the token before the image, so that the draft is the image
    options["sequence_bias"] = [[[int(batch["input_ids"][0, before])], 6.0]]
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int((kwargs["input_ids"] == IMAGE).sum())), with_kwargs=True
    )
    for method in (PyramidDrop(positions="original"), FastV(several=True, positions="original")):
        with attach(model, method, HALVES) as trace:
            greedy = model.generate(**batch, **options)
            want = report(trace)
            seen.clear()
            guessed = model.generate(**batch, **options, prompt_lookup_num_tokens=4)
        assert any(seen[1:]), "no draft held an image id: this shows nothing"
        assert torch.equal(guessed, greedy)
        assert report(trace) == (2, *want[1:])


@torch.no_grad()
def test_a_stray_id_beside_a_picture_is_the_models_own_error() -> None:
    """The model counts ids against features. A forward that fails is not a prefill and does nothing to the next."""
    for family in ("llava", "idefics3", "qwen2_5_vl"):
        model = build(family)
        good = batch_of(family, model, ((3, 5), (7,)))
        bad = dict(good, input_ids=good["input_ids"].clone())
        bad["input_ids"][1, -2] = IMAGE
        with attach(model, PyramidDrop(positions="original"), HALVES) as trace:
            want = model(**good).logits
            before = report(trace)
            with pytest.raises(ValueError, match="do not match"):
                model(**bad)
            assert report(trace) == before
            assert torch.equal(model(**good).logits, want)


@torch.no_grad()
def test_features_make_ids_visual() -> None:
    model = build("llava")
    batch = batch_of("llava", model, ((3, 5),))
    made = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    made = BaseModelOutputWithPooling(pooler_output=made.pooler_output)
    with attach(model, FastV(several=True), HALVES) as trace:
        want = model(**batch).logits
        encoded = {key: value for key, value in batch.items() if key != "pixel_values"}
        assert torch.equal(model(**encoded, mm_encoder_outputs={"image": made}).logits, want)
    assert trace.visual == [16]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", [None, [[1, 20, 21, 22]]], ids=["default", "negative-prompt"])
def test_guidance_leaves_the_trace_with_the_prompt_that_was_asked(negative: Any, use_cache: bool) -> None:
    model = build("llava")
    batch = batch_of("llava", model, ((3, 5),))
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, guidance_scale=2.0)
    if negative is not None:
        options["negative_prompt_ids"] = torch.tensor(negative)
    with attach(model, PyramidDrop(), HALVES) as trace:
        model(**batch)
        want = report(trace)
        model.generate(**batch, **options, use_cache=use_cache)
    prompts = 1 if use_cache else 3  # without a cache each step is a prompt of its own
    assert trace.prefills == 1 + prompts
    assert trace.visual == want[1] and trace.visual_tokens == want[3]
    if use_cache:
        assert report(trace)[1:] == want[1:]


@torch.no_grad()
def test_chunks_of_a_prompt_are_refused() -> None:
    """The image's chunk is there before the question is: it would be ranked by whatever token comes last in it."""
    model = build("llava")
    batch = batch_of("llava", model, ((3, 5),))
    options: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    with attach(model, PyramidDrop(), HALVES) as trace:
        want = model.generate(**batch, **options)
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**batch, **options, prefill_chunk_size=8)
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=64), want), "one chunk is the prompt"
    assert trace.visual == [16]


@torch.no_grad()
def test_a_forward_that_was_interrupted_is_forgotten() -> None:
    """Ctrl-C passes the hooks that run after an exception by: the next forward must not be taken for a part of it."""
    model = fresh("llava")
    batch, stop = batch_of("llava", model, ((3, 5),)), [True]

    def interrupt(*_: Any) -> None:
        if stop[0]:
            raise KeyboardInterrupt

    model.get_decoder().layers[3].register_forward_pre_hook(interrupt)
    with attach(model, PyramidDrop(), HALVES) as trace:
        for call in (model, model.model):
            stop[0] = False
            want = call(**batch)[0]
            stop[0] = True
            with pytest.raises(KeyboardInterrupt):
                call(**batch)
            stop[0] = False
            assert torch.equal(call(**batch)[0], want)
    assert trace.prefills == 4
