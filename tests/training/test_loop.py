"""Training under the engine: loss and every gradient against the oracle, and the ways people train.

pytest tests/training/test_loop.py -m "not slow"
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pdrop import PyramidDrop, Schedule, Stage, attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, fresh
from pdrop.conformance.prompts import collate, sample
from tests.support.cases import HALVES, RAGGED, batch_of, kept_of, methods, rule_of
from tests.support.processes import all_done

# per row of RAGGED: one answer, two, one to a prompt without an image, and none at all after an image
SPANS: list[list[tuple[int, int]]] = [[(-2, 0)], [(-4, -3), (-2, 0)], [(-2, 0)], []]
EARLY = Schedule((Stage(1, 0.5), Stage(4, 0.25)))


def train_batch(family: str, model: Any, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    batch = batch_of(family, model, RAGGED, side)
    return batch, oracle.answers_only(batch, SPANS)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Gradients equal, relative to the largest entry of each; at least those of the whole decoder are there."""
    assert got.keys() == want.keys()
    assert sum("language_model" in name for name in want) > 40
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max() + 1e-12, name


@pytest.mark.product(4)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", CORE)
def test_loss_and_gradients_equal_the_oracle(family: str, side: str) -> None:
    model = fresh(family).train()
    batch, labels = train_batch(family, model, side)
    for method in methods(family):
        with attach(model, method, EARLY) as trace:
            out = model(**batch, labels=labels)
            got = gradients(model, out.loss)
        rule, boundaries = rule_of(method), {1: 0.5, 4: 0.25}
        kept = None if rule else kept_of(trace)
        truth = oracle.forward(model, batch, rule, boundaries, method.positions, labels, kept=kept)
        assert kept_of(trace) == truth.kept
        assert len(truth.kept[0][3]) == truth.visual[3], "a row without an answer loses nothing"
        loss = cross_entropy(truth.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        want = gradients(model, loss)
        torch.testing.assert_close(out.loss.double(), loss.double(), rtol=0, atol=1e-5)
        assert_same(got, want, 1e-4)


@pytest.mark.product(4)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", CORE)
def test_gradient_checkpointing_changes_nothing(family: str, use_reentrant: bool) -> None:
    model = fresh(family).train()
    batch, labels = train_batch(family, model)
    for method in methods(family):
        with attach(model, method, EARLY) as trace:
            plain = model(**batch, labels=labels, use_cache=False)
            want, kept = gradients(model, plain.loss), kept_of(trace)
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
            checkpointed = model(**batch, labels=labels, use_cache=False)
            got = gradients(model, checkpointed.loss)
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        assert kept_of(trace) == kept
        assert torch.equal(checkpointed.loss, plain.loss)
        assert_same(got, want, 1e-9)


def test_ranking_carries_no_gradient() -> None:
    """Which tokens stay is a choice, not a function: scores are detached and cost no graph."""
    model = fresh("llava").train()
    batch, labels = train_batch("llava", model)
    with attach(model, PyramidDrop(), HALVES) as trace:
        model(**batch, labels=labels).loss.backward()
    assert not any(row.requires_grad for stage in trace.scores for row in stage)


def test_logits_only_where_there_are_labels() -> None:
    """transformers' own way to skip the lm_head where nothing is asked works around the engine."""
    model = fresh("llava").train()
    batch, labels = train_batch("llava", model, side="left")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    asked = (shifted != -100).any(0).nonzero()[:, 0]
    with attach(model, PyramidDrop(), HALVES):
        full = model(**batch, labels=labels)
        some = dict(shift_labels=shifted[:, asked].contiguous(), logits_to_keep=asked)
        few = model(**batch, labels=labels, **some)
    assert few.logits.shape[1] == len(asked) < full.logits.shape[1]
    torch.testing.assert_close(few.loss, full.loss)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("where", ["on the wrapper", "on the model inside"])
def test_lora(where: str, task: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    model = fresh("llava")
    batch, labels = train_batch("llava", model)
    with attach(model, PyramidDrop(), HALVES):
        want = model(**batch, labels=labels).loss.detach()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task)).train()
    with attach(wrapped if where == "on the wrapper" else model, PyramidDrop(), HALVES) as trace:
        loss = wrapped(**batch, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), want)  # LoRA begins as the identity
        assert trace.prefills == 1
        adapters = [p.grad for name, p in wrapped.named_parameters() if "lora_B" in name]
        assert len(adapters) >= 12 and all(grad is not None and grad.any() for grad in adapters[:12])
        wrapped.eval()
        with torch.no_grad():
            left = batch_of("llava", model, RAGGED)
            assert wrapped.generate(**left, max_new_tokens=3, do_sample=False).shape[0] == len(RAGGED)


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collates samples of `prompts.sample` that carry their own labels."""
    batch = collate("llava", [{key: row[key] for key in row if key != "labels"} for row in rows], "right")
    length = batch["input_ids"].shape[1]
    batch["labels"] = torch.stack(
        [torch.nn.functional.pad(row["labels"], (0, length - len(row["labels"])), value=-100) for row in rows]
    )
    return batch


def test_trainer_with_gradient_accumulation(tmp_path: Path) -> None:
    """Checkpointing on and off, accumulated and in one batch: the Trainer sees the same losses, and it learns."""
    from transformers import Trainer, TrainingArguments

    def losses(checkpointing: bool) -> list[float]:
        model = fresh("llava", dtype=torch.float32)
        rows = []
        for seed in range(8):
            one = sample("llava", model, (3, 4 + seed % 3), seed)
            labels = one["input_ids"].clone()
            labels[:-2] = -100
            rows.append(one | {"labels": labels})
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            logging_steps=1,
            learning_rate=1e-3,
            gradient_checkpointing=checkpointing,
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=padded)
        with attach(model, PyramidDrop(), HALVES) as trace:
            trainer.train()
        assert trace.prefills == 8  # 4 steps of 2 accumulated batches
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    plain = losses(checkpointing=False)
    assert plain == pytest.approx(losses(checkpointing=True), abs=1e-6)
    assert len(plain) == 4
    assert plain[-1] < plain[0]


def two_process_worker(rank: int, folder: str) -> None:
    """One of two processes with a batch of its own: gradients must be the mean of both processes' gradients."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in ("llava", "qwen2_5_vl"):
        for wrap in (data_parallel, fully_sharded):
            for attached in ("before", "after"):
                check_wrapped(family, wrap, attached, rank)
    dist.barrier()
    dist.destroy_process_group()


