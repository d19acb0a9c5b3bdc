"""Everything that is timed, on a pretended CUDA device with a card's driver stood in for: what is recorded there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pdrop import FastV
from pdrop.conformance.families import fresh
from pdrop.models.attention import sdpa_order
from pdrop.timing.conditions import refuse_differences
from pdrop.timing.measure import BOUND, measure, measure_prefill
from pdrop.timing.protocol import TimingProtocol
from tests.support.cases import HALVES, RAGGED, batch_of
from tests.support.pretended_cuda import OnDevice, moved, pretended
from tests.timing.test_nvidia import smi  # noqa: F401

PROTOCOL = TimingProtocol("t", warmup=0, pairs=1, new_tokens=(1, 2), memory=True, kernels=("cudnn",))


class Event:
    """An event of the device's queue, which the pretended device has none of."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, smi: Path) -> Iterator[tuple[Any, dict[str, Any], Counter[str]]]:  # noqa: F811
    """A model and a prompt there, and how often the host waited for the whole device."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED[:1])
    waits: Counter[str] = Counter()
    card = {
        "Event": Event,
        "synchronize": lambda device=None: waits.update(["synchronize"]),
        "get_device_name": lambda device=None: "A card",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (60 << 30, 80 << 30),
        "memory_reserved": lambda device=None: 17 << 30,
        "memory_allocated": lambda device=None: 1 << 30,
        "max_memory_allocated": lambda device=None: 3 << 30,
        "max_memory_reserved": lambda device=None: 20 << 30,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    for name, stand_in in card.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    moved(model)
    with pretended(monkeypatch):
        # its tensors cannot pretend in inference mode
        monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        yield model, {name: OnDevice(x) for name, x in batch.items()}, waits


def test_all_that_is_measured_there_has_its_conditions(there: Any, smi: Path) -> None:  # noqa: F811
    model, inputs, waits = there
    program = smi.with_name("nvidia-smi")  # a clock that falls a little each time
    program.write_text(program.read_text().replace("1755,", f"$((1755 - $(wc -l < {smi}))),"))
    with sdpa_order("flash"):
        found = measure(model, inputs, FastV(several=True), HALVES, PROTOCOL)
    for now in (found["conditions"]["before"], found["conditions"]["after"]):
        assert (now["device"], now["device_name"], now["tf32"]) == ("cuda", "A card", False)
        assert now["sdpa_kernels"] == "flash, efficient, math"
        assert f"torch {torch.__version__}" in now["cuda_libraries"] and "sm_90" in now["cuda_libraries"]
        assert 1740 < now["clock_mhz"] < 1755 and (now["power_w"], now["temperature_c"]) == (402.5, 61)
        assert now["outside_gib"] == 3.0 and now["others_gib"] == pytest.approx(16.62, abs=0.01)
    before, after = (found["conditions"][when]["clock_mhz"] for when in ("before", "after"))
    assert before > after, "it was asked again"
    assert found["notes"] == {"selection": BOUND}
    assert found["invalid"] == ["others hold 16.6 GiB of the GPU", "the GPU was slowed down by heat"]
    assert set(found["stages"]) == {"prefill", "decode", "vision", "selection"} and set(found["kernels"]) == {"cudnn"}
    lanes = [*found["stages"].values(), *found["end_to_end"].values(), *found["kernels"]["cudnn"]["stages"].values()]
    assert all(lane["this"]["low"] > 0 for lane in lanes)
    assert found["memory"]["this"]["answer"] == {"allocated": 2 << 30, "reserved": 3 << 30}
    assert waits["synchronize"] > 2 * 7, "a hook's time is its own"


@pytest.mark.exhaustive
def test_an_indication_has_them_too_and_another_kernel_or_clock_is_refused(
    there: Any,
    smi: Path,  # noqa: F811
) -> None:
    model, inputs, _ = there
    quick, found = replace(PROTOCOL, new_tokens=(), memory=False), []
    for order in ("flash", "cudnn"):
        with sdpa_order(order):
            found.append(measure_prefill(model, inputs, FastV(several=True), HALVES, quick)["conditions"]["before"])
    assert {"clock_mhz", "sdpa_kernels", "cuda_libraries"} <= set(found[0])
    with pytest.raises(ValueError, match="sdpa_kernels: flash, efficient, math and cudnn, flash, efficient, math"):
        refuse_differences(*found)
    program = smi.with_name("nvidia-smi")
    program.write_text(program.read_text().replace("1755", "1410"))
    with sdpa_order("flash"):
        slower = measure_prefill(model, inputs, FastV(several=True), HALVES, quick)["conditions"]["before"]
    with pytest.raises(ValueError, match="clock_mhz: 1755 and 1410, more than 5% apart"):
        refuse_differences(found[0], slower)
