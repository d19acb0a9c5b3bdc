"""SparseVLM v1: how many tokens stay follows from the rank of what the raters see. No vectors: the first release runs
on no transformers that is still installable, so the rule is recomputed here in plain steps.

pytest tests/methods/test_sparsevlm_v1.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from pdrop import Schedule, SparseVLMV1, Stage, attach, sparsevlm_v1
from pdrop.conformance.families import LAYERS, build
from pdrop.methods.base import Ranking
from tests.support.cases import ONE, RAGGED, batch_of

ADAPTIVE = Schedule((Stage(2, adaptive=True), Stage(4, adaptive=True)))
SEEN: list[Any] = []


@dataclass(frozen=True)
class Watched(SparseVLMV1):
    def score(self, view: Any) -> Any:
        found = super().score(view)
        rows = view.attention_rows(view.begun.gather(1, view.index) & view.valid & ~view.visual)
        SEEN.append((found, rows, view.visual.clone(), list(view.visual_counts)))
        return found


@torch.no_grad()
@pytest.mark.parametrize(("scale", "bias"), [(13.5, 0.0), (1.0, 0.0), (0.8, 0.0), (1.5, 2.0)])
def test_the_rank_says_how_many_stay(scale: float, bias: float) -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    SEEN.clear()
    method = Watched(scale=scale, bias=bias, tokens_per_cluster=2)
    with attach(model, method, ADAPTIVE) as trace:
        model(**batch)
    assert len(SEEN) == 2
    before, counts = [list(range(n)) for n in trace.visual], set()
    for stage, (found, rows, visual, now) in enumerate(SEEN):
        assert isinstance(found, Ranking)
        for row, n in enumerate(now):
            if not n:
                continue
            matrix = rows.probabilities[row].double().mean(0)[rows.asks[row]][:, visual[row]]
            singular = torch.linalg.svdvals(matrix)
            rank = int((singular > singular[0] * max(matrix.shape) * torch.finfo(torch.float32).eps).sum())
            stay = n if rank == n else min(int(rank * scale + bias), n - 1)
            names = trace.order[stage][row].tolist()
            kept = [name for name in names if name in before[row]]
            assert len(kept) == stay and len(names) - stay == method.merges(n - stay)
            counts.add(stay)
            before[row] = names
    assert len(counts) > 1, "the prompts of a batch keep different numbers"


@torch.no_grad()
def test_the_rank_is_found_in_float64_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With float32's threshold: libraries of devices need not agree on the smallest singular values."""
    seen, real = [], torch.linalg.matrix_rank

    def noted(matrix: Any, *, rtol: float) -> Any:
        seen.append((matrix.dtype, matrix.device.type, rtol / max(matrix.shape)))
        return real(matrix, rtol=rtol)

    monkeypatch.setattr(torch.linalg, "matrix_rank", noted)
    model = build("llava")
    with attach(model, SparseVLMV1(), ADAPTIVE):
        model(**batch_of("llava", model, RAGGED))
    assert set(seen) == {(torch.float64, "cpu", torch.finfo(torch.float32).eps)} and len(seen) > 4


def test_published_boundaries_and_refusals() -> None:
    assert str(sparsevlm_v1(32)) == "3:adaptive 7:adaptive 16:adaptive 20:adaptive"
    assert sparsevlm_v1(LAYERS).layers == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="scale is a number"):
        SparseVLMV1(scale=-1)
    with pytest.raises(ValueError, match="run it"):
        SparseVLMV1().tokens_per_layer(ADAPTIVE, 16, LAYERS)


@torch.no_grad()
def test_listed_counts_are_followed_too() -> None:
    """At a stage of counts it is v1.5."""
    model = build("llava")
    with attach(model, SparseVLMV1(), Schedule((Stage(2, tokens=9),))) as trace:
        model(**batch_of("llava", model, ONE))
    assert len(trace.kept[0][0]) == 9
