"""Under flash attention (emulated) neither side of a timing asks whether its rows are packed; nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as library

from pdrop import FastV, PyramidDrop, attach
from pdrop.conformance.families import fresh
from pdrop.engine.hooks import rows_not_packed
from pdrop.timing.measure import measure, measure_prefill
from pdrop.timing.paired import prefill, prefill_ratio
from pdrop.timing.protocol import TimingProtocol
from tests.engine.test_flash import kernels  # noqa: F401
from tests.support.cases import HALVES, RAGGED, batch_of


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a layer found out, by waiting for the device."""
    counts: Counter[str] = Counter()
    real = library._is_packed_sequence

    def counted(position_ids: Any, batch_size: int) -> Any:
        counts["waits"] += position_ids is not None and batch_size == 1 and position_ids.shape[-1] > 1
        return real(position_ids, batch_size)

    monkeypatch.setattr(library, "_is_packed_sequence", counted)
    return counts


def flash() -> tuple[Any, dict[str, Any]]:
    model = fresh("llava", "sdpa", torch.float32)
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    return model, batch_of("llava", model, RAGGED[:1])


@torch.no_grad()
def test_neither_side_asks_and_both_give_what_they_gave(kernels: Counter[str], asked: Counter[str]) -> None:  # noqa: F811
    model, inputs = flash()
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    want = prefill(model, inputs).logits
    unattached = asked.pop("waits")
    with attach(model, PyramidDrop(), HALVES):
        dropped = prefill(model, inputs).logits
    assert 0 < asked.pop("waits") < unattached == 6, "the bias: dropping asks less often"
    with rows_not_packed(model, inputs):
        assert torch.equal(prefill(model, inputs).logits, want)
        with attach(model, PyramidDrop(), HALVES):
            assert torch.equal(prefill(model, inputs).logits, dropped)
    assert not asked["waits"]
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before


def test_every_timing_is_without(kernels: Counter[str], asked: Counter[str]) -> None:  # noqa: F811
    model, inputs = flash()
    prefill_ratio(model, inputs, PyramidDrop(), HALVES, TimingProtocol("t", pairs=2))
    measure(model, inputs, PyramidDrop(), HALVES, TimingProtocol("t", pairs=2, new_tokens=(1, 2), memory=True))
    measure_prefill(model, inputs, PyramidDrop(), HALVES, TimingProtocol("t", pairs=2))
    assert kernels["dense"] and not asked["waits"]


def test_other_backends_and_positions_of_the_caller_s_own_are_left_alone(asked: Counter[str]) -> None:
    model, inputs = flash()
    for backend, given in (("sdpa", inputs), ("flash_attention_2", inputs | {"position_ids": torch.zeros(1, 1)})):
        model.get_decoder().config._attn_implementation = backend
        with rows_not_packed(model, given):
            assert not any(layer.self_attn._forward_pre_hooks for layer in model.get_decoder().layers)


def test_an_attachment_s_hooks_still_rest_in_a_step_of_nothing_to_do(kernels: Counter[str]) -> None:  # noqa: F811
    model, inputs = flash()
    ids = torch.tensor([[7]])
    with rows_not_packed(model, inputs), attach(model, FastV(several=True), HALVES):
        cache = prefill(model, inputs).past_key_values
        prefill(model, {"input_ids": ids, "past_key_values": cache})
        assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)
        assert all(layer.self_attn._forward_pre_hooks for layer in model.get_decoder().layers)
