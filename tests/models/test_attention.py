"""Which of torch's attention kernels comes first: chosen for CUDA, part of what a run is, and held wherever it runs."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.modules.module import register_module_forward_pre_hook

from pdrop import PyramidDrop, Schedule, SparseVLMV1, Stage, pyramid
from pdrop.cli import compose
from pdrop.evaluation.answers import Question
from pdrop.evaluation.generation import Generator
from pdrop.models.attention import ORDERS, resolved, sdpa_order
from pdrop.models.checkpoint import load
from pdrop.record import RunRecord
from pdrop.runs import timed
from pdrop.runs.run import run
from pdrop.runs.settings import Settings, scheduled
from pdrop.timing.measure import measure, pooled
from pdrop.timing.protocol import TimingProtocol
from tests.support.saved_checkpoints import LAYERS, save_llava
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture

KINDS = (
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
)  # fmt: skip


def enabled() -> tuple[bool, ...]:
    """cuDNN's, flash, memory-efficient, math: whether torch may take it."""
    backends = torch.backends.cuda
    return (
        backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
    )  # fmt: skip


def in_order() -> list[Any]:
    """The kernels that torch may take, as it takes them."""
    return [kind for kind in torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) if kind in KINDS]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ORDERS)
def test_a_block_has_these_kernels_and_leaves_torch_as_it_was(name: str) -> None:
    before = enabled()
    with sdpa_order(name):
        kernels = ("cudnn", "flash", "efficient", "math")
        assert enabled() == tuple(kernel in ORDERS[name] for kernel in kernels)
        assert [kind.name.split("_")[0].lower() for kind in in_order()] == list(ORDERS[name])
        with pytest.raises(ZeroDivisionError), sdpa_order("math"):
            raise ZeroDivisionError
        assert enabled()[:3] == tuple(kernel in ORDERS[name] for kernel in kernels[:3])
    assert enabled() == before
    with sdpa_order(""):
        assert enabled() == before


def test_there_is_a_choice_on_cuda_under_sdpa_alone() -> None:
    assert resolved(None, "sdpa", "cuda:1") == "flash", "cuDNN's would plan anew for every length"
    assert resolved("cudnn", "sdpa", "cuda") == "cudnn"
    assert resolved(None, "sdpa", "cpu") == resolved("math", "flash_attention_2", "cuda") == ""
    with pytest.raises(ValueError, match="sdpa_kernel is flash, cudnn, efficient or math, not 'fast'"):
        resolved("fast", "eager", "cpu")


def settings(**dials: Any) -> Settings:
    return compose.settings({"tasks": [], "device": "cpu", **dials})


def test_it_identifies_runs_on_cuda_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    here = settings()
    assert settings(sdpa_kernel="math").spec == here.spec and here.spec.sdpa_kernel == ""
    monkeypatch.setattr("pdrop.models.checkpoint.check_device", lambda device: None)
    there = [settings(device="cuda", sdpa_kernel=name).spec for name in (None, "flash", "cudnn")]
    assert there[0].run_id == there[1].run_id != there[2].run_id
    with pytest.raises(ValueError, match="sdpa_kernel is flash"):
        settings(sdpa_kernel="fast")
    full = [settings(device=device, latency="full").protocol.kernels for device in ("cuda", "cpu")]
    assert full == [("cudnn",), ()], "the run's own is measured anyway"
    assert "kernels" not in settings(latency="full").spec.latency
    assert " kernels cudnn " in settings(latency="full", device="cuda").spec.latency


def without(text: str, field: str) -> str:
    """A record from before a field of its spec, and before checksums."""
    data = json.loads(text)
    del data["checksum"], data["spec"][field]
    return json.dumps(data)


def test_a_record_of_before_is_read_and_keeps_its_id() -> None:
    spec = settings().spec
    record = RunRecord(spec, "running", "2026-01-01T00:00:00Z")
    text = record.to_json()
    assert '"sdpa_kernel": "",' in text or '"sdpa_kernel": ""' in text
    older = without(text, "sdpa_kernel")
    assert RunRecord.from_json(older).run_id == record.run_id
    assert replace(spec, sdpa_kernel="flash").run_id != spec.run_id


