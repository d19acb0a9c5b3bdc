"""Rotary embeddings of the positions 0, 1, 2, ..., computed once: a decoding step looks up its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdrop.engine.architecture import Rotary

LEAST = 512  # positions of the smallest table
BY_LENGTH = ("dynamic", "longrope")  # these angles change with the longest position


class Angles:
    """(cos, sin) of a decoder's rotary embeddings at given positions, bit for bit as the decoder computes them."""

    def __init__(self, rotary_emb: Any):
        self.make = rotary_emb
        kind = getattr(rotary_emb, "rope_type", None)
        self.fixed = isinstance(kind, str) and not any(name in kind for name in BY_LENGTH)
        self.tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def table(self, hidden: Tensor, length: int) -> Tensor:
        """cos and sin of at least `length` positions, [2, length or more, d], for `hidden`'s device and dtype."""
        kind = (hidden.device, hidden.dtype)
        if kind not in self.tables or self.tables[kind].shape[1] < length:
            longer = 1 << (max(length, LEAST) - 1).bit_length()
            with torch.inference_mode(False):  # a table made in inference mode could not be used outside it
                made = self.make(hidden, torch.arange(longer, device=hidden.device)[None])
                self.tables[kind] = torch.cat(made)
        return self.tables[kind]

    def between(self, hidden: Tensor, begin: int, end: int) -> Rotary:
        """Of the positions from `begin` to before `end`, each [1, end - begin, d]."""
        if not self.fixed:
            made: Rotary = self.make(hidden, torch.arange(begin, end, device=hidden.device)[None])
            return made
        table = self.table(hidden, end)[:, begin:end]
        return table[0][None], table[1][None]

    def at(self, hidden: Tensor, places: Tensor, length: int) -> Rotary:
        """Of `places`, [B, T], all of them below `length`; each [B, T, d]."""
        if not self.fixed:
            made: Rotary = self.make(hidden, places)
            return made
        rows = self.table(hidden, length)[:, places]
        return rows[0], rows[1]
