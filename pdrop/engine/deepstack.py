"""Qwen3-VL's decoder adds visual features after its first layers, at places of the full sequence (arXiv 2406.04334).

Once tokens have been dropped those places no longer exist. So the engine withholds the features from the decoder and
adds them itself, at the tokens that are left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdrop.engine.sequence import take
from pdrop.engine.state import Forward
from pdrop.methods.transfer import moved


def take_over(run: Forward, first_boundary: int, kwargs: dict[str, Any]) -> bool:
    """Note the features that the decoder was called with, if it would add some after `first_boundary`."""
    features = kwargs.get("deepstack_visual_embeds")
    if run.prompts is None or features is None or len(features) <= first_boundary:
        return False
    where: Tensor = kwargs["visual_pos_masks"]  # [B, L] bool; features are [visual tokens, D] each
    places = moved(run.prompts.host.visual.flatten().nonzero()[:, 0], features[0].device)
    run.deepstack = []
    for feature in features:
        flat = feature.new_zeros(where.numel(), feature.shape[-1])
        if len(places) == len(feature):
            flat = flat.index_copy(0, places.to(flat.device), feature)
        else:  # ids that are text here because no pixels came with them
            flat[where.to(flat.device).flatten()] = feature
        run.deepstack.append(flat.view(*where.shape, -1))
    return True


def shorten(run: Forward, rows: Tensor, weights: Tensor | None = None) -> None:
    """At a boundary: the features of the tokens left, [B, T', D].

    Args:
        rows: Which of the T (+ M) tokens are left, [B, T'].
        weights: What each of M merged tokens was made of, [B, M, T]; its features are mixed with the same weights, in
            float32 as its states are.
    """
    if run.deepstack is None:
        return
    for number, full in enumerate(run.deepstack):
        if weights is not None:
            wide = torch.promote_types(full.dtype, torch.float32)
            full = torch.cat([full, (weights.to(wide) @ full.to(wide)).to(full)], 1)
        run.deepstack[number] = take(full, rows)


def add(run: Forward, number: int, hidden: Tensor) -> Tensor | None:
    """After layer `number`: hidden [B, T, D] plus the features of the tokens that are left, if it has any."""
    if run.deepstack is None or number >= len(run.deepstack):
        return None
    return hidden + run.deepstack[number].to(hidden)
