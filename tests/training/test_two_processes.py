"""FSDP over two processes: attached before or after wrapping, losses and gradients are those of one process.

pytest tests/training/test_two_processes.py
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pdrop import FastV, Method, PyramidDrop, SparseVLM, SparseVLMPlus, attach
from pdrop.conformance.families import fresh
from tests.support.cases import HALVES, RAGGED, batch_of

WATCHED = "model.language_model.layers.1.self_attn.q_proj.weight"  # of a layer that methods observe


def step(method: Method, order: str, mesh: Any) -> tuple[float, torch.Tensor]:
    """Loss and a gradient, on the same prompts in each process."""
    model = fresh("llava", "sdpa", torch.float32).train()
    batch = batch_of("llava", model, RAGGED, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100

    def wrap() -> None:
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if order == "wrapped, attached":
        wrap()
    with attach(model, method, HALVES) as trace:
        if order == "attached, wrapped":
            wrap()
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        assert trace.tokens[-1] < trace.tokens[0]
    gradient: Any = model.get_parameter(WATCHED).grad
    return float(loss), gradient.full_tensor() if mesh is not None and order != "unwrapped" else gradient


def process(rank: int, folder: str, method: Method) -> None:
    """One of two; writes what it found, or why it failed."""
    try:
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        found: Any = {order: step(method, order, mesh) for order in ("attached, wrapped", "wrapped, attached")}
    except BaseException:
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}")
    os._exit(0)  # what the test's process would do at its end is not this one's


@pytest.mark.product(1)
@pytest.mark.parametrize("method", [FastV(several=True), PyramidDrop(), SparseVLM(), SparseVLMPlus()], ids=str)
def test_the_loss_is_that_of_one_process(method: Method, tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # nothing has to be imported again
    both = [forked.Process(target=process, args=(rank, str(tmp_path), method)) for rank in range(2)]
    for one in both:
        one.start()
    loss, gradient = step(method, "unwrapped", None)
    for rank, one in enumerate(both):
        one.join(120)
        assert not one.is_alive(), "it waits for the other"
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert not isinstance(found, str), found
        for got, slope in found.values():
            assert got == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(slope, gradient, rtol=1e-4, atol=1e-6)
