"""torch.compile as documented: each layer's forward is compiled as one graph, the hooks stay outside.

    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True)

With a cache every layer is a graph of its own, attached or not (its cache is another object), so models of more than
a few layers need torch._dynamo.config.recompile_limit raised. The "eager" backend runs what dynamo traced without
generating code: what is tested is tracing, not kernels.

    pytest tests/engine/test_compile.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from pdrop import Schedule, attach, single
from pdrop.conformance.families import fresh
from tests.support.cases import HALVES, batch_of, kept_of, methods

# prompts of different lengths, image counts and padding: what a served model sees in an afternoon
CALLS = (((3, 5),), ((4, 7),), ((4, 7, 3), (2, 6)))


@pytest.fixture(autouse=True)
def many_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield
    torch._dynamo.reset()


def compile_layers(model: Any, chosen: Sequence[int] | None = None) -> None:
    torch._dynamo.reset()
    counters.clear()
    for number, layer in enumerate(model.get_decoder().layers):
        if chosen is None or number in chosen:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")


@pytest.mark.product(1)
@pytest.mark.slow
@torch.no_grad()
# the prefill's token and one of a cached step, in a layer before, at and after boundaries; in all; several cached steps
@pytest.mark.parametrize(("steps", "chosen"), [(2, (1, 4, 5)), (2, None), (4, None)])
@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(f, m, id=f"{f}-{type(m).__name__}") for f in ("llava", "qwen3_vl") for m in methods(f)[:2]],
)
def test_compiled_layers_give_the_same_without_graph_breaks(
    family: str, method: Any, steps: int, chosen: Sequence[int] | None
) -> None:
    plain, model = fresh(family, dtype=torch.float32), fresh(family, dtype=torch.float32)
    compile_layers(model, chosen)
    for rows in CALLS:
        batch = batch_of(family, model, rows)
        with attach(plain, method, HALVES) as want, attach(model, method, HALVES) as got:
            expected, logits = (each(**batch, use_cache=False).logits for each in (plain, model))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert kept_of(got) == kept_of(want)
    with attach(plain, method, HALVES), attach(model, method, HALVES):
        greedy: dict[str, Any] = dict(max_new_tokens=steps, do_sample=False)
        assert torch.equal(model.generate(**batch, **greedy), plain.generate(**batch, **greedy))
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]


@pytest.mark.exhaustive
@torch.no_grad()
def test_attaching_and_leaving_a_compiled_model_at_any_time() -> None:
    """Hooks registered after the first compiled call are seen, and those removed are gone."""
    model = fresh("llava", dtype=torch.float32)
    batch = batch_of("llava", model, CALLS[0])
    method = methods("llava")[0]
    plain = model(**batch).logits
    with attach(model, method, HALVES):
        halves = model(**batch).logits
    compile_layers(model)
    for _ in range(2):
        torch.testing.assert_close(model(**batch).logits, plain, rtol=0, atol=1e-5)
        with attach(model, method, HALVES) as trace:
            torch.testing.assert_close(model(**batch).logits, halves, rtol=0, atol=1e-5)
        assert trace.tokens[-1] < trace.tokens[0]
        with attach(model, method, single(1, 0.0)) as trace:
            assert not torch.allclose(model(**batch).logits, halves, atol=1e-2)
        assert trace.tokens[-1][0] == trace.tokens[0][0] - trace.visual[0]


@torch.no_grad()
def test_dropping_compiles_no_more_graphs_than_not_dropping() -> None:
    graphs = []
    for schedule in (Schedule(), HALVES):
        model = fresh("llava", dtype=torch.float32)
        compile_layers(model)
        for rows in CALLS * 2:
            with attach(model, methods("llava")[0], schedule):
                model(**batch_of("llava", model, rows), use_cache=False)
        graphs.append(counters["stats"]["unique_graphs"])
    # one more for the first stage's mask, which the second prompt's then shares
    assert 0 < graphs[1] <= graphs[0] + 1


def test_compiled_layers_train() -> None:
    plain, model = fresh("llava", dtype=torch.float32).train(), fresh("llava", dtype=torch.float32).train()
    compile_layers(model)
    batch = batch_of("llava", model, CALLS[2], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    losses = []
    for each in (plain, model):
        with attach(each, methods("llava")[0], HALVES):
            loss = each(**batch, labels=labels, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    for (name, want), got in zip(plain.named_parameters(), model.parameters()):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert not counters["graph_break"]


@pytest.mark.product(1)
@torch.no_grad()
@pytest.mark.parametrize("method", methods("llava")[:2], ids=lambda m: type(m).__name__)
def test_a_static_cache_that_generate_compiles_for_is_right_while_attached(method: Any) -> None:
    """On CUDA generate compiles the model's call by itself; the graph of an unattached call does not see hooks."""
    model = fresh("llava", dtype=torch.float32)
    batch = batch_of("llava", model, CALLS[2])
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True  # as on CUDA
    static: dict[str, Any] = dict(cache_implementation="static", compile_config=compiling)
    more: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[2])
    torch._dynamo.reset()
    plain = model.generate(**batch, **more)
    assert torch.equal(model.generate(**batch, **more, **static), plain)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs, "nothing was compiled: this test would say nothing"
    with attach(model, method, HALVES):
        want = model.generate(**batch, **more)
        assert not torch.equal(want, plain)
        assert torch.equal(model.generate(**batch, **more, **static), want)
    assert "get_compiled_call" not in model.__dict__
    assert torch.equal(model.generate(**batch, **more, **static), plain)
