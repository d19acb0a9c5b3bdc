"""What an attachment has done: the last prefill, in lists that a reader can print.

Tensors stay on their device until they are looked at, so a trace costs a forward nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Ranked:
    """One boundary of one prefill. B prompts, T tokens alive in front of it, T' behind it."""

    scores: Tensor  # [B, T] float32
    candidates: Tensor  # [B, T] bool: the visual tokens that were ranked
    index: Tensor  # [B, T'] place in the padded prompt of the tokens that stay
    visual: Tensor  # [B, T'] bool


@dataclass
class Trace:
    """Report of the last prefill (a forward that brought a prompt, as against a decoding step).

    Attributes:
        prefills: Number of prefills seen since attaching.
        visual: Visual tokens of each prompt, a list over the batch.
    """

    num_layers: int
    num_boundaries: int
    prefills: int = 0
    visual: list[int] = field(default_factory=list)
    _lengths: dict[int, list[int]] = field(default_factory=dict)  # from this layer on, per row
    _visual_lengths: dict[int, list[int]] = field(default_factory=dict)
    _numbers: Tensor | None = None  # [B, L] running number of each visual token of the prompt
    _ranked: list[Ranked] = field(default_factory=list)

    def start(self, visual: list[int], lengths: list[int], is_visual: Tensor) -> None:
        """A prefill begins. `is_visual` [B, L]."""
        self.prefills += 1
        self.visual, self._ranked = list(visual), []
        self._lengths, self._visual_lengths = {0: list(lengths)}, {0: list(visual)}
        self._numbers = is_visual.cumsum(1) - 1

    def boundary(self, layer: int, lengths: list[int], visual: list[int], ranked: Ranked) -> None:
        """A boundary has been passed: from `layer` on each row has that many tokens."""
        self._lengths[layer], self._visual_lengths[layer] = list(lengths), list(visual)
        self._ranked.append(ranked)

    @property
    def kept(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: ORIGINAL visual indices that stay, ascending LongTensor on the CPU.

        0 is the prompt's first visual token. Prompts without images have empty tensors; a batch in which nothing may
        be dropped keeps everything.
        """
        boundaries = []
        for ranked in self._ranked:
            assert self._numbers is not None
            numbers = self._numbers.to(ranked.index.device).gather(1, ranked.index)
            boundaries.append([row[mask].cpu() for row, mask in zip(numbers, ranked.visual)])
        return boundaries or [[torch.arange(n) for n in self.visual] for _ in range(self.num_boundaries)]

    @property
    def scores(self) -> list[list[Tensor]]:
        """Per boundary, per prompt: score of each visual token that was ranked there, in their original order."""
        rows = [[s[c].cpu() for s, c in zip(ranked.scores, ranked.candidates)] for ranked in self._ranked]
        return rows or [[torch.empty(0) for _ in self.visual] for _ in range(self.num_boundaries)]

    @property
    def tokens(self) -> list[list[int]]:
        """Per layer, per prompt: tokens that entered the layer, visual and text, without padding."""
        return self._per_layer(self._lengths)

    @property
    def visual_tokens(self) -> list[list[int]]:
        """Per layer, per prompt: visual tokens that entered the layer."""
        return self._per_layer(self._visual_lengths)

    def _per_layer(self, changes: dict[int, list[int]]) -> list[list[int]]:
        layers, now = [], changes.get(0, [])
        for layer in range(self.num_layers):
            now = changes.get(layer, now)
            layers.append(list(now))
        return layers
