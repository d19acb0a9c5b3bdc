"""Two methods, one after the other: one before the decoder and one inside it (VisionZip, then PyramidDrop).

The first method ranks at boundary 0, the second at all other boundaries. Fractions are of the prompt's ORIGINAL
visual tokens for both; tokens that the first merged can be dropped or merged by the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pdrop.methods.base import Merged, Method, Positions, Ranking, View
from pdrop.schedule import Schedule, Stage, pyramid
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Composed(Method):
    """`front` at boundary 0, `inside` at all others. `positions` is this method's; theirs are ignored.

    Attributes:
        front: A method that ranks without the decoder's attention.
        inside: Any method.
    """

    front: Method = field(default_factory=Method)
    inside: Method = field(default_factory=Method)
    positions: Positions = field(default="compact", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        front = type(self.front).__name__
        if self.front.ranks_by_attention or self.front.observe or self.front.adaptive:
            raise ValueError(
                f"front is a method of fixed numbers that works before the decoder, such as VisionZip, not {front}"
            )
        if self.front.pixels != 1 or self.inside.pixels != 1:
            raise ValueError("a control that makes the picture smaller is not part of a composition")
        if self.inside.looks_at() is not None:
            raise ValueError(f"{type(self.inside).__name__} works before the decoder: it is front, not inside")

    # ------------------------------------------------------------------ who has which boundary

    def at(self, stage: Stage) -> Method:
        """The part that ranks at a stage."""
        return self.inside if stage.layer else self.front

    def looks_at(self) -> tuple[float, ...] | None:
        """`tower_layers` of the first part."""
        return self.front.looks_at()

    def looks_at_merged(self) -> tuple[float, ...] | None:
        return self.front.looks_at_merged()

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """Whether the second part finds its numbers."""
        return self.inside.adaptive

    @property
    def ranks_by_attention(self) -> bool:  # type: ignore[override]
        """Whether the second part reads attention rows."""
        return self.inside.ranks_by_attention

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule without boundary 0, or one that a part cannot follow.

        Raises:
            ValueError: Saying why, and what to do.
        """
        front, inside = halves(schedule)
        if not front or not inside:
            raise ValueError(f"Composed takes boundary 0 and others, not {schedule}: layers=[0, 8, 16, 24]")
        self.front.check(front)
        self.inside.check(inside)

    # ------------------------------------------------------------------ how many

    def count(self, stage: Stage, visual: int) -> int:
        return self.at(stage).count(stage, visual)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        return self.at(stage).stays(stage, visual, now)

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        assert view.stage is not None
        return self.at(view.stage).plan(view, visual)

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """What the first part leaves, and what the second part leaves of that."""
        front, inside = halves(schedule.check(num_layers))
        now = self.front.tokens_per_layer(front, visual, num_layers)[0]
        return self.left_inside(inside, visual, now, num_layers)

    def left_inside(self, schedule: Schedule, visual: int, now: int, num_layers: int) -> list[int]:
        """Visual tokens that enter each layer if `now` of `visual` enter layer 0."""
        entering, by_layer = [], {stage.layer: stage for stage in schedule}
        for layer in range(num_layers):
            if layer in by_layer:
                stay = self.inside.stays(by_layer[layer], visual, now)
                now = stay + self.inside.merges(now - stay)
            entering.append(now)
        return entering

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """As `tokens_per_layer`, for a prompt whose tiles may be known."""
        front, inside = halves(schedule.check(num_layers))
        now = self.front.entering(front, prompt, num_layers)[0]
        whole = [float(n) for n in self.left_inside(inside, round(prompt.visual), round(now), num_layers)]
        return whole if round(now) == now else [n * now / max(1, round(now)) for n in whole]

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """`ratio` at boundary 0; inside, the second part's own schedule at 0.5, of what is left."""
        inside = self.inside.dial(0.5, num_layers, None if layers is None else [n for n in layers if n])
        return after_front(ratio, inside)

    # ------------------------------------------------------------------ which

    def begin(self, view: View) -> Any:
        """`begin` of the second part."""
        return self.inside.begin(view)

    def score(self, view: View) -> Tensor | Ranking:
        assert view.stage is not None
        return self.at(view.stage).score(view)

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        assert view.stage is not None
        return self.at(view.stage).merge(view, scores, goes, going)

    # ------------------------------------------------------------------ what it costs

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """The sum of both parts' selection costs."""
        front, inside = halves(schedule)
        if not schedule or not prompt.visual:
            return SelectionCost()
        first = replace(prompt, visual_per_layer=prompt.visual_per_layer[:1] * sizes.layers)
        before, after = (self.front.selection(front, first, sizes), self.inside.selection(inside, prompt, sizes))
        return replace(after, tower_rows=before.tower_rows, macs=before.macs + after.macs)


def halves(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The stage at boundary 0, and the others."""
    stages = tuple(schedule)
    return Schedule(stages[:1] if stages and not stages[0].layer else ()), Schedule(
        tuple(stage for stage in stages if stage.layer)
    )


def after_front(ratio: float, inside: Schedule) -> Schedule:
    """`ratio` before the decoder, and a schedule's fractions of that inside."""
    stages = [Stage(stage.layer, ratio * (stage.keep or 0.0)) for stage in inside if stage.keep is not None]
    if len(stages) != len(inside):
        raise ValueError(f"a composition takes fractions, not {inside}")
    return Schedule((Stage(0, ratio), *stages))


def front_then_pyramid(
    num_layers: int,
    ratio: float = 1 / 3,
    inside: float = 0.5,
    stages: int = 4,
    layers: Sequence[int] | None = None,
) -> Schedule:
    """A cut before the decoder and a pyramid of what is left.

    Args:
        num_layers: Layers of the decoder.
        ratio: Share of the original tokens that enters the decoder.
        inside: The pyramid's own ratio.
        stages: Its stages.
        layers: Its boundaries, instead of stages.

    Raises:
        ValueError: If a ratio is not a fraction, or the boundaries do not fit the layers.
    """
    own = None if layers is None else [layer for layer in layers if layer]
    return after_front(ratio, pyramid(num_layers, stages, inside, own))
