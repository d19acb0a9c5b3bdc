"""What the driver says of a GPU, read without one: clocks, slow-downs, others' memory; and what makes times invalid."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pdrop.record import CLOSE_CONDITIONS, EQUAL_CONDITIONS
from pdrop.timing import nvidia
from pdrop.timing.conditions import OTHERS_GIB, OWN_GIB, differences, invalid, sdpa_kernels
from pdrop.timing.nvidia import ancestors, clocks_at_work, read_clocks, read_others

CUDA = torch.device("cuda:0")
GPU: dict[str, Any] = dict.fromkeys(EQUAL_CONDITIONS) | {"device": "cuda", "others_gib": 0.0, "clock_mhz": 1980.0}
# stands in for nvidia-smi: an older driver, which does not know today's name of the reasons
SMI = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2;;
  *clocks.sm*) echo "1755, 402.50, 61, 0x0000000000000024";;
  *compute-apps*) printf '%s, 17024\\n{own}, 10240\\n' 1234567;;
  *compute_mode*) echo "Exclusive_Process";;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name in the path, and what it was asked."""
    program, log = tmp_path / "nvidia-smi", tmp_path / "asked"
    program.write_text(SMI.replace("{log}", str(log)).replace("{own}", str(os.getpid())))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(nvidia, "uuid_of", lambda device: "GPU-1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return log


def test_clocks_are_read_while_the_card_works(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worked: list[bool] = []
    real, before = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: before.append(len(worked)) or real(*given, **how))
    found = clocks_at_work(lambda: worked.append(smi.exists()), CUDA)
    assert found["clock_mhz"] == 1755 and found["power_w"] == 402.5 and found["temperature_c"] == 61
    assert found["at_power_limit"] is True and found["slowed"] == ["heat"]
    assert 0 < before[0] < before[1] and worked[-1] is True, (
        "before it is asked, and meanwhile: an idle card's is another"
    )
    asked = smi.read_text()
    assert "clocks_event_reasons.active" in asked and "clocks_throttle_reasons.active" in asked, "of old drivers, too"
    assert "--id=GPU-1" in asked


def test_memory_of_others_is_not_that_of_this_process_and_its_parents(smi: Path) -> None:
    assert nvidia.others_gib(CUDA) == pytest.approx(16.62, abs=0.01)
    assert os.getpid() not in ancestors(os.getpid())
    assert read_others("10, 1024\n11, 2048\n12, 512\n", {10, 12}) == 2.0
    assert read_others("10, 1024\n", {10}) == 0.0
    assert read_others("99, 1024\n", {10}) is None, "the ids are those of another namespace: nothing is known"
    assert read_others("10, [N/A]\n11, [N/A]\n", {10}) is None
    assert read_others(None, {10}) is None
    assert nvidia.exclusive(CUDA)


@pytest.mark.parametrize(
    ("told", "code", "others", "reason"),
    [
        ("{own}, 10240\n", 0, 0.0, ""),
        ("{own}, 10240\n1234567, 1024\n7654321, 512\n", 0, 1.5, ""),
        ("1234567, 4096\n{own}, 10240\n", 0, 4.0, "others hold 4.0 GiB"),
        ("{own}, 10240\n1234567, [N/A]\n", 0, None, "5.0 GiB of the GPU are not torch's"),
        ("{own}, [N/A]\n", 0, 0.0, ""),
        ("{own}, 10240\n{parent}, 4096\n", 0, 0.0, ""),  # of latency=full: the command that started this process
        ("{own}, [Not Supported]\n1234567, [Insufficient Permissions]\n", 0, None, "5.0 GiB of the GPU"),
        ("1234567, 10240\n", 0, None, "5.0 GiB of the GPU"),  # a container sees the host's numbers of processes
        ("[N/A], 10240\n", 0, None, "5.0 GiB of the GPU"),
        ("", 0, None, "5.0 GiB of the GPU"),  # a container sees none
        ("No running processes found\n", 0, None, "5.0 GiB of the GPU"),
        ("No devices were found\n", 6, None, "5.0 GiB of the GPU"),  # a part of a card (MIG) is no card to nvidia-smi
        ("{own}, 10240\n", 255, None, "5.0 GiB of the GPU"),
    ],
)
def test_memory_of_others_in_every_form_that_it_is_told(
    smi: Path, told: str, code: int, others: float | None, reason: str
) -> None:
    """Of this card alone; where the driver does not tell, what is not torch's must be within bounds."""
    program = smi.with_name("nvidia-smi")
    if "{parent}" in told and not os.getppid():
        pytest.skip("this process's parent is outside of its container")
    told = told.format(own=os.getpid(), parent=os.getppid()).replace("\n", "\\n")
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {smi}\nprintf '{told}'\nexit {code}\n")
    assert nvidia.others_gib(CUDA) == others
    assert smi.read_text().count("--id=GPU-1 --query-compute-apps=pid,used_memory --format=csv,noheader,nounits") == 1
    now = GPU | {"others_gib": others, "outside_gib": 5.0}
    found = invalid(now, now)
    assert len(found) == bool(reason) and all(reason in text for text in found)


def test_every_ancestor_counts_the_first_process_too() -> None:
    """It adopts what its parents have left, and in a container it may be the command that uses the card."""
    found = ancestors(os.getpid())
    if os.getppid() != 0:  # whose parent is outside of a container
        assert found == {os.getppid(), *ancestors(os.getppid())}, "also where that is process 1"
    line = "sleep 60 >/dev/null 2>&1 & echo $!"
    adopted = int(subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout)
    try:
        assert 1 in ancestors(adopted), "the shell that started it has ended"
    finally:
        os.kill(adopted, signal.SIGKILL)
    assert ancestors(1) == set() and ancestors(2**30) == set()


def test_what_is_not_told_is_none() -> None:
    nothing = {"clock_mhz": None, "power_w": None, "temperature_c": None, "at_power_limit": None, "slowed": None}
    assert read_clocks(None) == read_clocks("") == read_clocks("[N/A], [N/A], [N/A], [N/A]") == nothing
    assert read_clocks("1980, 88.1, 40, 0x0000000000000001\n")["slowed"] == []


def test_a_machine_without_the_program_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvidia, "uuid_of", lambda device: "GPU-1")
    assert clocks_at_work(lambda: None, CUDA)["clock_mhz"] is None
    assert nvidia.others_gib(CUDA) is None and not nvidia.exclusive(CUDA)


