"""FSDP takes a layer's weights away as soon as it has run: whoever observes it must be before that.

One process is a mesh, too: its weights are sharded tensors all the same.

    pytest tests/training/test_sharding.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from pdrop import FastV, Method, PyramidDrop, SparseVLM, SparseVLMPlus, attach
from pdrop.conformance.families import fresh
from tests.support.cases import HALVES, RAGGED, batch_of


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model: Any, mesh: DeviceMesh) -> None:
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("method", [PyramidDrop(), FastV(several=True), SparseVLM(), SparseVLMPlus()], ids=str)
def test_attached_before_or_after_wrapping_the_loss_is_that_without_it(method: Method, mesh: DeviceMesh) -> None:
    losses = {}
    for order in ("unwrapped", "attached, wrapped", "wrapped, attached"):
        model = fresh("llava", "sdpa", torch.float32).train()
        batch = batch_of("llava", model, RAGGED, "right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :-2] = -100
        if order == "wrapped, attached":
            sharded(model, mesh)
        with attach(model, method, HALVES) as trace:
            if order == "attached, wrapped":
                sharded(model, mesh)
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            assert trace.tokens[-1] < trace.tokens[0]
        losses[order] = float(loss)
    torch.testing.assert_close(losses["attached, wrapped"], losses["unwrapped"])
    torch.testing.assert_close(losses["wrapped, attached"], losses["unwrapped"])