def test_questions_are_answered_with_the_run_s_kernels(tmp_path: Path) -> None:
    checkpoint = load(str(save_llava(tmp_path / "llava")), name="tiny")
    seen: list[tuple[bool, ...]] = []
    checkpoint.model.register_forward_hook(lambda *_: seen.append(enabled()))
    method, schedule = PyramidDrop(), pyramid(LAYERS, layers=(2,), ratio=0.5)
    question = Question("task", 0, 0, "What?", functools.partial(list, [picture(0, (28, 28))]))
    for name in ("math", "efficient"):
        Generator(checkpoint, method, schedule, spec_of(max_new_tokens=2, sdpa_kernel=name)).answer([question])
        assert seen and set(seen) == {(False, False, name == "efficient", True)}
        seen.clear()


def test_every_timing_is_under_the_run_s_kernels(tmp_path: Path) -> None:
    """Looked at from inside the layers: here, in a worker, in a fresh process, for a budget in milliseconds, and where
    a forward finds how many tokens stay."""
    folder = {"model": "folder", "model.name": "tiny", "model.path": str(save_llava(tmp_path / "llava"))}
    given = settings(**folder, method="none", results=str(tmp_path / "results"))
    given = scheduled(replace(given, method=PyramidDrop()), pyramid(LAYERS, layers=(2,), ratio=0.5))
    seen: list[tuple[bool, ...]] = []

    def look(module: Any, args: Any) -> None:
        if type(module).__name__ == "LlamaAttention":
            seen.append(enabled())

    quick, full = (TimingProtocol(name, 0, 1, new_tokens=new) for name, new in (("quick", ()), ("full", (1, 2))))
    handle = register_module_forward_pre_hook(look)
    try:
        for name, protocol in (("math", quick), ("efficient", full)):
            now = replace(given, protocol=protocol, spec=replace(given.spec, sdpa_kernel=name))
            cost: Any = SimpleNamespace()
            for timing in (
                lambda now=now, cost=cost: timed.time_run(cost, now, now.load()),
                lambda now=now: timed.measured_alone(now, torch.get_num_threads()),
                lambda now=now: timed.prefill_ms(now, PyramidDrop())(now.schedule),
            ):
                seen.clear()
                timing()
                assert len(seen) > LAYERS and set(seen) == {(False, False, name == "efficient", True)}
        seen.clear()
        found = Schedule((Stage(2, adaptive=True),))
        run(
            replace(scheduled(replace(now, method=SparseVLMV1()), found), spec=now.spec, protocol=TimingProtocol("off"))
        )
        assert len(seen) == LAYERS and set(seen) == {(False, False, True, True)}
    finally:
        handle.remove()


def test_other_kernels_are_measured_beside_the_run_s_own(tmp_path: Path) -> None:
    model = load(str(save_llava(tmp_path / "llava")), name="tiny").model
    seen: set[tuple[bool, ...]] = set()
    model.register_forward_hook(lambda *_: seen.add(enabled()))
    ids = torch.tensor([[1, 20, *[3] * 16, 30, 31]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 28, 28)}
    protocol = TimingProtocol("t", pairs=2, new_tokens=(1, 2), kernels=("math", "flash"))
    assert protocol.spelled == "t 1/2/0 new 1/2 kernels math/flash"
    found = [measure(model, inputs, PyramidDrop(), pyramid(LAYERS, ratio=0.5), protocol) for _ in range(2)]
    assert {(False, False, False, True), (False, True, True, True)} < seen
    both = pooled(found)["kernels"]
    assert set(both) == {"math", "flash"}
    for one in both.values():
        assert len(one["stages"]["decode"]["ratio"]["values"]) == 4 == len(one["end_to_end"]["2"]["none"]["values"])
    with pytest.raises(ValueError, match=r"latency\.kernels is flash, cudnn, efficient or math, not 'fast'"):
        TimingProtocol("t", kernels=("fast",))
    with pytest.raises(ValueError, match=r"latency\.kernels is a list such as \[flash,cudnn\], not 'flash'"):
        TimingProtocol("t", kernels="flash")
