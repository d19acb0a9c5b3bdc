"""Where trainings end, go on and are cut up: the last step, several trainings in a process, what FSDP and ZeRO-3 need.

pytest tests/training/test_edges.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file

from pdrop import pyramid
from pdrop.conformance.families import fresh
from pdrop.conformance.prompts import collate, sample
from pdrop.models.checkpoint import load
from pdrop.schedule import Schedule
from pdrop.timing.memory import give_back, peak_since, restart_peak
from pdrop.training import job
from pdrop.training.arguments import arguments_of
from pdrop.training.batches import Collator
from pdrop.training.conversations import Conversations
from pdrop.training.encode import Encoder
from pdrop.training.parts import Rates, layers_of, prepare
from pdrop.training.record import TrainingRecord
from pdrop.training.refusals import refuse_uneven
from tests.support.command_line import QUICK_TRAINING as QUICK
from tests.support.command_line import curve
from tests.support.conversations import records, write_conversations
from tests.support.saved_checkpoints import save_qwen2_5_vl

Command = Callable[..., tuple[int, str, list[Path]]]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_fsdp_is_told_the_layers_that_there_are(family: str, tmp_path: Path) -> None:
    model = fresh(family)
    settings: Any = SimpleNamespace(
        micro_batch=1, accumulate=1, rates=Rates(0, 1e-3, 1e-3), bf16=False, tf32=False, device="cpu", parallel="fsdp",
        seed=0, save_steps=2, log_steps=1, workers=0, arguments={},
        parallel_arguments={"fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    )  # fmt: skip
    config = arguments_of(settings, tmp_path, 2, layers_of(model)).fsdp_config
    named = config["transformer_layer_cls_to_wrap"]
    assert type(model.get_decoder().layers[0]).__name__ in named
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=config["auto_wrap_policy"], transformer_cls_names_to_wrap=named
    )
    plugin.set_auto_wrap_policy(model)
    assert type(model.get_decoder().layers[0]) in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    if family == "llava":  # CLIP names a text model's embeddings, which a tower lacks
        alone = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
        with pytest.raises(ValueError, match="Could not find the transformer layer class"):
            alone.set_auto_wrap_policy(model)


FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]


@pytest.mark.parametrize(("family", "place"), [*((f, None) for f in FAMILIES), ("llava", -2), ("llava_next", 1)])
def test_what_is_trained_is_what_gets_a_gradient(family: str, place: int | None) -> None:
    model = fresh(family, dtype=torch.float32).train()
    if place is not None:
        model.config.vision_feature_layer = place
    batch = collate(family, [sample(family, model, (3, 5))], "right")
    model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    prepare(model, Rates(1e-3, 1e-3, 1e-3), None)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == reached
    assert any("vision" in name or "visual" in name for name in reached)


def test_a_training_that_broke_behind_its_last_step_takes_no_step_more(
    command: Command, tiny: Path, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    same = [*QUICK, f"model.path={tiny}", *data, "train=llava_1_5_finetune", "train.scheduler=constant"]
    same += ["train.steps=2"]  # of the three of an epoch
    code, said, _ = command(*same, "output=straight")
    assert code == 0, said

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job, "save", full)
        code, said, _ = command(*same, "output=broken")
        assert code == 1 and "no space left on device" in said
    code, said, _ = command(*same, "output=broken")
    assert code == 0, said
    (straight,), (broken,) = (list((tmp_path / name).iterdir()) for name in ("straight", "broken"))
    assert len(curve(broken)) == 2 and TrainingRecord.read(broken).steps_done == 2
    costs = [TrainingRecord.read(folder).cost for folder in (straight, broken)]
    assert costs[0] is not None and costs[1] is not None
    assert costs[1].visual_tokens == costs[0].visual_tokens and costs[1].text_tokens == costs[0].text_tokens
    weights = load_file(straight / "model/model.safetensors")
    for name, weight in load_file(broken / "model/model.safetensors").items():
        assert torch.equal(weight, weights[name]), name


def test_the_last_step_is_logged_however_seldom_others_are(command: Command, tiny: Path, data: list[str]) -> None:
    same = [*QUICK, f"model.path={tiny}", *data, "train=embedded", "train.format=vicuna_v1", "train.steps=3"]
    code, said, (folder,) = command(*same, "train.log_steps=2", "train.save_steps=2")
    assert code == 0, said
    assert [row["step"] for row in curve(folder)] == ["2", "3"]
    code, said, _ = command(*same, "train.log_steps=10", "train.save_steps=10", "seed=1")
    assert code == 0, said
    code, said, _ = command(*same, "train.log_steps=3", "train.save_steps=4")
    assert code == 1 and "train.save_steps=4 must be a multiple of train.log_steps=3" in said
    code, said, _ = command(*same, "train.args.save_total_limit=1")
    assert code == 1 and "train.args.save_total_limit is at least 2, not 1" in said


def test_qwen_s_losses_are_means_over_answer_tokens_too(command: Command, tmp_path: Path) -> None:
    """Its class says that it takes no number of them; a mean of batch means would differ between these two."""
    path = save_qwen2_5_vl(tmp_path / "qwen")
    listed = records(tmp_path / "pictures")
    same = [*QUICK, f"model.path={path}", f"train.data={write_conversations(tmp_path, listed)}", "layers=[1]"]
    same += [
        "positions=original",
        f"train.images={tmp_path / 'pictures'}",
        "train=embedded",
        "train.format=vicuna_v1",
        "train.steps=1",
    ]
    losses = []
    for size in (4, 1):
        code, said, folders = command(*same, f"train.micro_batch={size}")
        assert code == 0, said
        losses.append(float(curve(folders[-1])[0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_qwen_s_batch_of_text_alone_can_carry_an_image(tmp_path: Path) -> None:
    checkpoint = load(str(save_qwen2_5_vl(tmp_path / "qwen")), name="qwen", dtype="float32")
    encoder = Encoder(checkpoint.processor, "vicuna_v1")
    listed = Conversations(write_conversations(tmp_path, records(tmp_path / "pictures")), tmp_path / "pictures")
    rows = [encoder(listed[index]) for index in range(len(listed)) if listed.lengths[index] < 0]
    plain, carried = Collator(encoder, 0)(rows), Collator(encoder, 0, always_image=True)(rows)
    assert carried["mm_token_type_ids"].shape == carried["input_ids"].shape and not carried["mm_token_type_ids"].any()
    with torch.no_grad():
        losses = [float(checkpoint.model(**batch, use_cache=False).loss) for batch in (plain, carried)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_an_image_that_cannot_be_read_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    listed = records(tmp_path / "pictures")
    broken = tmp_path / "pictures" / listed[2]["image"]
    huge = Image.new("1", (14_000, 14_000))  # more pixels than Pillow opens
    for spoil in (lambda: broken.write_bytes(b"<html>not found</html>"), lambda: huge.save(broken, "PNG")):
        spoil()
        with pytest.raises(ValueError, match=rf"record 2.*{broken.name} cannot be read.*leave the record out"):
            Conversations(write_conversations(tmp_path, listed), tmp_path / "pictures")


def test_zero_3_on_several_processes_does_not_drop_beside_text_alone() -> None:
    several: Any = SimpleNamespace(parallel="deepspeed_zero3", processes=2)
    with pytest.raises(ValueError, match=r"parallel=deepspeed_zero3 cannot drop tokens .* as 2 are here"):
        refuse_uneven(several, pyramid(12), [5, -3, 7, -1])
    refuse_uneven(several, pyramid(12), [5, 7])
    refuse_uneven(several, Schedule(), [5, -3])
    for parallel, processes in (("deepspeed_zero3", 1), ("deepspeed_zero2", 2), ("fsdp", 2)):
        refuse_uneven(SimpleNamespace(parallel=parallel, processes=processes), pyramid(12), [5, -3])  # type: ignore[arg-type]


def test_a_peak_is_that_since_it_was_asked_for() -> None:
    if peak_since(CPU) is None:
        pytest.skip("the system does not tell")

    def growth() -> int:
        """What 50 MB add to the peak, in bytes, when 150 MB were held before it was asked for."""
        held = torch.ones(37_500_000)
        del held
        give_back()  # else what earlier tests left may be freed meanwhile
        restart_peak(CPU)
        before = peak_since(CPU)
        held = torch.ones(12_500_000)
        after = peak_since(CPU)
        del held
        assert before is not None and after is not None
        return after - before

    # short of memory, the system may take other pages of the process away meanwhile: it is not asked once
    assert 30e6 < median(growth() for _ in range(3)) < 100e6, "50 MB, not the 150 of before"
