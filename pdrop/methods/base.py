"""What a method is: it ranks the visual tokens of a prompt, and knows nothing of models.

A method is one small class with one function, `score`. It works on a `View`: what the engine shows of the tokens
alive at one layer. The schedule says where and how many tokens go (pdrop/schedule.py); removing them is the
engine's work (pdrop/engine). A new method is a file in this folder and a YAML in conf/method/; nothing else is touched.

A method that also merges says how many tokens it makes of those that go (`merges`) and makes them (`merge`). A method
that must see the prompt before the first layer has `begin`. If the number of tokens depends on the picture's grid, the
method overrides `plan`; if it depends on the scores, `score` returns a `Ranking`. Methods are frozen: what has to be
remembered during a forward is returned by `begin`, and belongs to that forward.

What a method sees is in pdrop/methods/view.py, and for the vision tower, if it reads that, in pdrop/methods/tower.py.
Shapes: B prompts of a batch, L tokens of the padded prompts, T tokens alive (padding included), M merged tokens, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pdrop.methods.view import AttentionRows, Merged, Ranking, View
from pdrop.schedule import Schedule, Stage, kept
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AttentionRows", "Merged", "Method", "Positions", "Ranking", "View"]

Positions = Literal["compact", "original"]


@dataclass(frozen=True)
class Method:
    """Ranks visual tokens. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    Attributes:
        positions: After a drop, position ids are renumbered 0..n-1 ("compact") or kept with gaps ("original").
        observe: 0 = rank with the layer at the boundary, on its input; -1 = with the layer before it, on that
            layer's input, as methods do that read the attention of a layer that has already run. Methods that rank by
            attention have it as a field: re-implementations differ in it.
        ranks_by_attention: Whether `score` asks for attention rows (the cost model counts them).
        pixels: Share of a picture's pixels that the processor is given.
        adaptive: Whether it can find the number of tokens at adaptive stages.
        one_boundary: Whether its schedule has one boundary only.
        tower_layers: Layers of the vision tower whose attention or keys it reads in `view.tower`, counted from 0 or,
            negative, from the end, or as a share of the tower's depth between 0 and 1 (0.375 is the ninth of 24); () if
            it only reads states. None: it does not look at the tower, and nothing of it is kept.
        merged_tower_layers: The same for a tower that makes one token of several patches (Qwen's). None: its authors
            have no rule for such towers, which are refused.
        class_token: Whether it needs the tower's class token, which SigLIP's and Qwen's towers lack.
    """

    positions: Positions = field(default="original", kw_only=True)
    observe: ClassVar[int] = 0
    ranks_by_attention: ClassVar[bool] = True
    pixels: ClassVar[float] = 1.0
    adaptive: ClassVar[bool] = False
    one_boundary: ClassVar[bool] = False
    tower_layers: ClassVar[tuple[float, ...] | None] = None
    merged_tower_layers: ClassVar[tuple[float, ...] | None] = None
    class_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is one of {', '.join(get_args(Positions))}, not {self.positions!r}")
        if self.observe not in (0, -1):
            raise ValueError(f"observe is 0 (the layer at the boundary) or -1 (before it), not {self.observe!r}")

    @property
    def parts(self) -> list[Method]:
        """The method, and those that it uses: a random twin takes its numbers of tokens from another."""
        return [self, *(value for value in vars(self).values() if isinstance(value, Method))]

    def arguments(self) -> dict[str, Any]:
        """All parameters that change what it does, except `positions`, as plain values: part of a run's identity."""
        found: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            usual = one.name == "observe" and value == one.default
            if one.name != "positions" and value is not None and not usual:
                nested = isinstance(value, Method)
                found[one.name] = {"method": type(value).__name__, **value.arguments()} if nested else value
        return found

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule that this method cannot follow.

        Raises:
            ValueError: Saying why, and what to do.
        """
        name = type(self).__name__
        if self.observe < 0 and 0 in schedule.layers:
            raise ValueError(f"{name} ranks by the layer before its boundary, and boundary 0 has none: layers=[1]")
        if self.one_boundary and len(schedule) > 1:
            raise ValueError(f"{name} takes a schedule of one boundary, not {schedule}: layers=[0]")
        if not self.adaptive and any(stage.adaptive for stage in schedule):
            raise ValueError(f"{name} does not find its own numbers of tokens: give it fractions, not {schedule}")

    def at(self, stage: Stage) -> Method:
        """The method that ranks at a stage, for a method made of several."""
        return self

    def looks_at(self) -> tuple[float, ...] | None:
        """`tower_layers`; for a random twin, what its numbers of tokens need."""
        return self.tower_layers

    def looks_at_merged(self) -> tuple[float, ...] | None:
        """`merged_tower_layers`; for a random twin, what its numbers of tokens need."""
        return self.merged_tower_layers

    # ------------------------------------------------------------------ how many

    def count(self, stage: Stage, visual: int) -> int:
        """How many of a prompt's `visual` original visual tokens stay from `stage` on: the method's rounding rule."""
        return kept(stage, visual)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """How many of the `now` visual tokens before the boundary stay as they are."""
        return min(now, self.count(stage, visual))

    def merges(self, going: int) -> int:
        """How many tokens are made of `going` dropped ones, each of at least one. 0: this method only drops."""
        return 0

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """For each prompt, how many of its visual tokens stay as they are, and how many are made of those that go.

        Args:
            view: The input of the boundary's layer.
            visual: The prompts' ORIGINAL numbers of visual tokens.
        """
        assert view.stage is not None
        stay = [self.stays(view.stage, original, now) for original, now in zip(visual, view.visual_counts)]
        return [(n, self.merges(now - n)) for n, now in zip(stay, view.visual_counts)]

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """Visual tokens that enter each layer, merged ones included, for a prompt of `visual` ones.

        If the numbers depend on the picture's grid, one square picture is assumed.

        Raises:
            ValueError: If a stage is adaptive.
        """
        entering, now = [], visual
        by_layer = {stage.layer: stage for stage in schedule.check(num_layers)}
        for layer in range(num_layers):
            if layer in by_layer:
                stay = self.stays(by_layer[layer], visual, now)
                now = stay + self.merges(now - stay)
            entering.append(now)
        return entering

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """Visual tokens that enter each layer: `tokens_per_layer` for a prompt whose pictures may be known too.

        If `prompt.visual` is a mean, the nearest whole number is used and the result scaled. See `PromptSize.under`.
        """
        whole = round(prompt.visual)
        counts = self.tokens_per_layer(schedule, whole, num_layers)
        return (
            [float(n) for n in counts]
            if whole == prompt.visual
            else [n * prompt.visual / max(1, whole) for n in counts]
        )

    @property
    def priced_as(self) -> Method:
        """The method whose cost counts in a budget: itself; for a random twin, the method it is compared with."""
        return self

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The method's own schedule at a ratio, as in its file in conf/method/: `pdrop.solve` searches the ratio.

        Args:
            ratio: The command line's `ratio`.
            num_layers: Layers of the decoder.
            layers: Boundaries, if not the method's own.

        Raises:
            ValueError: If the method has no such schedule.
        """
        raise ValueError(f"{type(self).__name__} has no schedule of its own: give solve(dial=...)")

    # ------------------------------------------------------------------ which

    def begin(self, view: View) -> Any:
        """Look at the input of layer 0, once per prefill. The returned value is `begun` in every later view."""
        return None

    def score(self, view: View) -> Tensor | Ranking:
        """Rank the tokens: [B, T] float32, higher = stays. Entries of other than visual tokens are ignored.

        Of equal scores the earlier token's wins. At adaptive stages return a `Ranking`, which says how many stay.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        """Make the planned number of tokens of each prompt's dropped ones. Called if any prompt makes one.

        The engine places them after the prompt's last visual token and before the text that follows it, or as
        `Merged.after` says. They count as visual, and can be dropped or merged again.

        Args:
            view: The input of the boundary's layer: the same tokens as when they were ranked, also if the method
                observes the layer before.
            scores: [B, T], as `score` gave them.
            goes: Which tokens go, [B, T] bool.
            going: How many go, for each prompt.
        """
        raise NotImplementedError(f"{type(self).__name__} must define merge(view, scores, goes, going)")

    # ------------------------------------------------------------------ what it costs

    def query_rows(self, text_tokens: float) -> float:
        """How many rows of attention are computed at a boundary for a prompt with this many text tokens."""
        return 1

    def extra_macs(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> float:
        """Multiply-adds of the method's own matrix products, without the attention rows. Arguments: see `selection`."""
        return 0.0

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """What choosing tokens costs in one prefill.

        Args:
            schedule: Where tokens go.
            prompt: With the visual tokens that enter each layer.
            sizes: The model's.
        """
        return SelectionCost(
            boundaries=schedule.layers if self.ranks_by_attention else (),
            query_rows=self.query_rows(prompt.text),
            keys_cached=self.observe < 0,
            macs=self.extra_macs(schedule, prompt, sizes) if schedule and prompt.visual else 0.0,
        )
