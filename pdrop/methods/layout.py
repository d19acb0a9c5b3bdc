"""Where a prompt's visual tokens are in its pictures, for methods that thin out a grid or have shares per image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenGrid:
    """A rectangle of visual tokens: a picture, a tile of one, a frame of a video, or a column of newline tokens.

    Attributes:
        first: The number of its first token among the prompt's visual ones.
        height: Rows.
        width: Columns.
        stride: From a row's first token to the next row's; more than `width` if there are other tokens between the
            rows.
    """

    first: int
    height: int
    width: int
    stride: int

    def token(self, row: int, column: int) -> int:
        """The number of a token among the prompt's visual ones."""
        return self.first + row * self.stride + column

    def tokens(self) -> list[int]:
        """Its tokens, row by row."""
        return [self.token(row, column) for row in range(self.height) for column in range(self.width)]

    def reduced(self, keep: float) -> tuple[int, int]:
        """Rows and columns of the smaller grid that has about `keep` as many tokens and the same proportions.

        Each side shrinks by the square root of `keep`, to the nearest whole number from 1 on; a side of one stays.
        `keep` = 0 leaves nothing.
        """
        if keep <= 0 or not self.height * self.width:
            return 0, 0
        # a column of newlines shrinks with the picture's rows
        return smaller(self.height, keep), smaller(self.width, keep)

    def blocks(self, keep: float) -> Iterator[tuple[range, range]]:
        """The rows and columns that make each token of the reduced grid, row by row.

        Blocks cover the grid; where the sides do not divide, neighbours overlap by a row or a column.
        """
        height, width = self.reduced(keep)
        for row in range(height):
            for column in range(width):
                yield span(row, height, self.height), span(column, width, self.width)


def smaller(side: int, keep: float) -> int:
    """A side shrunk by the square root of `keep`, at least 1."""
    return max(1, round(side * math.sqrt(keep)))


def span(number: int, parts: int, whole: int) -> range:
    """The `number`-th of `parts` ranges that cover 0..whole-1 evenly: floor to ceiling, as in adaptive pooling."""
    return range(number * whole // parts, -((number + 1) * whole // -parts))


def square(visual: int) -> list[TokenGrid]:
    """Without other knowledge, one picture of this many tokens: a square if the number is one, else a single row."""
    side = math.isqrt(visual)
    if side * side == visual:
        return [TokenGrid(0, side, side, side)] if visual else []
    return [TokenGrid(0, 1, visual, visual)]


def reduced_count(grids: Sequence[TokenGrid], keep: float) -> int:
    """Tokens of all the reduced grids together."""
    return sum(height * width for height, width in (grid.reduced(keep) for grid in grids))
