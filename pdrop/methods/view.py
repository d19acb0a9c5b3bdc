"""What a method sees of a sequence, and what it returns.

Shapes: B prompts of a batch, L tokens of the padded prompts, T tokens alive (padding included), Q attention rows, M
    merged tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdrop.methods.layout import TokenGrid
from pdrop.methods.tower import Tower
from pdrop.schedule import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AttentionRows:
    """Selected rows of each prompt's attention in one layer.

    Attributes:
        probabilities: [B, heads, Q, T] float32, softmax over the whole causal row.
        asks: Which of the Q rows were asked for, [B, Q] bool: prompts with fewer rows are padded.
    """

    probabilities: Tensor
    asks: Tensor
    _rotation: Callable[[], Tensor]
    _every: bool = False  # whether all rows were asked for, if known without waiting for the device

    def mean(self) -> Tensor:
        """Attention that each token gets: mean over the heads and the rows asked for, [B, T]."""
        if self._every and self.asks.shape[1] == 1:
            return self.probabilities.mean(1)[:, 0]
        weight = self.asks[..., None].float()
        return (self.probabilities.mean(1) * weight).sum(1) / weight.sum(1).clamp(min=1)

    def rotation(self) -> Tensor:
        """Scaled products of queries and keys of ones under the rotary positions, [B, Q, T]."""
        return self._rotation()


@dataclass(frozen=True)
class Block:
    """The contiguous places of the visual tokens, the same in all prompts, and the place of the one query token after.

    Attributes:
        start: Place of the first visual token among those alive.
        stop: Place after the last one.
        query: Place of the query token.
    """

    start: int
    stop: int
    query: int

    def resized(self, count: int) -> Block:
        """The same block with this many visual tokens instead."""
        return Block(self.start, self.start + count, self.query + count - (self.stop - self.start))


@dataclass(frozen=True)
class View:
    """The input of one decoder layer, as a method sees it. Read-only.

    Attributes:
        layer: The layer whose input this is, 0-based.
        hidden: Hidden states on the layer's input, [B, T, D].
        index: Place of each token in its padded prompt, [B, T]; for a merged token, its centre's.
        valid: Whether it is a token, not padding, [B, T] bool.
        visual: Whether it is a visual token that may be dropped, merged ones included, [B, T] bool.
        query: Whether it is a query token, [B, T] bool: the last instruction token; with labels, the token before each
            answer.
        visual_counts: Visual tokens of each prompt, known without waiting for the device.
        text_counts: The other tokens of each prompt, likewise.
        pinned: Visual tokens of each prompt that are query tokens and stay, likewise.
        stage: The stage that begins at the boundary being ranked for; None in `begin`.
        begun: What the method's `begin` returned for this forward.
        originals: Visual tokens of each prompt before anything was dropped.
        stays: How many visual tokens of each prompt are to stay as they are, pinned ones included, as `plan` says: for
            methods that choose a set. None in `begin`, in `plan`, and if the method finds the number itself.
        output: The layer's output for `hidden`, which is the boundary's input, [B, T, D]. None unless the method
            observes the layer before the boundary.
        block: Where the visual tokens are, if they are at the same places in all prompts and there is no padding: a
            method may then slice instead of sort. None otherwise.
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
    originals: list[int]
    stays: list[int] | None
    output: Tensor | None
    block: Block | None
    _ids: Callable[[], Tensor]
    _attention: Callable[[Tensor | None, int | range | None, bool], AttentionRows]
    _draw: Callable[[int], Tensor]
    _images: Callable[[], list[list[TokenGrid]]]
    _keys: Callable[[], Tensor]
    _norm: Callable[[Tensor], Tensor]
    _tower: Callable[[], Tower]
    _texts: Callable[[], list[str]]

    @property
    def ids(self) -> Tensor:
        """Input ids of the tokens alive, [B, T]; for a merged token, its centre's."""
        return self._ids()

    def attention(self, rows: Tensor | None = None, most: int | range | None = None) -> Tensor:
        """Attention that each token gets in this layer, mean over heads and over the chosen rows, [B, T] float32.

        Softmax in float32 over the whole causal row, text keys included, with the layer's own projections and the
        current rotary positions; only these rows are computed, so any attention backend works.

        Args:
            rows: Tokens whose rows are computed, [B, T] bool; default: the query tokens.
            most: An upper bound on the rows of a prompt; with a `block` it may be a range of places that contains them.
                If it is not given, the number is read from the device.
        """
        return self._attention(rows, most, True).mean()

    def attention_rows(
        self, rows: Tensor | None = None, most: int | range | None = None, rotated: bool = True
    ) -> AttentionRows:
        """The same before the mean, for each head; `rotated=False`: without rotary positions.

        Without rotary positions the layer's keys are computed again, even if it has already run.
        """
        return self._attention(rows, most, rotated)

    def keys(self) -> Tensor:
        """The layer's keys with rotary positions, [B, key heads, T, head size]; not copied if the layer has run."""
        return self._keys()

    def final_norm(self, states: Tensor) -> Tensor:
        """The decoder's final normalisation, before lm_head, applied to states, [..., D]."""
        return self._norm(states)

    @property
    def tower(self) -> Tower:
        """The vision tower's states and attention for the pictures.

        Raises:
            ValueError: If the method does not declare `tower_layers`, or the tower cannot be read.
        """
        return self._tower()

    def visual_places(self, row: int) -> Tensor:
        """Places among the tokens alive of a prompt's visual tokens that may be dropped, ascending, [n]."""
        if self.block is not None:
            import torch

            return torch.arange(self.block.start, self.block.stop, device=self.index.device)
        count = self.visual_counts[row] - self.pinned[row]
        return self.visual[row].int().argsort(descending=True, stable=True)[:count]

    def question(self) -> Tensor:
        """Text after the last visual token and up to the last query token, [B, T] bool."""
        if self.block is not None:
            asked = self.visual.new_zeros(self.visual.shape)
            asked[:, self.block.stop : self.block.query + 1] = True
            return asked
        return question_of(self.valid, self.visual, self.query)

    def texts(self) -> list[str]:
        """The `question` of each prompt as text, without special tokens; read on the host.

        Raises:
            ValueError: If no tokenizer was given: attach(..., tokenizer=).
        """
        return self._texts()

    def draw(self, seed: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, T] float32, seeded by (`seed`, layer, the prompt's own token ids).

        The same prompt gets the same numbers in any batch, under any padding, and with its answer appended.
        """
        return self._draw(seed)

    @property
    def images(self) -> list[list[TokenGrid]]:
        """The grids of each prompt's ORIGINAL visual tokens: its pictures, tiles and frames, in order.

        Raises:
            ValueError: If they cannot be read from this model's inputs.
        """
        return self._images()


@dataclass(frozen=True)
class Ranking:
    """Scores, and how many tokens stay: what `score` returns at an adaptive stage.

    Attributes:
        scores: [B, T] float32.
        stays: How many visual tokens of each prompt stay, [B] integers; read from the device once per boundary.
        makes: How many are made of those that go, [B] integers; None: as the method's `merges` says.
    """

    scores: Tensor
    stays: Tensor
    makes: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """Tokens made from visual tokens that go. Prompts that make fewer than M are padded with any values.

    Attributes:
        states: [B, M, D].
        centres: Which of the T tokens each replaces, [B, M]: it takes that token's place, and with original positions
            its position. All different, and among those that go.
        weights: What each was made of, [B, M, T] float32: 0 for tokens that have no part in it.
        after: Which of the T tokens each follows (or replaces, if that token goes), [B, M]; -1: before the prompt.
            Several after the same token are in the order of M. A token must not be placed before text that precedes the
            pictures it was made from. None: after the prompt's last visual token that could go.
        moved: Whether a made token with a single part is that token at another place, which counts as kept.
    """

    states: Tensor
    centres: Tensor
    weights: Tensor
    after: Tensor | None = None
    moved: bool = False


def question_of(valid: Tensor, visual: Tensor, query: Tensor) -> Tensor:
    """Text after the last visual token and up to the last query token, [B, T] bool. See `View`."""
    seen, asks = visual.cumsum(1), query.cumsum(1)
    return valid & ~visual & (seen == seen[:, -1:]) & ((asks < asks[:, -1:]) | query)
