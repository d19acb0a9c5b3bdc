"""The flash-attention path, with flash-attn's two functions emulated in plain torch: no GPU, no flash-attn.

Why: transformers hands flash-attention no mask, but 2-D masks to unpad by and position ids that it reads packed
sequences from. So an engine that is right under sdpa can be wrong, or silently slow, here.

    pytest tests/engine/test_flash.py
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as library
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pdrop import attach
from pdrop.conformance.families import CORE, fresh
from tests.support.cases import HALVES, RAGGED, batch_of, kept_of, methods

EVEN = ((3, 5), (3, 5))
ROWS = {"one": RAGGED[:1], "image first": ((0, 5),), "even": EVEN, "ragged": RAGGED}


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    """[batch, tokens, heads, d]; the causal mask is aligned to the bottom right, as in flash-attn from 2.1 on."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows, columns = query.shape[2], key.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if causal else None
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Puts the emulation in flash-attn's place and counts which of its two kernels ran."""
    calls: Counter[str] = Counter()

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: Any = None, **_: Any) -> Tensor:
        calls["dense"] += 1
        return attend(q, k, v, causal, softmax_scale)

    def variable(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        causal: bool = False,
        softmax_scale: Any = None,
        **_: Any,
    ) -> Tensor:
        calls["variable"] += 1
        out = torch.empty_like(q)
        for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
            out[a:b] = attend(q[None, a:b], k[None, c:d], v[None, c:d], causal, softmax_scale)[0]
        return out

    def arguments(**given: Any) -> dict[str, Any]:
        return {"causal": given["is_causal"], "softmax_scale": given["softmax_scale"]}

    functions = (dense, variable, None, library._pad_input, library._unpad_input), (arguments, arguments)
    monkeypatch.setattr(library, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    monkeypatch.setattr(library, "fa_peft_integration_check", lambda q, k, v, dtype: (q, k, v))
    return calls


@pytest.mark.product(12)
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", CORE)
def test_flash_attention_equals_sdpa(family: str, rows: Any, side: str, kernels: Counter[str]) -> None:
    model = fresh(family)
    batch = batch_of(family, model, rows, side)
    if rows is EVEN:  # no padding, so no mask at all
        batch.pop("attention_mask")
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    greedy: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    results = {}
    for backend in ("sdpa", "flash_attention_2"):
        # the vision tower stays as it is: only the decoder's calls are counted
        model.get_decoder().config._attn_implementation = backend
        for number, method in enumerate(methods(family)):
            kernels.clear()
            with attach(model, method, HALVES) as trace:
                logits = model(**batch).logits
                kept = kept_of(trace)
                if backend != "sdpa":
                    assert sum(kernels.values()) == 6, "each of the 6 layers ran one flash kernel"
                    if len(rows) == 1 or (rows is EVEN and len(set(trace.visual)) == 1):
                        assert not kernels["variable"], "even rows need no unpadding, hence no synchronisation"
                tokens = model.generate(**batch, **greedy) if side == "left" else logits.argmax(-1)[real]
            results[backend, number] = logits, kept, tokens
    for number in range(len(methods(family))):
        want, got = results["sdpa", number], results["flash_attention_2", number]
        torch.testing.assert_close(got[0][real], want[0][real], rtol=0, atol=5e-5)
        assert got[1] == want[1]
        assert torch.equal(got[2], want[2])
