"""Under autocast a model runs in half precision on float32 weights, as the recipes train; ranking stays float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pdrop import FastV, Method, PyramidDrop, SparseVLM, SparseVLMPlus, attach
from pdrop.conformance.families import fresh
from tests.support.cases import HALVES, RAGGED, batch_of

METHODS: list[Method] = [PyramidDrop(), FastV(several=True), SparseVLM(), SparseVLM(recycle=0.0), SparseVLMPlus()]


class Products(TorchDispatchMode):
    """Notes the dtypes of what is multiplied under code of the engine's and the methods' ranking."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.bmm:
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_training_under_autocast_ranks_in_float32(method: Method, dtype: torch.dtype) -> None:
    model = fresh("llava", "sdpa", torch.float32).train()
    batch = batch_of("llava", model, RAGGED, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    with Products() as products, torch.autocast("cpu", dtype=dtype), attach(model, method, HALVES) as trace:
        loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    assert products.dtypes == {torch.float32}, "sdpa and linear layers are no bmm: what is one ranks or merges"
    scores = [row for boundary in trace.scores for row in boundary]
    assert scores and all(row.dtype == torch.float32 and bool(row.isfinite().all()) for row in scores)
    assert not bool(torch.get_autocast_dtype("cpu") == dtype and torch.is_autocast_enabled("cpu"))


def test_what_the_model_itself_computes_runs_as_it_does() -> None:
    """Queries and keys are the model's: rounded as it rounds them, without a cache and with one."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch, seen = batch_of("llava", model, RAGGED), []
    for layer in model.get_decoder().layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    scores = []
    for cached in (True, False):
        with (
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            attach(model, FastV(several=True), HALVES) as trace,
        ):
            model(**batch, use_cache=cached)
        scores.append([row for boundary in trace.scores for row in boundary])
    assert set(seen) == {torch.bfloat16} and len(seen) > 2 * len(model.get_decoder().layers)
    for one, other in zip(*scores):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
