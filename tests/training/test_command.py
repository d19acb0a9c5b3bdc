"""train.py as a user calls it: recipes on tiny checkpoints in the real format, killed and resumed, skipped, refused."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from pdrop.cli import train
from pdrop.cli.compose import CONF, choices
from pdrop.models.checkpoint import load
from pdrop.training.loop import LossCurve, TrainingFailed
from pdrop.training.parts import part_of
from pdrop.training.record import TrainingRecord
from pdrop.training.refusals import check_parallel, refuse_data_parallel
from pdrop.training.start import Start, begin
from tests.models.test_attention import enabled
from tests.support.command_line import QUICK_TRAINING as QUICK
from tests.support.command_line import curve
from tests.support.conversations import captions, records, write_conversations
from tests.support.processes import all_done, begun
from tests.support.saved_checkpoints import save_llava, save_llava_next


def changed(folder: Path, base: Path) -> dict[str, int]:
    """How many weights of each part differ from the checkpoint's."""
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model/model.safetensors")
    assert before.keys() == after.keys()
    counts = dict.fromkeys(("vision_tower", "projector", "language_model"), 0)
    for name, value in before.items():
        counts[part_of(name)] += not torch.equal(value, after[name])
    return counts


def test_finetune_leaves_a_model_a_curve_and_a_truthful_record(command, tiny, data, monkeypatch) -> None:
    orders: set[tuple[bool, ...]] = set()  # attention kernels inside the layers, as if this were CUDA
    monkeypatch.setattr("pdrop.models.attention.resolved", lambda *_: "math")

    def forward(*given: Any, run: Any = LlamaMLP.forward) -> Any:
        if torch.is_grad_enabled():  # the engine probes a layer when it is attached
            orders.add(enabled())
        return run(*given)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    arguments = [*QUICK, f"model.path={tiny}", *data, "train=llava_1_5_finetune", "train.steps=3"]
    code, said_, (folder,) = command(*arguments)
    assert code == 0, said_
    record = TrainingRecord.read(folder)
    spec, cost = record.spec, record.cost
    assert (record.status, record.steps_done, record.sessions, record.error) == ("done", 3, 1, None)
    assert (spec.recipe, spec.model, spec.method, spec.schedule) == (
        "llava_1_5_finetune",
        "tiny",
        "pyramiddrop",
        "1:0.5 2:0.25",
    )
    assert (spec.format, spec.image_mode, spec.steps, spec.records) == ("vicuna_v1", "pad", 3, 11)
    assert spec.sdpa_kernel == "math" and orders == {(False, False, False, True)} != {enabled()}
    assert cost is not None and cost.visual_tokens_per_layer[0] == pytest.approx(cost.visual_tokens)
    assert 0 < cost.step_flops < cost.step_flops_unpruned
    assert cost.step_wall_s > cost.data_wall_s > 0 and cost.step_cpu_s > 0 and cost.tokens_per_s > 0
    rows = curve(folder)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert record.final_loss == pytest.approx(float(rows[-1]["loss"]))
    assert cost.wall_s == pytest.approx(sum(float(row["step_wall_s"]) for row in rows))
    events = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert all(name in events for name in (b"train/loss", b"train/learning_rate", b"tokens_per_s", b"step_wall_s"))
    parts = changed(folder, tiny)
    assert parts["vision_tower"] == 0 and parts["projector"] == 4 and parts["language_model"] > 30
    assert not list(folder.glob("checkpoint-*")) and not list(folder.rglob("*.bin"))
    trained = load(str(folder / "model"), name="trained")
    assert trained.model.config.get_text_config().use_cache is True
    assert trained.processor.chat_template
    assert "run.py model=folder" in said_

    started = record.started_at
    code, said_, _ = command(*arguments, "ratio=0.5", "train.save_steps=7")
    assert code == 0 and "done already" in said_, "how often to save does not change what comes out"
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/complete").write_text("of another training")
    code, said_, _ = command(*arguments, "force=true")
    assert code == 0 and "done already" not in said_ and TrainingRecord.read(folder).started_at >= started
    assert not (folder / "checkpoint-2").exists()


def test_pretraining_moves_the_projector_alone(command, tiny, tmp_path) -> None:
    path = write_conversations(tmp_path / "captions", captions(tmp_path / "captions"))
    code, said_, (folder,) = command(
        *QUICK,
        f"model.path={tiny}",
        "train=llava_1_5_pretrain",
        f"train.data={path}",
        f"train.images={path.parent / 'pictures'}",
        "train.epochs=2",
    )
    assert code == 0, said_
    assert changed(folder, tiny) == {"vision_tower": 0, "projector": 4, "language_model": 0}
    assert TrainingRecord.read(folder).spec.steps == 2, "two epochs of 4 records in steps of 4"


