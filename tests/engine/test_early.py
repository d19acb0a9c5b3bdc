"""Boundary 0: tokens that go before the decoder. Layer 0 then holds fewer keys than the prompt has tokens.

pytest tests/engine/test_early.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pdrop import FastV, NoImage, Pool, PyramidDrop, RandomDrop, Schedule, SparseVLM, Stage, Uniform, attach
from pdrop import single as at
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, FAMILIES, IMAGE, LAYERS, MROPE_FAMILIES, VIDEO, build, fresh
from pdrop.conformance.prompts import collate, sample, single
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.methods.layout import TokenGrid
from pdrop.shapes import ModelSizes, PromptSize
from tests.engine.test_turns import text_turn
from tests.support.cases import FLOAT, GREEDY, ONE, RAGGED, STEPS, TOLERANCE, batch_of, kept_of, prolong, rule_of

EARLY = Schedule((Stage(0, 0.5), Stage(3, 0.25)))
BOUNDARIES = {0: 0.5, 3: 0.25}


def policies(family: str) -> list[str]:
    return ["original"] if family in MROPE_FAMILIES else ["original", "compact"]


def early_methods(family: str) -> list[Any]:
    return [kind(positions=p) for kind in (PyramidDrop, RandomDrop) for p in policies(family)]


@torch.no_grad()
@pytest.mark.parametrize(("backend", "side"), [("sdpa", "left"), ("eager", "right")])
@pytest.mark.parametrize("family", CORE)
def test_a_forward_equals_the_oracle(family: str, backend: str, side: str) -> None:
    model, reference = build(family, backend, FLOAT[backend]), build(family)
    batch = batch_of(family, model, RAGGED, side)
    for method in early_methods(family):
        with attach(model, method, EARLY) as trace:
            got = model(**batch).logits
        rule = rule_of(method)
        kept = None if rule else kept_of(trace)
        truth = oracle.forward(
            reference, batch_of(family, reference, RAGGED, side), rule, BOUNDARIES, method.positions, kept=kept
        )
        assert kept_of(trace) == truth.kept and trace.tokens == truth.tokens and trace.visual == truth.visual
        assert max(trace.tokens[0]) < batch["input_ids"].shape[1]
        for row, alive in enumerate(truth.alive):
            torch.testing.assert_close(
                got[row, alive].double(), truth.logits[row, alive], rtol=0, atol=TOLERANCE[backend]
            )


@pytest.mark.product(4)
@torch.no_grad()
@pytest.mark.parametrize("rows", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", CORE)
def test_decoding_and_a_second_turn_equal_the_oracle(family: str, rows: Any) -> None:
    model = build(family)
    batch = batch_of(family, model, rows)
    length = batch["input_ids"].shape[1]
    for method in early_methods(family):
        with attach(model, method, EARLY) as trace:
            first = model.generate(**batch, **GREEDY)
            kept, tokens = kept_of(trace), trace.tokens
            again, ids = text_turn(batch, first)
            second = model.generate(**again, **GREEDY, past_key_values=copy.deepcopy(first.past_key_values))
        cache = first.past_key_values
        assert cache.get_seq_length() == length + STEPS - 1, "the cache tells the prompt's length, not its keys'"
        assert [layer.keys.shape[2] for layer in cache.layers] == [max(layer) + STEPS - 1 for layer in tokens]
        for out, start in ((first, length), (second, ids.shape[1])):
            everything = prolong(batch, out.sequences[:, :-1])
            pinned = [[length - 1]] * len(rows)
            truth = oracle.forward(model, everything, None, BOUNDARIES, method.positions, queries=pinned, kept=kept)
            for step, logits in enumerate(out.logits):
                want = truth.logits[:, start - 1 + step]
                torch.testing.assert_close(logits.double(), want, rtol=0, atol=TOLERANCE["sdpa"])


@torch.no_grad()
@pytest.mark.parametrize("method", [RandomDrop(), RandomDrop(positions="compact"), Pool(), NoImage()])
def test_beams_guesses_and_sampling(method: Any) -> None:
    """The ways to generate that reorder, repeat and crop a cache, against greedy decoding of the same."""
    model = build("llava")
    batch, schedule = batch_of("llava", model, ONE), at(layer=0, keep=0.25 if not isinstance(method, NoImage) else 0.0)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": GREEDY["suppress_tokens"]}
    with attach(model, method, schedule):
        greedy = model.generate(**batch, **options)
        guessed = model.generate(**batch, **options, prompt_lookup_num_tokens=2)
        one_beam = model.generate(**batch, **options, num_beams=3, num_return_sequences=3)
        both = model.generate(**batch_of("llava", model, (*ONE, (2, 4, 6))), **options)
    assert torch.equal(guessed, greedy)
    length = greedy.shape[1] - 6
    assert torch.equal(both[0, -6:], greedy[0, -6:])
    scores = []
    with attach(model, method, schedule):
        for sequence in [*one_beam, greedy[0]]:
            labels = torch.full_like(sequence, -100)[None]
            labels[0, length:] = sequence[length:]
            whole = prolong(batch, sequence[None])
            logits = model(**whole, labels=labels).logits[0, length - 1 : -1]
            logits[:, GREEDY["suppress_tokens"]] = -torch.inf
            scores.append(logits.log_softmax(-1).gather(1, sequence[length:, None]).sum().item())
    assert scores[:3] == sorted(scores[:3], reverse=True) and scores[0] >= scores[3] - 1e-9


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_no_image_is_the_prompt_without_its_image_tokens(family: str) -> None:
    model = build(family)
    batch = batch_of(family, model, RAGGED)
    with attach(model, NoImage(), at(layer=0, keep=0.0)) as trace:
        got = model(**batch).logits
        decoded = model.generate(**batch, **GREEDY)
    assert trace.visual_tokens == [[0] * len(RAGGED)] * LAYERS and max(trace.visual) > 0
    for row, ids in enumerate(batch["input_ids"]):
        text = batch["attention_mask"][row].bool() & (ids != IMAGE)
        want = model(input_ids=ids[text][None]).logits[0]
        torch.testing.assert_close(got[row, text], want, rtol=0, atol=5e-5)
        answer = model.generate(input_ids=ids[text][None], **GREEDY)
        assert torch.equal(decoded.sequences[row, -STEPS:], answer.sequences[0, -STEPS:])


def pooled_by_hand(block: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Average pooling of [h, w, D] in plain loops."""
    h, w, _ = block.shape
    rows = [(i * h // height, -(-(i + 1) * h // height)) for i in range(height)]
    columns = [(i * w // width, -(-(i + 1) * w // width)) for i in range(width)]
    return torch.stack([block[a:b, c:d].mean((0, 1)) for a, b in rows for c, d in columns])


@torch.no_grad()
@pytest.mark.parametrize(("keep", "side"), [(0.25, 2), (0.5, 3), (0.05, 1)])
def test_pooling_is_what_the_decoder_makes_of_pooled_embeddings(keep: float, side: int) -> None:
    """Two images, each pooled for itself; the rest of the model run by hand, unattached, on the shorter sequence."""
    model = build("llava")
    batch = single("llava", sample("llava", model, (3, 2, 5)))
    with attach(model, Pool(), at(layer=0, keep=keep)) as trace:
        got = model(**batch).logits[0]
    embedded = oracle.decoder_inputs(model, batch)["inputs_embeds"][0]
    visual = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    parts, end = [], 0
    for image in visual.split(16):
        parts += [embedded[end : image[0]], pooled_by_hand(embedded[image].view(4, 4, -1), side, side)]
        end = int(image[-1]) + 1
    short = torch.cat([*parts, embedded[end:]])
    hidden = model.get_decoder()(inputs_embeds=short[None]).last_hidden_state
    want = model.lm_head(hidden)[0]
    alive = got.abs().sum(-1) > 0
    torch.testing.assert_close(got[alive], want, rtol=0, atol=1e-6)
    assert trace.visual_tokens == [[2 * side * side]] * LAYERS
    made = trace.merged[0][0]
    assert len(made) == 2 * side * side and all(token.centre == max(token.sources) for token in made)
    for token in made:
        assert sum(token.sources.values()) == pytest.approx(1)


@torch.no_grad()
def test_uniform_takes_the_middle_of_each_block_of_every_image() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    with attach(model, Uniform(), at(layer=0, keep=0.25)) as trace:
        model(**batch)
    one = [5, 7, 13, 15]  # rows and columns 1 and 3 of 4 x 4
    assert kept_of(trace)[0] == [one, one + [16 + j for j in one], [], one]


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.11, 0.6])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_grids_of_every_family(family: str, keep: float) -> None:
    """Grids cover every visual token once; pooled and picked grids have equally many tokens, each image its share."""
    model = build(family)
    videos = family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava")
    samples = [sample(family, model, texts, n, video=videos and n == 1) for n, texts in enumerate(RAGGED)]
    batch = collate(family, samples)
    seen: list[list[list[TokenGrid]]] = []
    counts = []
    for kind in (Uniform, Pool):

        class Watched(kind):  # type: ignore[misc, valid-type]
            def plan(self, view: Any, visual: Any) -> Any:
                seen.append(view.images)
                return super().plan(view, visual)

        with attach(model, Watched(positions="original"), at(layer=0, keep=keep)) as trace:
            logits = model(**batch).logits[:, -1]
            counts.append(trace.visual_tokens[0])
            options = GREEDY | {"max_new_tokens": 2}  # runs the tower by itself, and hands over features alone
            decoded = model.generate(**batch, **options)
        assert trace.visual_tokens[0] == counts[-1]
        torch.testing.assert_close(decoded.logits[0].double(), logits.double(), rtol=0, atol=5e-5)
    for visual, grids in zip(trace.visual, seen[0]):
        assert sorted(token for grid in grids for token in grid.tokens()) == list(range(visual))
    assert seen[0] == seen[1] == seen[2] == seen[3] and counts[0] == counts[1]
    assert counts[0] == [
        sum(a * b for a, b in (grid.reduced(keep) for grid in grids)) if keep < 1 else n
        for grids, n in zip(seen[0], trace.visual)
    ]
    if "qwen" in family:
        assert (batch["input_ids"] == VIDEO).any() and len(seen[0][1]) == 3, "an image and two frames"


@torch.no_grad()
def test_nothing_dropped_is_bit_identical() -> None:
    for family in ("llava", "qwen3_vl"):
        model = build(family)
        batch = batch_of(family, model, RAGGED)
        want = model(**batch).logits
        for method in (Pool, Uniform, PyramidDrop, RandomDrop):
            with attach(model, method(positions="original"), at(layer=0, keep=1.0)) as trace:
                assert torch.equal(model(**batch).logits, want)
            assert kept_of(trace)[0] == [list(range(n)) for n in trace.visual]


def test_gradients_and_labels() -> None:
    """Pooled tokens pass gradients on; with labels, and with checkpointing, losses are those of a plain forward."""
    losses = []
    for checkpointing in (False, True):
        model = fresh("llava").train()
        batch = batch_of("llava", model, ((3, 5), (2, 4, 6)), "right")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        labels = oracle.answers_only(batch, [[(-2, 0)], [(-2, 0)]])
        with attach(model, Pool(), at(layer=0, keep=0.25)):
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
        losses.append(loss.item())
        gradient = model.model.multi_modal_projector.linear_1.weight.grad
        assert gradient is not None and gradient.abs().sum() > 0
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("method", [PyramidDrop(), RandomDrop(), Pool(), Uniform(), NoImage()])
def test_the_closed_form_is_what_torch_counts(method: Any) -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs, keep = single("llava", sample("llava", model, (3, 5))), 0.0 if isinstance(method, NoImage) else 0.25
    schedule = at(layer=0, keep=keep)
    with attach(model, method, schedule) as trace:
        counted = counted_prefill_flops(model, inputs)
    layers = method.tokens_per_layer(schedule, 16, LAYERS)
    assert [[n] for n in layers] == trace.visual_tokens
    sizes, prompt = ModelSizes.from_config(model.config), PromptSize(9, 16, tuple(layers), images=1)
    assert prompt == PromptSize(9, 16, images=1).under(method, schedule, LAYERS)
    flops = prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", [Pool(), Uniform()])
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_of_several_images_each_has_its_share(method: Any, keep: float) -> None:
    """A budget counts two squares, not one picture of twice the tokens."""
    model = build("llava")
    schedule, prompt = at(layer=0, keep=keep), PromptSize(10, 32, images=2)
    with attach(model, method, schedule) as trace:
        model(**single("llava", sample("llava", model, (3, 5, 2))))
    assert [[n] for n in prompt.under(method, schedule, LAYERS).visual_per_layer] == trace.visual_tokens
    assert PromptSize(9, 12, images=[(1, 4, 6), (2, 6, 2)]).grids == [(2, 3), (3, 1), (3, 1)]
    assert PromptSize(9, 577, images=1).grids == PromptSize(9, 7, images=[(1, 4, 6)]).grids == []


@torch.no_grad()
def test_refusals() -> None:
    model = build("llava")
    for method in (FastV(several=True), SparseVLM()):
        with pytest.raises(ValueError, match="boundary 0 has none"):
            attach(model, method, at(layer=0, keep=0.5))
    with pytest.raises(ValueError, match="one boundary"):
        attach(model, Pool(), EARLY)
    with pytest.raises(ValueError, match="does not find its own numbers"):
        attach(model, PyramidDrop(), Schedule((Stage(2, adaptive=True),)))
    batch = batch_of("llava", model, ONE)
    cache: Any = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ValueError, match="DynamicCache"), attach(model, RandomDrop(), EARLY):
        model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="text after the image"), attach(model, Pool(), at(layer=0, keep=0.5)):
        model(**batch_of("llava", model, ((3, 0),)))


@torch.no_grad()
def test_a_lazy_cache_and_a_text_turn_before_the_image() -> None:
    model = build("llava")
    text, image = batch_of("llava", model, ((9,),)), batch_of("llava", model, ((4, 6),))
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with attach(model, RandomDrop(), EARLY) as trace:
            model(**text, past_key_values=cache)
            mask = torch.ones(1, cache.get_seq_length() + image["input_ids"].shape[1], dtype=torch.long)
            got = model(**dict(image, attention_mask=mask), past_key_values=cache).logits
        whole = dict(image, input_ids=torch.cat([text["input_ids"], image["input_ids"]], 1), attention_mask=mask)
        truth = oracle.forward(model, whole, None, BOUNDARIES, kept=kept_of(trace))
        first = text["input_ids"].shape[1]
        alive = [p - first for p in truth.alive[0] if p >= first]
        torch.testing.assert_close(got[0, alive], truth.logits[0, first:][alive], rtol=0, atol=5e-5)
        assert cache.get_seq_length() == mask.shape[1]
