"""What a method gets to see of a sequence, and what it gives back.

Shapes: B prompts of a batch, L tokens of the padded prompts, T tokens alive (padding included), Q asking tokens, M
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
    """What the asking tokens of each prompt attend to in one layer.

    Attributes:
        probabilities: [B, heads, Q, T] float32, softmax over the whole causal row.
        asks: Which of the Q rows are asked for, [B, Q] bool: prompts that ask less are filled up.
    """

    probabilities: Tensor
    asks: Tensor
    _rotation: Callable[[], Tensor]
    _every: bool = False  # are all rows asked for, known without asking the device?

    def mean(self) -> Tensor:
        """Attention that each token gets: mean over the heads and the asking rows, [B, T]."""
        if self._every and self.asks.shape[1] == 1:
            return self.probabilities.mean(1)[:, 0]
        weight = self.asks[..., None].float()
        return (self.probabilities.mean(1) * weight).sum(1) / weight.sum(1).clamp(min=1)

    def rotation(self) -> Tensor:
        """What the rotary positions alone would make of queries and keys of ones: their scaled products, [B, Q, T]."""
        return self._rotation()


@dataclass(frozen=True)
class Block:
    """Where all prompts have their visual tokens, one after the other, and after them their one query token.

    Attributes:
        start: Place of the first visual token among those alive.
        stop: Place after the last one.
        query: Place of the query token.
    """

    start: int
    stop: int
    query: int

    def resized(self, count: int) -> Block:
        """With so many visual tokens instead."""
        return Block(self.start, self.start + count, self.query + count - (self.stop - self.start))


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
        originals: Visual tokens of each prompt before anything was dropped.
        stays: How many visual tokens of each prompt are to stay as they are, pinned ones among them, as `plan` says:
            for methods that choose a set. None in `begin`, in `plan`, and where the method finds the number itself.
        output: What the layer made of `hidden`, which is what enters the boundary, [B, T, D]. None unless the method
            observes the layer in front.
        block: Where the visual tokens of all prompts are, if they are at the same places without padding, known
            without asking the device: a method may slice where it would have to sort. None: anything else.
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
    _texts: Callable[[Tensor, Tensor], list[str]]

    @property
    def ids(self) -> Tensor:
        """Input ids of the tokens alive, [B, T]; of a merged token, its centre's."""
        return self._ids()

    def attention(self, rows: Tensor | None = None, most: int | range | None = None) -> Tensor:
        """Attention that each token gets in this layer, mean over heads and over the asking tokens, [B, T] float32.

        Softmax in float32 over the whole causal row, text keys included, with the layer's own projections and the
        rotary positions of the moment; only the asking rows are computed, so any attention backend will do.

        Args:
            rows: Which tokens ask, [B, T] bool; default: the query tokens.
            most: A bound on how many of a prompt ask; where there is a `block`, the places outside of which none does.
                Without one, the number is read from the device.
        """
        return self._attention(rows, most, True).mean()

    def attention_rows(
        self, rows: Tensor | None = None, most: int | range | None = None, rotated: bool = True
    ) -> AttentionRows:
        """The same before any mean is taken, head by head; `rotated=False`: as if all tokens stood at one place.

        Without rotary positions the layer's keys are computed anew, also where it has run.
        """
        return self._attention(rows, most, rotated)

    def keys(self) -> Tensor:
        """The layer's keys with their rotary positions, [B, key heads, T, head size]; no copy where it has run."""
        return self._keys()

    def final_norm(self, states: Tensor) -> Tensor:
        """The decoder's last normalisation, the one before lm_head, [..., D]."""
        return self._norm(states)

    @property
    def tower(self) -> Tower:
        """What the vision tower made of the pictures.

        Raises:
            ValueError: If the method does not declare that it looks (`tower_layers`), or the tower cannot be read.
        """
        return self._tower()

    def visual_places(self, row: int) -> Tensor:
        """Where the visual tokens of a prompt that may be dropped stand among those alive, ascending, [n]."""
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
        seen, asks = self.visual.cumsum(1), self.query.cumsum(1)
        text, after = self.valid & ~self.visual, seen == seen[:, -1:]
        return text & after & ((asks < asks[:, -1:]) | self.query)

    def texts(self) -> list[str]:
        """The `question` of each prompt as text, without special tokens.

        Raises:
            ValueError: If no tokenizer was given: attach(..., tokenizer=).
        """
        return self._texts(self.ids, self.question())

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
        makes: How many are made of those that go, likewise; None: as the method's `merges` says.
    """

    scores: Tensor
    stays: Tensor
    makes: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """Tokens made from visual tokens that go. Prompts that make fewer than M are filled up with anything.

    Attributes:
        states: [B, M, D].
        centres: Which of the T tokens each stands for, [B, M]: it takes its place, and with original positions its
            position. All different, and among those that go.
        weights: What each was made of, [B, M, T] float32: 0 for tokens without a part in it.
        after: Which of the T tokens each stands after (at its place, if that one goes), [B, M]; -1: before the
            prompt. Several after the same one stand in the order of M. No text may come to stand before what was
            made from pictures that follow it. None: after the prompt's last visual token that could go.
        moved: Made tokens of a single part are that token, only standing elsewhere: it counts as kept.
    """

    states: Tensor
    centres: Tensor
    weights: Tensor
    after: Tensor | None = None
    moved: bool = False