def test_llava_next_trains_its_tower_at_a_rate_of_its_own(command, data, tmp_path) -> None:
    base = save_llava_next(tmp_path / "next")
    code, said_, (folder,) = command(
        *QUICK,
        f"model.path={base}",
        *data,
        "train=llava_next_finetune",
        "train.steps=2",
        "train.rates.vision_tower=1e-3",
    )
    assert code == 0, said_
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model/model.safetensors")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    # AdamW's first steps are as long as the learning rate
    tower = [value for name, value in moved.items() if part_of(name) == "vision_tower" and value]
    decoder = [value for name, value in moved.items() if part_of(name) == "language_model" and value]
    assert max(tower) < 3e-3 < max(decoder) < 3e-2
    assert moved["image_newline"] > 0
    record = TrainingRecord.read(folder)
    assert record.cost.visual_tokens > 30, "tiles and newlines"


def test_lora_trains_adapters_and_the_projector(command, tiny, data) -> None:
    arguments = [
        *QUICK,
        f"model.path={tiny}",
        *data,
        "train=llava_1_5_finetune",
        "train.lora={r:2,alpha:4,dropout:0.0}",
    ]
    code, said_, (folder,) = command(*arguments, "train.steps=2")
    assert code == 0, said_
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter) and any("multi_modal_projector" in name for name in adapter)
    parts = changed(folder, tiny)
    assert parts["vision_tower"] == 0 and parts["projector"] == 4
    assert parts["language_model"] == 4 * 7, "the linear layers of four decoder layers, nothing else"
    code, said_, _ = command(*arguments, "train.rates.vision_tower=1e-5")
    assert code == 1 and "set rates.vision_tower=0" in said_


