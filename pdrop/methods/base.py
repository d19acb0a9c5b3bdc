"""What a method is: it ranks the visual tokens of a prompt, and knows nothing of models.

A method is one small class with one function, `score`. It works on a `View`: what the engine shows of the tokens
alive at one layer. Where and how many tokens go is the schedule's business (pdrop/schedule.py), removing them is the
engine's (pdrop/engine). A new method is a file beside this one and a YAML in conf/method/; nothing else is touched.

Shapes in this package: B prompts of a batch, T tokens alive (padding included), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pdrop.schedule import Stage, kept

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["compact", "original"]


@dataclass(frozen=True)
class View:
    """The sequence that enters one decoder layer, as a method sees it. Read-only.

    Attributes:
        layer: The layer whose input this is, 0-based.
        hidden: Hidden states on the layer's input, [B, T, D].
        index: Place of each token in its padded prompt, [B, T].
        valid: Whether it is a token, not padding, [B, T] bool.
        visual: Whether it is a visual token that may be dropped, [B, T] bool.
        query: Whether it is a query token, [B, T] bool: the last instruction token; with labels, the token in front
            of each answer.
    """

    layer: int
    hidden: Tensor
    index: Tensor
    valid: Tensor
    visual: Tensor
    query: Tensor
    _attention: Callable[[Tensor | None], Tensor]
    _draw: Callable[[int], Tensor]

    def attention(self, rows: Tensor | None = None) -> Tensor:
        """Attention that each token gets in this layer, mean over heads and over the asking tokens, [B, T] float32.

        Softmax in float32 over the whole causal row, text keys included, with the layer's own projections and the
        rotary positions of the moment; only the asking rows are computed, so any attention backend will do.

        Args:
            rows: Which tokens ask, [B, T] bool; default: the query tokens.
        """
        return self._attention(rows)

    def draw(self, seed: int) -> Tensor:
        """Uniform numbers in [0, 1), [B, T] float32, seeded by (`seed`, layer, the prompt's own token ids).

        The same prompt gets the same numbers in any batch, under any padding, and with its answer appended.
        """
        return self._draw(seed)


@dataclass(frozen=True)
class Method:
    """Ranks visual tokens. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    Attributes:
        positions: After a drop, position ids are renumbered 0..n-1 ("compact") or kept with gaps ("original").
        observe: 0 = rank with the layer at the boundary, on its input; -1 = with the layer in front of it, on that
            layer's input, as methods do that read the attention of a layer that has already run.
        ranks_by_attention: Whether `score` asks for attention rows (the cost model counts them).
    """

    positions: Positions = field(default="original", kw_only=True)
    observe: ClassVar[int] = 0
    ranks_by_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is one of {', '.join(get_args(Positions))}, not {self.positions!r}")

    def count(self, stage: Stage, visual: int) -> int:
        """How many of a prompt's `visual` original visual tokens stay from `stage` on: the method's rounding rule."""
        return kept(stage, visual)

    def score(self, view: View) -> Tensor:
        """Rank the tokens: [B, T] float32, higher = stays. Entries at other than visual tokens are ignored.

        Equal scores are broken by place: the earlier token stays.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")
