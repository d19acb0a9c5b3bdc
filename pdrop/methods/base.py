"""What a method is: it ranks the visual tokens of a prompt, and knows nothing of models.

A method is one small class with one function, `score`. It works on a `View`: what the engine shows of the tokens
alive at one layer. Where and how many tokens go is the schedule's business (pdrop/schedule.py), removing them is the
engine's (pdrop/engine). A new method is a file beside this one and a YAML in conf/method/; nothing else is touched.

A method that also merges says how many tokens it makes of those that go (`merges`) and makes them (`merge`). One that
must see the prompt before the first layer looks at it in `begin`. Methods are frozen: what a forward has to remember
is what `begin` returns, and belongs to that forward.

Shapes in this package: B prompts of a batch, L tokens of the padded prompts, T tokens alive (padding included), Q
asking tokens, M merged tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pdrop.schedule import Schedule, Stage, kept

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["compact", "original"]


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
    begun: Any
    _attention: Callable[[Tensor | None, int | None], AttentionRows]
    _draw: Callable[[int], Tensor]

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

    # ------------------------------------------------------------------ how many

    def count(self, stage: Stage, visual: int) -> int:
        """How many of a prompt's `visual` original visual tokens stay from `stage` on: the method's rounding rule."""
        return kept(stage, visual)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """How many of the `now` visual tokens in front of the boundary stay as they are."""
        return min(now, self.count(stage, visual))

    def merges(self, going: int) -> int:
        """How many tokens are made of `going` ones that go, at least 1 each. 0: this method only drops."""
        return 0

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """Visual tokens that enter each layer, merged ones included, for a prompt of `visual` ones."""
        entering, now = [], visual
        by_layer = {stage.layer: stage for stage in schedule.check(num_layers)}
        for layer in range(num_layers):
            if layer in by_layer:
                stay = self.stays(by_layer[layer], visual, now)
                now = stay + self.merges(now - stay)
            entering.append(now)
        return entering

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The method's own schedule at a ratio, as its file in conf/method/ has it: what `pdrop.solve` turns.

        Args:
            ratio: What the command line's dial `ratio` says.
            num_layers: Layers of the decoder.
            layers: Boundaries, where they are not the method's own.

        Raises:
            ValueError: If the method has none.
        """
        raise ValueError(f"{type(self).__name__} has no schedule of its own: give solve(dial=...)")

    # ------------------------------------------------------------------ which

    def begin(self, view: View) -> Any:
        """Look at what enters layer 0, once a prefill. What is returned is `begun` in every later view."""
        return None

    def score(self, view: View) -> Tensor:
        """Rank the tokens: [B, T] float32, higher = stays. Entries at other than visual tokens are ignored.

        Equal scores are broken by place: the earlier token stays.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """Make `merges(going[b])` tokens of those of prompt b that go. Called if any prompt makes one.

        They will stand behind the prompt's last visual token and in front of the text that follows it, count as
        visual, and can be dropped or merged again.

        Args:
            view: The input of the boundary's layer: the same tokens as when they were ranked, also where the method
                observes the layer in front.
            scores: [B, T], as `score` gave them.
            goes: Which tokens go, [B, T] bool.
            going: How many of each prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merge(view, scores, goes, going)")

    # ------------------------------------------------------------------ what it costs

    def asking(self, text_tokens: float) -> float:
        """How many rows of attention a prompt with so much text asks for at a boundary."""
        return 1

    def own_macs(
        self, schedule: Schedule, visual: int, text_tokens: float, num_layers: int, hidden: int, head_dim: int
    ) -> float:
        """Multiply-adds of the method's own matrix products in a prefill, besides the attention rows."""
        return 0.0