def test_a_killed_training_goes_on_along_the_same_curve(command, tiny, data, tmp_path) -> None:
    arguments = [*QUICK, f"model.path={tiny}", *data, "train=embedded", "train.format=vicuna_v1", "train.steps=24"]
    arguments += ["train.save_steps=4", "train.args.adam_beta2=0.98"]
    child = begun(train.main, tmp_path, ["train.py", *arguments, "output=killed"])
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("killed/*/checkpoint-*/complete")):
        assert child.is_alive() and time.monotonic() < deadline, (tmp_path / "said.txt").read_text()[-2000:]
        time.sleep(0.01)
    child.kill()
    child.join()
    (killed,) = (tmp_path / "killed").iterdir()
    assert json.loads((killed / "training.json").read_text())["status"] == "running"
    reached = len(curve(killed))
    assert 4 <= reached < 24
    (killed / "checkpoint-23").mkdir()  # as if killed while it saved

    code, said_, _ = command(*arguments, "output=killed")
    assert code == 0, said_
    assert "checkpoint-23 was not finished and is removed" in said_
    code, said_, (whole,) = command(*arguments)
    assert code == 0, said_
    assert whole.name == killed.name
    same = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")
    resumed, straight = ([[row[name] for name in same] for row in curve(folder)] for folder in (killed, whole))
    assert resumed == straight and len(straight) == 24
    assert float(straight[-1][2]) < float(straight[0][2]), "and it learns"
    records = [TrainingRecord.read(folder) for folder in (killed, whole)]
    assert [record.sessions for record in records] == [2, 1]
    assert records[0].final_loss == records[1].final_loss
    costs = [(record.cost.text_tokens, record.cost.visual_tokens, record.cost.step_flops) for record in records]
    assert costs[0] == costs[1], "what the first session saw counts, too"
    one, other = (load_file(folder / "model/model.safetensors") for folder in (killed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_sweep_trains_each_method_and_ratios_of_none_are_one(command, tiny, data) -> None:
    arguments = [*QUICK[:2], *QUICK[3:], f"model.path={tiny}", *data, "train=embedded", "train.steps=1"]
    code, said_, folders = command("-m", *arguments, "train.format=vicuna_v1", "method=none,pyramiddrop,random")
    assert code == 0, said_
    assert sorted(TrainingRecord.read(folder).spec.method for folder in folders) == ["none", "pyramiddrop", "random"]
    none = next(TrainingRecord.read(folder) for folder in folders if "-none-" in folder.name)
    assert none.cost.step_flops == none.cost.step_flops_unpruned
    code, said_, after = command("-m", *arguments, "train.format=vicuna_v1", "method=none", "ratio=0.3,0.6")
    assert code == 0 and said_.count("done already") == 2 and len(after) == 3


def test_a_loss_that_is_no_number_stops_and_is_recorded(command, tiny, data) -> None:
    code, said_, (folder,) = command(
        *QUICK,
        f"model.path={tiny}",
        *data,
        "train=llava_1_5_finetune",
        "train.steps=9",
        "train.learning_rate=1e30",
        "train.max_grad_norm=0",
        "train.warmup=0",
    )
    assert code == 1 and "lower train.learning_rate" in said_
    record = TrainingRecord.read(folder)
    assert record.status == "failed" and "TrainingFailed" in record.error and not (folder / "model").exists()


REFUSED = [
    (["train.batch_size=6", "train.micro_batch=4"], "a step of batch_size=6 records cannot be made of batches"),
    (["train.rates={vision_tower:0,projector:0,language_model:0}"], "nothing is left to train"),
    (["train.learning_rate=-1"], "a learning rate is 0 (frozen) or more"),
    (["train.args.bf16=true"], "train.args sets bf16, which train's own settings decide"),
    (["train.args.nonsense=1"], "TrainingArguments refuse this"),
    (["train.scheduler=sideways"], "TrainingArguments refuse this"),
    (["train.format=alpaca"], "train.format is vicuna_v1, plain or chat, not 'alpaca'"),
    (["train.overlong=cut"], "train.overlong is stop or skip, not 'cut'"),
    (["train.image_mode=stretch"], "train.image_mode is crop or pad, not 'stretch'"),
    (["train.steps=0"], "train.steps is a number from 1 on"),
    (["parallel=ddp"], "torchrun --nproc_per_node"),
    (["parallel=fsdp"], "parallel=fsdp needs device=cuda"),
    (["train.lora={r:8,alpha:8}", "parallel=deepspeed_zero3"], "which needs whole weights: parallel=ddp"),
    (["train.lora={r:8}"], "train.lora needs r and alpha"),
    (["train.lora='{r:8,alpha:8}'"], "in quotes"),
    (["train.args.num_train_epochs=5"], "train.args.num_train_epochs: set train.epochs"),
    (["train.args.label_smoothing_factor=0.1"], "train.args.label_smoothing_factor: the Trainer would smooth labels"),
    (["device=cuda:1"], "choose a GPU with CUDA_VISIBLE_DEVICES=1 and device=cuda"),
    (["layers=null", "method=downsample"], "method=downsample makes pictures smaller"),
    (["method=sparsevlm_v1"], "sparsevlm_v1 finds its counts prompt by prompt"),
    (["train.lora={rank:8}"], "train.lora has r, alpha and dropout, not rank"),
    (["layers=[9]"], "has a boundary at layer 9"),
    (["train.data=nowhere.json"], "nowhere.json: no such file; train.data is"),
    (["train.data=???"], "train.data has no value and needs one: train.data=FILE"),
    (["mehtod=none"], "there is no dial 'mehtod', did you mean method?"),
]


@pytest.mark.product(6)
@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[r[0][-1] for r in REFUSED])
def test_what_cannot_be_is_one_line(arguments, says, command, tiny, data) -> None:
    code, said_, _ = command(
        *QUICK, f"model.path={tiny}", *data, "train=embedded", "train.format=vicuna_v1", *arguments
    )
    assert code == 1
    line = next(line for line in said_.splitlines() if line.startswith("error: "))
    assert says in line


def composed(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(overrides))


# facts of the papers and their scripts: records a step, at once, rates, words at most
PAPER = {
    "llava_1_5_pretrain": (256, 32, {"vision_tower": 0, "projector": 1e-3, "language_model": 0}, 2048, "plain"),
    "llava_1_5_finetune": (128, 16, {"vision_tower": 0, "projector": 2e-5, "language_model": 2e-5}, 2048, "vicuna_v1"),
    "llava_next_pretrain": (256, 8, {"vision_tower": 0, "projector": 1e-3, "language_model": 0}, 4096, "plain"),
    "llava_next_finetune": (
        128,
        4,
        {"vision_tower": 2e-6, "projector": 2e-5, "language_model": 2e-5},
        4096,
        "vicuna_v1",
    ),
}


@pytest.mark.parametrize("recipe", PAPER)
def test_recipes_are_the_papers(recipe) -> None:
    from pdrop.training.parts import resolve

    config = composed(f"train={recipe}", "train.data=x.json").train
    rates = resolve(config.learning_rate, **config.rates)
    assert (config.batch_size, config.micro_batch, vars(rates), config.max_length, config.format) == PAPER[recipe]
    assert (config.epochs, config.scheduler, config.warmup, config.weight_decay) == (1, "cosine", 0.03, 0)
    assert config.bf16 and config.tf32 and config.gradient_checkpointing
    assert config.name == recipe


def test_every_choice_is_named_after_its_file() -> None:
    assert {composed(f"train={name}", "train.data=x.json").train.name for name in choices("train")} == {
        *PAPER,
        "embedded",
    }
    for name in choices("parallel"):
        assert composed(f"parallel={name}").parallel.name == name


@pytest.mark.parametrize("name", [n for n in choices("parallel") if "deepspeed" in n])
def test_deepspeed_choices_parse(name) -> None:
    """DeepSpeed itself is not installed here; accelerate reads its configuration without it."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(composed(f"parallel={name}").parallel.args)["deepspeed"]
    read = HfDeepSpeedConfig(config)
    assert read._stage == int(name[-1]) and not read.is_offload()
    assert read.get_value("train_batch_size") == "auto" and read.get_value("gradient_accumulation_steps") == "auto"


@pytest.mark.product(1)
@pytest.mark.parametrize("recipe", ["llava_1_5_finetune with LoRA", "llava_next_finetune"])
def test_other_kinds_resume_too(recipe, command, data, tmp_path, monkeypatch) -> None:
    """Adapters and tiles: broken off after a checkpoint, the curve and the weights are those of one go."""
    lora = "LoRA" in recipe
    base = (save_llava if lora else save_llava_next)(tmp_path / "base")
    arguments = [
        *QUICK,
        f"model.path={base}",
        *data,
        f"train={recipe.split()[0]}",
        "train.steps=5",
        "train.save_steps=2",
    ]
    arguments += ["train.lora={r:2,alpha:4}"] if lora else []
    went = LossCurve.on_step_end

    def breaks(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        went(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(LossCurve, "on_step_end", breaks)
        code, said_, (folder,) = command(*arguments)
    assert code == 130 and "resumes from the last checkpoint" in said_
    assert TrainingRecord.read(folder).status == "running" and len(curve(folder)) == 3
    code, said_, _ = command(*arguments)
    assert code == 0, said_
    code, said_, _ = command(*arguments, "output=whole")
    assert code == 0, said_
    whole = tmp_path / "whole" / folder.name
    losses = [[float(row["loss"]) for row in curve(f)] for f in (folder, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    one, other = (load_file(f / "model/model.safetensors") for f in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pretraining_begins_with_parts_that_have_not_met(tiny, tmp_path) -> None:
    import transformers

    from tests.support.saved_checkpoints import config

    text, tower = config().text_config, config().vision_config
    text.vocab_size -= 3  # LLaVA adds tokens to its language model's
    torch.manual_seed(5)
    words = transformers.LlamaForCausalLM(text)
    words.save_pretrained(tmp_path / "words")
    eyes = transformers.CLIPModel(transformers.CLIPConfig(text_config=None, vision_config=tower.to_dict()))
    eyes.save_pretrained(tmp_path / "eyes")
    checkpoint = load(str(tiny), name="tiny")
    before = {name: weight.detach().clone() for name, weight in checkpoint.model.named_parameters()}
    taken = begin(checkpoint, Start(str(tmp_path / "words"), str(tmp_path / "eyes"), new_projector=True), seed=0)
    assert set(taken) == {"language_model", "vision_tower", "projector"}
    model = checkpoint.model
    head = model.lm_head.weight
    assert torch.equal(head[:-3], words.lm_head.weight) and torch.equal(head[-3:], before["lm_head.weight"][-3:])
    for name, weight in words.model.layers.named_parameters():
        assert torch.equal(weight, model.get_decoder().layers.get_parameter(name))
    for name, weight in eyes.vision_model.named_parameters():
        assert torch.equal(weight, model.model.vision_tower.get_parameter(name))
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(model.get_parameter(projector), before[projector])
    again = load(str(tiny), name="tiny")
    begin(again, Start(new_projector=True), seed=0)
    assert torch.equal(model.get_parameter(projector), again.model.get_parameter(projector))
    text.hidden_size, text.head_dim = 64, 16
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"its weight embed_tokens.weight is \[.*, 64\], the checkpoint's \[.*, 32\]"):
        begin(checkpoint, Start(language_model=str(tmp_path / "wide")), seed=0)


def one_process(rank: int, count: int, kind: str, folder: str, port: int, arguments: list[str]) -> None:
    """A process of `count` as torchrun starts it."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv = ["train.py", *arguments, f"parallel={kind}", f"output={kind}"]
    train.main()


@pytest.mark.product(1)
@pytest.mark.slow
@pytest.mark.parametrize(("count", "kind"), [(1, "none"), (2, "ddp")])
def test_processes_of_torchrun_train_the_same_model(count, kind, command, tiny, tmp_path) -> None:
    """DDP, gloo on the CPU, a batch of text alone among them: one process's losses and model. Of torchrun a single
    process is DDP too."""
    listed = records(tmp_path / "pictures")[3:]  # five with images, three without: the second step is of both
    data = [f"train.data={write_conversations(tmp_path, listed)}", f"train.images={tmp_path / 'pictures'}"]
    arguments = [*QUICK, f"model.path={tiny}", *data, "train=llava_1_5_finetune", "train.steps=4"]
    arguments += ["train.rates.vision_tower=1e-4"]  # whose last layer LLaVA does not read: it gets no gradient
    code, said_, (alone,) = command(*arguments, "train.micro_batch=4")
    assert code == 0, said_
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    all_done(one_process, (count, kind, str(tmp_path), port, arguments), count)
    weights = load_file(alone / "model/model.safetensors")
    (folder,) = (tmp_path / kind).iterdir()
    record = TrainingRecord.read(folder)
    assert (record.status, record.spec.parallel, record.spec.processes) == ("done", kind, count)
    whole = TrainingRecord.read(alone).cost
    assert record.cost is not None and whole is not None
    assert (record.cost.text_tokens, record.cost.visual_tokens) == (whole.text_tokens, whole.visual_tokens)
    for ours, theirs in zip(curve(folder), curve(alone), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), abs=2e-3)
    for name, weight in load_file(folder / "model/model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=5e-3)


def test_bfloat16_matrix_products_leave_the_losses_where_they_are(command, tiny, data) -> None:
    losses = []
    for bf16 in ("false", "true"):
        code, said_, folders = command(
            *QUICK, f"model.path={tiny}", *data, "train=llava_1_5_finetune", "train.steps=3", f"train.bf16={bf16}"
        )
        assert code == 0, said_
        losses.append([float(row["loss"]) for row in curve(folders[-1])])
        assert all(
            weight.dtype == torch.float32 for weight in load_file(folders[-1] / "model/model.safetensors").values()
        )
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)


