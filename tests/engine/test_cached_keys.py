"""Methods that rank by a layer that has run read its keys from the cache, and get what they would have computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from pdrop import FastV, PyramidDrop, Schedule, SparseVLM, SparseVLMPlus, Stage, attach
from pdrop.conformance.families import CORE, build
from pdrop.engine.ranking import cached_keys
from tests.support.cases import RAGGED, batch_of

SCHEDULE = Schedule((Stage(2, 0.5), Stage(3, 0.25)))  # layer 2 is cut and observed


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [FastV(several=True), SparseVLM(positions="original")], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("family", CORE)
def test_scores_are_the_same_to_the_bit(family: str, method: Any) -> None:
    model, scores = build(family), []
    batch = batch_of(family, model, RAGGED)
    for cached in (True, False):
        with attach(model, method, SCHEDULE) as trace:
            model(**batch, use_cache=cached)
        scores.append([row for boundary in trace.scores for row in boundary])
    assert all(torch.equal(a, b) for a, b in zip(*scores))
    assert len(scores[0]) == 2 * len(batch["input_ids"])


@torch.no_grad()
def test_only_a_plain_cache_is_read() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    length = batch["input_ids"].shape[1]
    assert cached_keys(None, 0, length) is None
    cache = model(**batch, use_cache=True).past_key_values
    assert cached_keys(cache, 0, length).shape[2] == length
    assert cached_keys(cache, 0, 3).shape[2] == 3 and cached_keys(cache, 99, 3) is None
    static = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=2 * length)
    with attach(model, FastV(several=True), Schedule()):
        model(**batch, past_key_values=static)
    assert cached_keys(static, 0, length) is None, "its keys are longer than what came in"


class SentAway(DynamicCache):
    """An offloaded cache: a layer's keys leave the device as soon as the layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.offloading, self.away = True, dict[int, dict[str, Any]]()

    def update(self, keys: Any, values: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        self.offloading = False  # what the class itself does then needs CUDA
        if number < len(self.layers):
            self.layers[number].__dict__.update(self.away[number])
        found = super().update(keys, values, number, *args, **kwargs)
        layer: Any = self.layers[number]
        self.away[number] = {"keys": layer.keys, "values": layer.values}
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        self.offloading = True
        return found


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [FastV(several=True), SparseVLM(), SparseVLMPlus(), PyramidDrop()], ids=lambda m: type(m).__name__
)
def test_keys_that_an_offloaded_cache_has_sent_away_are_not_read(method: Any) -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    greedy: dict[str, Any] = dict(max_new_tokens=3, do_sample=False)
    with attach(model, method, SCHEDULE):
        want = model.generate(**batch, **greedy)
        assert torch.equal(model.generate(**batch, **greedy, past_key_values=SentAway()), want)
