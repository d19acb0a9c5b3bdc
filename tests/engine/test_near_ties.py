"""The comparison that tests on a GPU rely on: it forgives near-ties at the cut, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdrop import PyramidDrop, attach
from pdrop.conformance.families import build
from tests.support.cases import HALVES, RAGGED, batch_of
from tests.support.near_ties import diverged


def trace(kept: list[list[int]], scores: list[list[float]]) -> Any:
    """Of one prompt with four visual tokens."""
    return SimpleNamespace(
        visual=[4], kept=[[torch.tensor(k)] for k in kept], scores=[[torch.tensor(s)] for s in scores]
    )


WANT = trace([[0, 1, 2], [0]], [[0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.2]])
TIE = trace([[0, 1, 3], [3]], [[0.4, 0.3, 0.2, 0.200001], [0.1, 0.2, 0.7]])
TIED = trace([[0, 1, 2], [0]], [[0.4, 0.3, 0.2, 0.199999], [0.5, 0.3, 0.2]])


def test_tokens_at_the_cut_may_change_places() -> None:
    assert diverged(WANT, WANT) == set()
    assert diverged(TIE, TIED) == {0} == diverged(TIED, TIE), "and what follows is of other tokens"


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (trace([[0, 1, 3], [3]], [[0.4, 0.3, 0.2, 0.200001], [0.1, 0.2, 0.7]]), "token [23] is 0.25 from the cut"),
        (trace([[0, 1, 3], [0]], [[0.4, 0.3, 0.1, 0.2], [0.5, 0.3, 0.2]]), "from the cut"),
        (trace([[0, 1], [0]], [[0.4, 0.3, 0.2, 0.1], [0.5, 0.3]]), "boundary 0, row 0: 2 tokens and 3"),
        (trace([[0, 1, 2], [1]], [[0.4, 0.3, 0.2, 0.1], [0.3, 0.5, 0.2]]), "boundary 1.*from the cut"),
    ],
    ids=["a tie on one side alone", "another ranking", "another number", "at a later boundary"],
)
def test_anything_else_is_a_fault(got: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        diverged(got, WANT)


@torch.no_grad()
def test_it_reads_the_engine_s_traces() -> None:
    model = build("llava", "sdpa", torch.float32)
    batch = batch_of("llava", model, RAGGED)
    found = []
    for dtype in (torch.float32, torch.float64):
        other = model if dtype is torch.float32 else build("llava", "sdpa", dtype)
        with attach(other, PyramidDrop(), HALVES) as kept:
            other(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
        found.append(kept)
    assert len(diverged(*found)) <= 1
