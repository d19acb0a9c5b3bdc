"""The query tokens' attention in each layer, under a schedule that drops nothing.

A schedule whose boundaries all keep everything ranks without dropping, so the forward equals the unattached model's bit
for bit, and every layer can be studied. Only the query tokens' rows are computed (pdrop/engine/ranking.py), in float32,
with any attention backend. Nothing is recorded unless the caller sets `Trace.study`.

Shapes: B prompts, H heads, T tokens, Q query tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdrop.methods.base import View
from pdrop.methods.transfer import moved, on_device, read_back

TOP = 0.1  # "concentration" is the share of the visual attention that this fraction of the visual tokens gets


@dataclass(frozen=True)
class LayerAttention:
    """What the query tokens of one prompt attend to in one layer.

    Attributes:
        layer: The layer, 0-based.
        mass: Share of each head's attention that goes to visual tokens, [H], 0..1.
        entropy: Entropy of each head's attention among the visual tokens, divided by the log of their number, [H]: 1 =
            spread evenly, 0 = all on one token.
        top: Share of each head's visual attention that goes to the most attended tenth of the visual tokens, [H].
        weights: Attention of each visual token, mean over the heads, [visual tokens] float32, on the CPU.
    """

    layer: int
    mass: list[float]
    entropy: list[float]
    top: list[float]
    weights: Tensor


@dataclass(frozen=True)
class Noted:
    """The same for a batch, on its device: `figures` [3, B, H] (mass, entropy, top), weights and visual [B, T]."""

    layer: int
    figures: Tensor
    weights: Tensor
    visual: Tensor


def rows_of(layers: Sequence[Noted]) -> list[list[LayerAttention]]:
    """Per layer, the numbers for each prompt, read from the device in one copy."""
    read = iter(read_back(x for noted in layers for x in (noted.figures, noted.weights, noted.visual)))
    found = []
    for noted in layers:
        mass, entropy, top = next(read).tolist()
        weights = [row[mask] for row, mask in zip(next(read), next(read))]
        found.append([LayerAttention(noted.layer, *one) for one in zip(mass, entropy, top, weights)])
    return found


@torch.no_grad()
def note(seen: View) -> Noted:
    """What the query tokens attend to in the layer whose input `seen` is."""
    rows, visual = seen.attention_rows(), seen.visual
    asks = rows.asks[:, None, :, None].float()
    heads = (rows.probabilities * asks).sum(2) / asks.sum(2).clamp(min=1)  # [B, H, T]
    among = heads * visual[:, None]
    mass = among.sum(-1)
    share = among / mass[..., None].clamp(min=torch.finfo(mass.dtype).tiny)
    numbers = [max(1, int(n)) for n in seen.visual_counts]
    spread = [1 / math.log(n) if n > 1 else 0.0 for n in numbers]
    entropy = torch.special.entr(share).sum(-1) * moved(torch.tensor(spread), mass.device)[:, None]
    best = on_device([math.ceil(TOP * n) for n in numbers], mass.device)
    places = torch.arange(share.shape[-1], device=share.device)
    top = (share.sort(dim=-1, descending=True).values * (places < best[:, None])[:, None]).sum(-1)
    return Noted(seen.layer, torch.stack([mass, entropy, top]), among.mean(1), visual)