def test_what_accelerate_dropped_without_a_word_is_refused() -> None:
    args = SimpleNamespace(device=torch.device("cpu"))
    whole = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False, args=args)
    sharded = SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False, args=args)
    for trainer, asked in ((whole, "none"), (whole, "ddp"), (sharded, "fsdp")):
        check_parallel(trainer, asked, "cpu")
    for trainer, asked, device, said in (
        (whole, "fsdp", "cpu", "parallel=fsdp was asked for, but accelerate has fsdp off"),
        (whole, "deepspeed_zero3", "cpu", "parallel=deepspeed_zero3 was asked for, but accelerate has deepspeed off"),
        (sharded, "ddp", "cpu", "parallel=ddp was asked for, but accelerate has fsdp on"),
        (whole, "ddp", "cuda", "device=cuda was asked for, but accelerate took cpu: set device=cpu"),
    ):
        with pytest.raises(TrainingFailed, match=said):
            check_parallel(trainer, asked, device)


def test_one_process_that_sees_several_gpus_is_refused() -> None:
    refuse_data_parallel(SimpleNamespace(n_gpu=1))
    with pytest.raises(ValueError, match=r"one process sees 8 GPUs: CUDA_VISIBLE_DEVICES=0 .* --nproc_per_node=8"):
        refuse_data_parallel(SimpleNamespace(n_gpu=8))


def test_deepspeed_of_several_processes_on_the_cpu_is_refused(command, tiny, data, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = ["train=embedded", "train.format=vicuna_v1", "train.micro_batch=2", "parallel=deepspeed_zero2"]
    code, said_, _ = command(*QUICK, f"model.path={tiny}", *data, *recipe)
    assert code == 1 and "parallel=deepspeed_zero2 on the CPU is for one process" in said_
