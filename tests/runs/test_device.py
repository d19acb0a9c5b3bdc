"""The device that a command uses; and what is said if torch cannot use a GPU that is there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pdrop.models.checkpoint import check_device
from pdrop.runs import cards
from pdrop.runs.device import chosen, out_of_memory

OLD = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update your GPU driver"


@pytest.fixture
def useless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards whose driver is too old: NVML counts them, and torch cannot compute on them."""

    def init() -> None:
        raise RuntimeError(OLD)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_gpu_that_torch_can_use_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (chosen(None), chosen("cuda:1"), chosen("cpu")) == ("cuda", "cuda:1", "cpu")


def test_a_driver_that_is_too_old_is_said_before_anything_is_loaded(
    useless: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A count of cards alone would let it pass, and loading the model would end in a traceback."""
    check_device("cuda")
    with pytest.raises(ValueError, match=r"device=cuda:1 cannot be had: torch .* built for CUDA .*too old.*gpu\.md"):
        chosen("cuda:1")
    with caplog.at_level(logging.WARNING, "pdrop"):
        assert chosen("cpu") == "cpu" and not caplog.records, "as asked for"
        assert chosen(None) == "cpu"
    (record,) = caplog.records
    assert "runs on the CPU" in record.getMessage() and "too old (found version 12020). Please" in record.getMessage()


def test_a_torch_without_cuda_is_said(useless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(cards, "DRIVER", tmp_path)
    monkeypatch.setenv(cards.VISIBLE, "0")
    with pytest.raises(ValueError, match=r"device=cuda cannot be had: torch .* is built without CUDA"):
        chosen("cuda")


def test_a_machine_without_a_gpu_says_nothing(
    useless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for driver, visible in ((tmp_path / "none", "0"), (tmp_path, "")):  # no GPU; hidden ones
        monkeypatch.setattr(cards, "DRIVER", driver)
        monkeypatch.setenv(cards.VISIBLE, visible)
        assert chosen(None) == "cpu" and not caplog.records
        assert chosen("cuda") == "cuda", "refused by the check of the device"


def test_memory_that_has_ended_is_known_by_what_it_caused() -> None:
    full = RuntimeError("the process that measured this run failed")
    full.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    driver = torch.AcceleratorError("CUDA error: out of memory", 2)  # no room for a context
    assert out_of_memory(full) and out_of_memory(full.__cause__) and out_of_memory(driver)
    assert not out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))
    assert not out_of_memory(RuntimeError("out of memory of this")) and not out_of_memory(None)
