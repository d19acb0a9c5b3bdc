"""Qwen3-VL's decoder adds visual features behind its first layers, at places of the full sequence (arXiv 2406.04334).

Once tokens have been dropped those places are gone. So the engine keeps the features back from the decoder and adds
them itself, at the tokens that are left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pdrop.engine.sequence import take
from pdrop.engine.state import Forward


def take_over(run: Forward, first_boundary: int, kwargs: dict[str, Any]) -> bool:
    """Note the features that the decoder was called with, if it would add some behind `first_boundary`."""
    features = kwargs.get("deepstack_visual_embeds")
    if run.prompts is None or features is None or len(features) <= first_boundary:
        return False
    run.deepstack = kwargs["visual_pos_masks"], features
    return True


def add(run: Forward, number: int, hidden: Tensor) -> Tensor | None:
    """Behind layer `number`: hidden [B, T, D] plus the features of the visual tokens that are left, if it has any."""
    if run.deepstack is None or number >= len(run.deepstack[1]):
        return None
    assert run.alive is not None
    where, features = run.deepstack  # [B, L] bool, each [visual tokens, D]
    full = hidden.new_zeros(*where.shape, hidden.shape[-1])
    full[where.to(full.device)] = features[number].to(full)
    return hidden + take(full, run.alive.index)