def test_a_program_that_hangs_is_given_up(
    smi: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    smi.with_name("nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(nvidia, "PATIENCE", 0.2)
    assert clocks_at_work(lambda: None, CUDA) == read_clocks(None)
    assert nvidia.others_gib(CUDA) is None
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("nvidia-smi has not answered" in line for line in said)
    assert "clocks.sm" in said[0] and "used_memory" in said[1]


def test_a_card_that_was_slowed_or_changed_its_clock_gives_no_result() -> None:
    assert invalid(GPU, GPU | {"clock_mhz": 1900.0}) == []
    assert invalid(GPU, GPU | {"clock_mhz": 1410.0}) == [
        "changed while measuring: clock_mhz: 1980 and 1410, more than 5% apart"
    ]
    assert invalid(GPU, GPU | {"slowed": ["heat"]}) == ["the GPU was slowed down by heat"]
    assert differences(GPU, GPU | {"clock_mhz": None}) == [], "an older record noted none"
    assert CLOSE_CONDITIONS == {"clock_mhz": 0.05}
    assert {"device_name", "dtype", "attention_decoder", "tf32", "sdpa_kernels", "cuda_libraries"} < set(
        EQUAL_CONDITIONS
    )


def test_a_process_s_own_context_is_not_taken_for_others() -> None:
    """Where the driver tells who holds what, only others count; where not, what one process may need is allowed for."""
    own = {"outside_gib": 3.0}
    assert invalid(GPU | own, GPU | own) == []
    assert invalid(GPU | {"others_gib": None} | own, GPU | own) == []
    much = {"others_gib": None, "outside_gib": OWN_GIB + OTHERS_GIB + 0.5}
    assert "probably others" in invalid(GPU | much, GPU | much)[0]
    assert invalid(GPU, GPU | {"others_gib": 30.0}) == ["others hold 30.0 GiB of the GPU"]


def test_the_kernels_that_may_be_taken_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdrop.models.attention import sdpa_order

    with sdpa_order("efficient"):
        assert sdpa_kernels() == "efficient, math"
    with sdpa_order("cudnn"):
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
        assert sdpa_kernels() == "cudnn, flash, efficient, math, TORCH_CUDNN_SDPA_DEPRIORITIZED=1"
