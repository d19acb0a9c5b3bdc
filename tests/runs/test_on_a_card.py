"""Whole commands with device=cuda on a pretended card: from settings to record, with the CPU's answers.

pytest tests/runs/test_on_a_card.py
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import first_checks
from pdrop.cli import run, train
from pdrop.record import RunRecord, read_records
from tests.support.command_line import called
from tests.support.conversations import write_conversations
from tests.support.pretended_card import GIB, NAME, card
from tests.support.saved_checkpoints import save_llava

# as an H100's: at its power limit, which is nothing to object to; and a driver that does not say who holds memory
SMI = """#!/bin/sh
case "$*" in
  *clocks.sm*) echo "1980, 650.00, 61, 0x0000000000000004";;
  *compute_mode*) echo "Default";;
esac
"""
TASKS = ["tasks=embedded_chart", "limit=2", "batch_size=2"]
TIMED = ["latency=full", "latency.repeats=1", "latency.warmup=1", "latency.pairs=1", "latency.min_seconds=0"]
TIMED += ["latency.steady=0", "latency.new_tokens=[1,2]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a small model, where a driver's nvidia-smi is in the path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(SMI)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    save_llava(tmp_path / "llava")
    return tmp_path


def model_of(folder: Path) -> list[str]:
    return ["model=folder", "model.name=tiny", f"model.path={folder / 'llava'}"]


def test_a_run_is_scored_and_timed_on_the_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Answers as on the CPU; times by events, under both orders of kernels; memory as torch and the driver report."""
    same = [*model_of(folder), *TASKS, "method=fastv", "schedule.layer=1"]
    code, said = called(run.main, "run.py", [*same, "latency=off", "device=cpu"], monkeypatch, capfd)
    assert code == 0, said
    with monkeypatch.context() as patch, card(patch) as seen:
        code, said = called(run.main, "run.py", [*same, *TIMED, "device=cuda"], monkeypatch, capfd)
        assert code == 0 and not seen.mixed, said
    here, there = sorted(read_records(folder / "results/runs"), key=lambda record: record.spec.device)
    assert (there.spec.device, there.spec.sdpa_kernel, there.environment["device_name"]) == ("cuda", "flash", NAME)
    assert answers(folder, here) == answers(folder, there)
    assert there.cost is not None and there.cost.timing is not None
    timing = there.cost.timing
    assert timing["invalid"] == [] and set(timing["kernels"]) == {"cudnn"} and "upper bound" in str(timing["notes"])
    for moment in timing["conditions"].values():
        assert (moment["device_name"], moment["clock_mhz"], moment["outside_gib"]) == (NAME, 1980.0, 1.0)
        assert moment["at_power_limit"] and moment["slowed"] == [] and moment["others_gib"] is None
        assert moment["sdpa_kernels"] == "flash, efficient, math", "before and after those of cuDNN were timed"
        assert "sm_90" in moment["cuda_libraries"]
    assert timing["memory"]["this"]["prefill"] == {"allocated": GIB, "reserved": GIB}
    assert {"prefill", "decode", "vision", "selection", "preprocess"} <= set(timing["stages"])
    assert timing["end_to_end"]["2"]["this"]["median"] >= timing["stages"]["prefill"]["this"]["median"] > 0


def answers(folder: Path, record: RunRecord) -> list[Any]:
    """What was answered, and which tokens were kept."""
    lines = (folder / "results/runs" / record.spec.folder / "answers.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 2
    return sorted([one["text"], one["kept"], one["answer_tokens"]] for one in found)


def test_a_training_learns_on_the_card_as_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 under autocast, every layer twice: the same losses; peaks by torch; weights are saved."""
    data = write_conversations(folder)
    same = [*model_of(folder), "train=embedded", f"train.data={data}", f"train.images={folder / 'pictures'}"]
    same += ["train.format=vicuna_v1", "train.steps=2"]
    same += ["train.batch_size=4", "train.micro_batch=2", "train.bf16=true", "train.gradient_checkpointing=true"]
    same += ["method=pyramiddrop", "schedule.layers=[2]"]
    code, said = called(train.main, "train.py", [*same, "device=cpu", "output=here"], monkeypatch, capfd)
    assert code == 0, said
    with monkeypatch.context() as patch, card(patch) as seen:
        code, said = called(train.main, "train.py", [*same, "device=cuda", "output=there"], monkeypatch, capfd)
        assert code == 0 and not seen.mixed, said
    (record,) = (json.loads(path.read_text()) for path in Path("there").glob("*/training.json"))
    assert record["status"] == "done" and record["cost"]["peak_memory_bytes"] == 2 * GIB
    assert record["environment"]["device_name"] == NAME and record["spec"]["sdpa_kernel"] == "flash"
    losses = []
    for place in ("here", "there"):
        (curve,) = Path(place).glob("*/curve.csv")
        losses.append([float(row["loss"]) for row in csv.DictReader(curve.open())])
        assert list(Path(place).glob("*/model/model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3), "other kernels round otherwise"


class SmallCard(first_checks.Card):
    """The dry run's model, on the card."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device, self.name, self.rounds = True, torch.device("cuda"), "llava_1_5_7b", 1
        self.model = self.build(self.name)
        self.one = self.inputs(self.model, self.name)

    def build(self, name: str, backend: str = "sdpa") -> Any:
        return super().build(name, backend).to("cuda")


@torch.no_grad()
def test_first_checks_count_waits_alone_and_take_the_kernels_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No wait is torch's remark that its count is a prototype, nor another warning."""
    with monkeypatch.context() as patch, card(patch):
        patch.setattr(first_checks, "Card", SmallCard)
        assert first_checks.main(["--only", "7", "--output", str(tmp_path)]) == 0
        (path,) = tmp_path.glob("first_checks-*.json")
        assert json.loads(path.read_text())["conditions"]["sdpa_kernels"] == "flash, efficient, math"
        number = first_checks.counted(lambda: torch.ones(1, device="cuda").item(), on_gpu=True)
        assert sum(number.values()) == 1
        found, holds = first_checks.waits(SmallCard(False), "PyramidDrop")
        assert holds and found["more"] == [1, 0], found
        assert first_checks.backends(SmallCard(False), "flash_attention_2") == (
            "the package flash-attn is not installed",
            None,
        )

        def full(tiny: bool) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB")

        patch.setattr(first_checks, "Card", full)
        with pytest.raises(SystemExit):
            first_checks.main([])
        assert "CUDA out of memory" in capsys.readouterr().err
