"""Dialogues: caches that were shortened in one turn go on in the next, with text or with new images.

pytest tests/engine/test_turns.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from pdrop import attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, build
from pdrop.conformance.prompts import collate, sample
from tests.support.cases import BOUNDARIES, GREEDY, HALVES, RAGGED, STEPS, batch_of, kept_of, methods, prolong


def text_turn(batch: dict[str, Tensor], first: Any) -> tuple[dict[str, Tensor], Tensor]:
    """What `generate` gets for a second turn of seven text tokens after a first answer, and its input_ids."""
    ids = torch.cat([first.sequences, torch.arange(20, 27).expand(len(first.sequences), -1)], 1)
    longer = prolong(batch, ids)
    return {key: value for key, value in longer.items() if "pixel_values" not in key and key != "image_sizes"}, ids


@pytest.mark.product(4)
@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [RAGGED[:1], RAGGED], ids=["one", "ragged"])
def test_a_second_turn_on_a_copied_cache(family: str, rows: Any) -> None:
    """Text after a pruned first turn equals recomputing both turns under the first turn's query."""
    model = build(family)
    batch = batch_of(family, model, rows)
    length = batch["input_ids"].shape[1]
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            first = model.generate(**batch, **GREEDY)
            kept = kept_of(trace)
            again, ids = text_turn(batch, first)
            answers = []
            for _ in range(2):  # a copy is a copy: the second branch must not see the first
                cache = copy.deepcopy(first.past_key_values)
                answers.append(model.generate(**again, **GREEDY, past_key_values=cache))
        assert torch.equal(answers[0].sequences, answers[1].sequences)
        out = answers[0]
        everything = prolong(batch, out.sequences[:, :-1])
        pinned = [[length - 1]] * len(rows)
        truth = oracle.forward(model, everything, None, BOUNDARIES, method.positions, queries=pinned, kept=kept)
        for step, logits in enumerate(out.logits):
            want = truth.logits[:, ids.shape[1] - 1 + step]
            torch.testing.assert_close(logits.double(), want, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", methods("llava"), ids=lambda m: f"{type(m).__name__}-{m.positions}")
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("before", [(3, 5), (9,)], ids=["after-an-image", "after-text"])
def test_a_later_turn_with_a_new_image(family: str, before: tuple[int, ...], method: Any) -> None:
    """New images are ranked among themselves; what the first turn kept stays as it is."""
    model = build(family)
    turns = [batch_of(family, model, (before,)), collate(family, [sample(family, model, (4, 6), 5)])]
    lengths = [turn["input_ids"].shape[1] for turn in turns]
    cache: Any = DynamicCache(config=model.config)
    kept, visual = [], []
    with attach(model, method, HALVES) as trace:
        for number, turn in enumerate(turns):
            mask = torch.ones(1, sum(lengths[: number + 1]), dtype=torch.long)
            out = model(**dict(turn, attention_mask=mask), past_key_values=cache)
            kept.append(kept_of(trace))
            visual += trace.visual
    assert trace.prefills == 2
    both = [[old[0] + [visual[0] + index for index in new[0]]] for old, new in zip(*kept)]
    pixels = [key for key in turns[1] if key not in ("input_ids", "attention_mask")]
    whole = {key: torch.cat([turn[key] for turn in turns if key in turn]) for key in pixels}
    dialogue = collate(family, [whole | {"input_ids": torch.cat([turn["input_ids"][0] for turn in turns])}])
    truth = oracle.forward(model, dialogue, None, BOUNDARIES, method.positions, kept=both)
    alive = [p - lengths[0] for p in truth.alive[0] if p >= lengths[0]]
    torch.testing.assert_close(out.logits[0, alive], truth.logits[0, lengths[0] :][alive], rtol=0, atol=5e-5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [layer[0] for layer in truth.tokens]
    share = [len(stage[0]) for stage in kept[1]]
    assert share == [method.count(stage, visual[1]) for stage in HALVES]


@torch.no_grad()
@pytest.mark.parametrize("method", methods("llava"), ids=lambda m: f"{type(m).__name__}-{m.positions}")
def test_several_caches_in_flight(method: Any) -> None:
    """What a later forward must know lives on the cache: interleaved decoding equals one after the other."""
    model = build("llava")
    batches = [batch_of("llava", model, rows) for rows in (RAGGED[:2], RAGGED[1:], ((9,),))]
    with attach(model, method, HALVES):
        wanted = [model.generate(**batch, **GREEDY).sequences for batch in batches]
        caches = [DynamicCache(config=model.config) for _ in batches]
        tokens = [batch["input_ids"] for batch in batches]
        for step in range(STEPS):
            for number, batch in enumerate(batches):
                whole = prolong(batch, tokens[number])
                inputs: dict[str, Any] = (
                    whole if step == 0 else dict(whole, input_ids=tokens[number][:, -1:], pixel_values=None)
                )
                inputs["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
                inputs["position_ids"] = inputs["position_ids"][:, -inputs["input_ids"].shape[1] :]
                logits = model(**inputs, past_key_values=caches[number]).logits[:, -1]
                logits[:, GREEDY["suppress_tokens"]] = -torch.inf
                tokens[number] = torch.cat([tokens[number], logits.argmax(-1, keepdim=True)], 1)
    for got, want in zip(tokens, wanted):
        assert torch.equal(got, want)
