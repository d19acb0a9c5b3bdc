"""Flex attention: the same tokens as under sdpa, in every stage and decoding step.

Uncompiled, flex attention computes what its kernels compute, so masks and lengths are tested without a compiler; one
case of make test-all compiles, as transformers does.

    pytest tests/engine/test_flex.py
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import transformers.integrations.flex_attention as library
import transformers.masking_utils as masks

from pdrop import Method, PyramidDrop, SparseVLM, attach
from pdrop.conformance.families import fresh
from tests.support.cases import GREEDY, HALVES, RAGGED, batch_of, kept_of, methods

ROWS = {"one": RAGGED[:1], "ragged": RAGGED}


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Takes the compiler away, and notes queries and keys of each call of the decoder, which has masks."""
    seen: list[tuple[int, int]] = []
    make = masks.create_block_mask

    def uncompiled(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"_compile": False})

    def attention(query: Any, key: Any, value: Any, training: bool = False, **options: Any) -> Any:
        if options.get("block_mask") is not None:
            seen.append((query.shape[2], key.shape[2]))
        return torch_flex.flex_attention(query, key, value, **options)

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(masks, "create_block_mask", uncompiled)
    monkeypatch.setattr(library, "compile_friendly_flex_attention", attention)
    return seen


def both(family: str, method: Method, rows: Any) -> list[Any]:
    """(tokens, logits, which tokens stay) under sdpa and under flex attention."""
    found = []
    for backend in ("sdpa", "flex_attention"):
        model = fresh(family, backend, torch.float32).eval()
        with attach(model, method, HALVES) as trace:
            out = model.generate(**batch_of(family, model, rows), **GREEDY)
        found.append((out.sequences, torch.stack(out.logits), kept_of(trace)))
    return found


def same(found: list[Any]) -> None:
    (want, logits, kept), (got, others, stay) = found
    assert torch.equal(got, want) and stay == kept
    torch.testing.assert_close(others, logits, rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.product(6)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("method", [*methods("llava"), SparseVLM()], ids=lambda m: f"{type(m).__name__}-{m.positions}")
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_flex_attention_equals_sdpa(family: str, method: Method, rows: Any, attended: list[tuple[int, int]]) -> None:
    same(both(family, method, rows))
    lengths = {queries for queries, _ in attended if queries > 1}
    assert len(lengths) == 3, "a stage has fewer queries than the one before"
    assert len({keys for queries, keys in attended if queries == 1}) >= 3, "and fewer keys"


@torch.no_grad()
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_flex_attention_equals_sdpa() -> None:
    """One prompt: for a padded batch torch 2.15 writes C++ that does not compile, attached or not."""
    torch._dynamo.reset()
    same(both("llava", PyramidDrop(), RAGGED[:1]))
    torch._dynamo.reset()
