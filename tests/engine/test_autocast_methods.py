"""Under autocast every method ranks and merges in float32, those of other families' towers too, and trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdrop import attach
from pdrop.cli.compose import choices
from pdrop.conformance.__main__ import subject_of
from pdrop.conformance.families import fresh
from tests.engine.test_syncs import ELSEWHERE, LEFT_OUT
from tests.support.cases import RAGGED, batch_of
from tests.support.pretended_cuda import ENGINE

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_cdist_forward", "_euclidean_dist", "linalg_svdvals"}
MODULES = (str(Path(torch.nn.__file__).parent / "modules"), "/transformers/")


class OwnProducts(TorchDispatchMode):
    """Notes the dtypes of what the engine and the methods multiply, apart from the model's modules that they call."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS and own():
            self.dtypes |= {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def own() -> bool:
    """Whether it is the engine's or a method's line that runs, and no module of the model called from there."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(place in name for place in MODULES):
            return False
        if name.startswith(ENGINE):
            return True
        frame = frame.f_back
    return False


def cases() -> list[tuple[str, str]]:
    named = [("llava", name) for name in choices("method") if name not in LEFT_OUT]
    return named + [(family, name) for family, names in ELSEWHERE.items() for name in names]


@pytest.mark.product(4)
@pytest.mark.parametrize(("family", "name"), cases())
def test_every_method_ranks_in_float32_under_autocast(family: str, name: str) -> None:
    """Queries and keys of the decoder's layers are in half precision all the same, as the model makes them."""
    subject = subject_of(name, []).on(family)
    model, made = fresh(family, "sdpa", torch.float32), set()
    batch = batch_of(family, model, RAGGED, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    for layer in model.get_decoder().layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            part.register_forward_hook(lambda module, args, out: made.add(out.dtype))
    half = torch.autocast("cpu", dtype=torch.bfloat16)
    with OwnProducts() as products, half, attach(model, subject.method, subject.schedule) as trace:
        with torch.no_grad():
            model.eval()(**batch, use_cache=True)
        scores = [row for boundary in trace.scores for row in boundary]
        loss = model.train()(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    assert loss.isfinite() and sum(trace.visual_tokens[-1]) < sum(trace.visual)
    assert products.dtypes <= {torch.float32, torch.float64} and made == {torch.bfloat16}
    scores += [row for boundary in trace.scores for row in boundary]
    assert all(row.dtype in (torch.float32, torch.float64) and bool(row.isfinite().all()) for row in scores)


@torch.no_grad()
@pytest.mark.product(2)
@pytest.mark.parametrize(("family", "name"), cases())
def test_every_method_ranks_a_model_in_half_precision_in_float32(family: str, name: str) -> None:
    subject = subject_of(name, []).on(family)
    model = fresh(family, "sdpa", torch.bfloat16).eval()
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_of(family, model, RAGGED).items()}
    with OwnProducts() as products, attach(model, subject.method, subject.schedule) as trace:
        model(**batch)
    assert sum(trace.visual_tokens[-1]) < sum(trace.visual)
    assert products.dtypes <= {torch.float32, torch.float64}
