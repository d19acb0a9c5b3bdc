"""What is handed to a model on a GPU travels in the model's dtype, from pinned memory, and nobody waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from pdrop.evaluation.answers import Question
from pdrop.evaluation.generation import Generator
from tests.support.pretended_cuda import CUDA, pretended


def test_pixels_are_cast_before_they_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*given: Any) -> BatchFeature:
        return BatchFeature({"input_ids": torch.arange(4)[None], "pixel_values": torch.rand(1, 3, 2, 2), "other": [1]})

    model = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    generator: Any = SimpleNamespace(builder=SimpleNamespace(encode_rows=encode), cache=None, pixels=1.0, model=model)
    generator._generate = lambda part, trace: part.inputs
    row: Any = SimpleNamespace(videos=(), sizes=[])
    with pretended(monkeypatch) as seen:
        part = Generator._prepared(generator, [Question("t", 0, 0, "a", list)], ["a"], [row])
        inputs: Any = Generator.ask(generator, part, SimpleNamespace())
        assert {x.dtype for x in seen.pinned} == {torch.int64, torch.bfloat16}
        assert not seen.waits
    assert inputs["pixel_values"].device == CUDA and inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].device == CUDA and inputs["input_ids"].dtype == torch.int64
    assert inputs["other"] == [1]
