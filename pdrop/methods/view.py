"""What a method gets to see of a sequence, and what it gives back.

Shapes: B prompts of a batch, L tokens of the padded prompts, T tokens alive (padding included), Q asking tokens, M
merged tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdrop.methods.layout import TokenGrid
from pdrop.schedule import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttentionRows:
    """What the asking tokens of each prompt attend to in one layer.

    Attributes:
        probabilities: [B, heads, Q, T] float32, softmax over the whole causal row.
        asks: Which of the Q rows are asked for, [B, Q] bool: prompts that ask less are filled up.
    """

    probabilities: Tensor
    asks: Tensor
    _rotation: Callable[[], Tensor]

    def mean(self) -> Tensor:
        """Attention that each token gets: mean over the heads and the asking rows, [B, T]."""
        weight = self.asks[..., None].float()
        return (self.probabilities.mean(1) * weight).sum(1) / weight.sum(1).clamp(min=1)

    def rotation(self) -> Tensor:
        """What the rotary positions alone would make of queries and keys of ones: their scaled products, [B, Q, T]."""
        return self._rotation()


@dataclass(frozen=True)
class View:
    """The sequence that enters one decoder layer, as a method sees it. Read-only.

    Attributes:
        layer: The layer whose input this is, 0-based.
        hidden: Hidden states on the layer's input, [B, T, D].
        index: Place of each token in its padded prompt, [B, T]; of a merged token, its centre's.
        valid: Whether it is a token, not padding, [B, T] bool.
        visual: Whether it is a visual token that may be dropped, merged ones included, [B, T] bool.
        query: Whether it is a query token, [B, T] bool: the last instruction token; with labels, the token in front
            of each answer.
        visual_counts: Visual tokens of each prompt, known without asking the device.
        text_counts: The other tokens of each prompt, likewise.
        pinned: Visual tokens of each prompt that are query tokens and stay, likewise.
        stage: What the boundary opens that this is ranked for; None in `begin`.
        begun: What the method's `begin` returned for this forward.
    """

    layer: int
    hidden: Tensor
    index: Tensor
    valid: Tensor
    visual: Tensor
    query: Tensor
    visual_counts: list[int]
    text_counts: list[int]
    pinned: list[int]
    stage: Stage | None
    begun: Any
    _attention: Callable[[Tensor | None, int | None], AttentionRows]
    _draw: Callable[[int], Tensor]
    _images: Callable[[], list[list[TokenGrid]]]

    def attention(self, rows: Tensor | None = None, most: int | None = None) -> Tensor:
        """Attention that each token gets in this layer, mean over heads and over the asking tokens, [B, T] float32.

        Softmax in float32 over the whole causal row, text keys included, with the layer's own projections and the
        rotary positions of the moment; only the asking rows are computed, so any attention backend will do.

        Args:
            rows: Which tokens ask, [B, T] bool; default: the query tokens.
            most: A bound on how many of a prompt ask. Without one, the number is read from the device.
        """
        return self._attention(rows, most).mean()

    def attention_rows(self, rows: Tensor | None = None, most: int | None = None) -> AttentionRows:
        """The same before any mean is taken, head by head."""
        return self._attention(rows, most)

    def draw(self, seed: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, T] float32, seeded by (`seed`, layer, the prompt's own token ids).

        The same prompt gets the same numbers in any batch, under any padding, and with its answer appended.
        """
        return self._draw(seed)

    @property
    def images(self) -> list[list[TokenGrid]]:
        """Where the ORIGINAL visual tokens of each prompt lie: its pictures, tiles and frames, in order.

        Raises:
            ValueError: If this model's inputs do not tell.
        """
        return self._images()


@dataclass(frozen=True)
class Ranking:
    """Scores, and how many tokens they let stay: what `score` returns at an adaptive stage.

    Attributes:
        scores: [B, T] float32.
        stays: How many visual tokens of each prompt stay, [B] whole numbers; read from the device once a boundary.
    """

    scores: Tensor
    stays: Tensor


@dataclass(frozen=True)
class Merged:
    """Tokens made from visual tokens that go. Prompts that make fewer than M are filled up with anything.

    Attributes:
        states: [B, M, D].
        centres: Which of the T tokens each stands for, [B, M]: it takes its place, and with original positions its
            position. All different, and among those that go.
        weights: What each was made of, [B, M, T] float32: 0 for tokens without a part in it.
    """

    states: Tensor
    centres: Tensor
    weights: Tensor
