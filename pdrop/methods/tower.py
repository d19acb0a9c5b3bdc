"""What a method can read of the vision tower if it declares `Method.tower_layers`.

Shapes: P pictures, tiles, crops and frames that went through the tower, R rows of each (class token included), d its
width, B prompts, L tokens of the padded prompts, T tokens alive, D the decoder's hidden size.

Some towers end in a merger that makes one token of several patches (Qwen's: 2 x 2). There R is the number of tokens of
the largest picture, other pictures are padded with zeros, and a token's value is the sum (attention) or the mean (keys)
over its patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def layer_number(layer: float, count: int) -> int:
    """The number of a layer among `count` ones, from 0 on.

    Args:
        layer: As `Method.tower_layers` names it: counted from 0 or, negative, from the end; a fraction between 0 and 1
            is a share of the depth: the last layer of the first round(layer * count), at least the first one.
        count: Layers of the tower.
    """
    return max(1, round(layer * count)) - 1 if 0 < layer < 1 else int(layer) % count


@dataclass(frozen=True)
class Tile:
    """One picture, tile or crop of a prompt, as the tower saw it.

    Attributes:
        number: Which of the P it is.
        places: Places in the padded prompt of the tokens made from it, in the order of its patches. Fewer than its
            patches if padding was cut away.
        rows: How many of the R rows are its own.
    """

    number: int
    places: tuple[int, ...]
    rows: int = 1


@dataclass(frozen=True)
class Tower:
    """What the vision tower made of this forward's pictures, before the projector.

    Attributes:
        states: The projector's input, with the class token if there is one, [P, R, d]. For a tower that ends in a
            merger: the tokens that it makes, [P, R, D].
        classes: Leading rows that are not patches: 1 (CLIP) or 0 (SigLIP).
        source: The row, counted through all P * R, that the token at each place of the padded prompts was made from,
            [B, L]; -1: text, padding, newlines.
        pictures: For each prompt, its pictures in order, and the tiles of each: the small picture first, if it is
            tiled.
        merges: How many patches make one token: 1, or 4 where a merger ends the tower.
    """

    states: Tensor
    classes: int
    source: Tensor
    pictures: list[list[list[Tile]]]
    _rows: Callable[[float], Tensor]
    _received: Callable[[float], Tensor]
    _read: Callable[[float], Tensor]
    _keys: Callable[[float], Tensor]
    _query: Callable[[float], Tensor]
    _project: Callable[[Tensor], Tensor]
    merges: int = 1

    def rows(self, layer: float) -> Tensor:
        """What the class token attends to in a layer of the tower, [P, heads, R] float32: softmax over all R keys.

        Without a class token, the mean over all rows. Only the rows needed are computed, once per forward, with any
        attention backend of the tower.
        """
        return self._rows(layer)

    def received(self, layer: float) -> Tensor:
        """What each row gets of the attention of all rows, the class token's too: the mean, [P, heads, R] float32.

        Without a class token, as `rows`. Costs R rows of attention; computed once per forward.
        """
        return self._received(layer)

    def rows_on_host(self, layer: float) -> Tensor:
        """The same on the host, read once per forward."""
        return self._read(layer)

    def keys(self, layer: float) -> Tensor:
        """Keys of all rows in a layer of the tower, with bias, [P, heads, R, head size]. Computed once per forward."""
        return self._keys(layer)

    def query(self, layer: float) -> Tensor:
        """The class token's query in a layer of the tower, with bias, not scaled, [P, heads, head size]."""
        return self._query(layer)

    def project(self, states: Tensor) -> Tensor:
        """The model's own projector applied to states, [..., d] -> [..., D]; a merger's tokens come back unchanged."""
        return self._project(states)

    def at(self, index: Tensor) -> Tensor:
        """The row that each token alive was made from, [B, T]; -1: none.

        Args:
            index: `view.index`.
        """
        return self.source.to(index.device).gather(1, index)

    def of(self, index: Tensor, values: Tensor) -> Tensor:
        """For each token alive, the value of the row it was made from, [B, T, ...]; zeros if there is none.

        Args:
            index: `view.index`.
            values: A value for each row, [P, R, ...].
        """
        at = self.at(index)
        found = values.flatten(0, 1)[at.clamp(min=0).to(values.device)].to(index.device)
        return found.masked_fill((at < 0).reshape(at.shape + (1,) * (found.ndim - 2)), 0)
