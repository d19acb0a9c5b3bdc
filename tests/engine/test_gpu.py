"""The engine on a GPU: the same tokens as on the CPU up to near-ties, whatever kernel computes attention.

Needs torch, transformers and pytest alone.

pytest tests/engine/test_gpu.py          # skipped where there is no CUDA device
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdrop import FastV, attach
from pdrop.conformance.families import CORE, build, fresh
from pdrop.conformance.prompts import collate, sample, single
from pdrop.models.attention import ORDERS, sdpa_order
from pdrop.models.checkpoint import load
from pdrop.timing.measure import measure
from pdrop.timing.protocol import TimingProtocol
from tests.support.cases import GREEDY, HALVES, RAGGED, batch_of, methods
from tests.support.near_ties import diverged
from tests.support.saved_checkpoints import save_llava

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = {
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),  # flash takes no mask: ragged stages fall back
    "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "math": (SDPBackend.MATH,),
}


def move(batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The batch on the device, floats in `dtype`."""
    return {key: value.to(DEVICE, dtype if value.is_floating_point() else None) for key, value in batch.items()}


def row_of(trace: Any, row: int) -> Any:
    """One prompt's part of a trace."""
    kept, scores = ([[stage[row]] for stage in stages] for stages in (trace.kept, trace.scores))
    return SimpleNamespace(visual=[trace.visual[row]], kept=kept, scores=scores)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CORE)
def test_float32_is_what_the_cpu_gives(family: str, backend: str) -> None:
    on_cpu, on_device = build(family, backend, torch.float32), fresh(family, backend, torch.float32).to(DEVICE)
    batch = batch_of(family, on_cpu, RAGGED)
    real = batch["attention_mask"].bool()
    for method in methods(family):
        with attach(on_cpu, method, HALVES) as want:
            logits = on_cpu(**batch).logits
        with attach(on_device, method, HALVES) as got:
            moved = on_device(**move(batch)).logits.cpu()
        assert got.tokens == want.tokens
        same = [row for row in range(len(real)) if row not in diverged(got, want)]
        assert len(same) >= len(real) - 1, "near-ties are rare"
        for row in same:
            torch.testing.assert_close(moved[row, real[row]], logits[row, real[row]], rtol=0, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_under_every_kernel(dtype: torch.dtype, kernel: str) -> None:
    model = fresh("llava", dtype=dtype).to(DEVICE)
    for rows in (RAGGED[:1], RAGGED):
        batch = move(batch_of("llava", model, rows), dtype)
        for method in methods("llava"):
            with sdpa_kernel(list(KERNELS[kernel])), attach(model, method, HALVES) as trace:
                out = model.generate(**batch, **GREEDY)
                assert all(logits.isfinite().all() for logits in out.logits)
            for kept, scores in zip(trace.kept[0], trace.scores[0]):
                assert scores.dtype == torch.float32
                ranked = sorted(range(len(scores)), key=lambda index: -float(scores[index]))
                assert kept.tolist() == sorted(ranked[: len(kept)]), "ties are broken by place"


@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_a_batch_keeps_what_its_rows_keep(family: str) -> None:
    model = build(family, "sdpa", torch.float32)
    samples = [sample(family, model, texts, seed) for seed, texts in enumerate(RAGGED)]
    model = fresh(family, "sdpa", torch.float32).to(DEVICE)
    for method in methods(family):
        with attach(model, method, HALVES) as trace:
            model(**move(collate(family, samples)))
            together = [row_of(trace, row) for row in range(len(samples))]
            parted = 0
            for row, one in enumerate(samples):
                model(**move(single(family, one)))
                parted += len(diverged(row_of(trace, 0), together[row]))  # products of other shapes round otherwise
        assert parted <= 1, "near-ties are rare"


def test_every_lane_of_a_cell_is_measured_on_the_device() -> None:
    model = fresh("llava", "sdpa", torch.float16)
    inputs = move(single("llava", sample("llava", model, (3, 5, 2))), torch.float16)
    model.to(DEVICE)
    protocol = TimingProtocol("test", warmup=2, pairs=3, new_tokens=(1, 4), memory=True, kernels=("math",))
    found = measure(model, inputs, FastV(several=True), HALVES, protocol)
    before, after = (found["conditions"][when] for when in ("before", "after"))
    assert before["device_name"] and before["outside_gib"] > 0 and "sm_" in before["cuda_libraries"]
    assert before["sdpa_kernels"] == after["sdpa_kernels"] and {"clock_mhz", "slowed", "power_w"} <= set(after)
    assert "upper bound" in found["notes"]["selection"]
    assert found["kernels"]["math"]["stages"]["prefill"]["this"]["low"] > 0
    for lane in (found["stages"]["prefill"], found["stages"]["decode"], found["end_to_end"]["4"]):
        assert lane["this"]["low"] > 0 and lane["none"]["low"] > 0
    peak = found["memory"]["none"]["prefill"]
    assert peak["allocated"] > 0 and peak["reserved"] >= 0
    assert sum(found["memory"]["this"]["kv_per_layer"]) < sum(found["memory"]["none"]["kv_per_layer"])


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_kernels_give_the_same_answers(order: str) -> None:
    model = fresh("llava", dtype=torch.bfloat16).to(DEVICE)
    batch = move(batch_of("llava", model, RAGGED[:1]), torch.bfloat16)
    with attach(model, FastV(several=True), HALVES) as trace:
        with sdpa_order("math"):
            want = model(**batch).logits.float()
            expected = SimpleNamespace(visual=trace.visual, kept=trace.kept, scores=trace.scores)
        with sdpa_order(order):
            got = model(**batch).logits.float()
    if not diverged(trace, expected, near=0.02):  # bfloat16
        torch.testing.assert_close(got, want, rtol=0, atol=0.2)


def test_a_checkpoint_is_loaded_onto_the_card(tmp_path: Path) -> None:
    for name in ("PIL", "torchvision", "accelerate"):  # a bare machine has none, and loading needs them
        pytest.importorskip(name)
    folder = str(save_llava(tmp_path / "llava"))
    for device in (DEVICE, f"{DEVICE}:0"):
        model = load(folder, name="x", dtype="bfloat16", device=device).model
        assert {weight.device.type for weight in model.parameters()} == {"cuda"}
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