def data_parallel(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fully_sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_wrapped(family: str, wrap: Any, attached: str, rank: int) -> None:
    """Loss and all gradients of the wrapped model are those of the plain one, averaged over the processes."""
    import torch.distributed as dist

    model = fresh(family, dtype=torch.float32).train()
    rows = [sample(family, model, texts, seed + 10 * rank) for seed, texts in enumerate(((3, 5 + rank), (2, 4, 6)))]
    batch = collate(family, rows, "right")
    labels = oracle.answers_only(batch, [[(-2, 0)], [(-2, 0)]])
    method = PyramidDrop(positions="original")
    with attach(model, method, HALVES):
        loss = model(**batch, labels=labels, use_cache=False).loss
        want = gradients(model, loss)
    for value in want.values():
        dist.all_reduce(value)
        value /= 2
    model.zero_grad()
    with contextlib.ExitStack() as stack:
        if attached == "before":
            stack.enter_context(attach(model, method, HALVES))
        wrapped = wrap(model)
        if attached == "after":
            stack.enter_context(attach(wrapped, method, HALVES))
        got_loss = wrapped(**batch, labels=labels, use_cache=False).loss
        got_loss.backward()
    got = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            got[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    torch.testing.assert_close(got_loss.detach(), loss.detach())
    assert not [name for name in got.keys() - want.keys() if got[name].any()]
    assert_same({name: got[name] for name in want}, want, 1e-4)


@pytest.mark.slow
def test_ddp_and_fsdp2_in_two_processes(tmp_path: Path) -> None:
    """Different lengths in each process, two families, attached before or after wrapping."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    all_done(two_process_worker, (str(tmp_path),), 2)
