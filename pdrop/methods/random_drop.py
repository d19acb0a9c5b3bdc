"""Random: the control that every method must beat at the same schedule.

Give it the schedule of the method it is compared with (its twin), and several seeds: a single draw proves nothing.
`twin_of` makes the exact twin of any method: as many tokens in every layer, by that method's own rounding, merged ones
included; the same positions; other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pdrop.methods.base import Method, Ranking, View
from pdrop.schedule import Schedule, Stage, pyramid
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomDrop(Method):
    """Uniform scores, seeded per prompt: the same prompt loses the same tokens whatever the batch.

    Attributes:
        seed: Seed of the draw.
        like: The method whose numbers of tokens are used; None: int(n * keep). For each token that it would merge from
            others, one more token stays here.
    """

    seed: int = 0
    like: Method | None = None
    ranks_by_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed is a whole number, not {self.seed!r}")

    def check(self, schedule: Schedule) -> None:
        """The check of `like`, which decides which schedules it can count for."""
        if self.like is None:
            super().check(schedule)
        else:
            self.like.check(schedule)

    def looks_at(self) -> tuple[float, ...] | None:
        """No layers, but the tower's map of tokens to tiles, if `like` counts by tiles."""
        return None if self.like is None or self.like.looks_at() is None else ()

    def looks_at_merged(self) -> tuple[float, ...] | None:
        """The same, if `like` has a rule for such towers."""
        return None if self.like is None or self.like.looks_at_merged() is None else ()

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """As many as enter each layer under `like`."""
        if self.like is None:
            return super().tokens_per_layer(schedule, visual, num_layers)
        return self.like.tokens_per_layer(schedule, visual, num_layers)

    def stays(self, stage: Stage, visual: int, now: int) -> int:
        """int(n * keep), or as many as `like` has after the boundary."""
        if self.like is None:
            return super().stays(stage, visual, now)
        stay = self.like.stays(stage, visual, now)
        return stay + self.like.merges(now - stay)

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> list[float]:
        """As many as enter each layer under `like`."""
        if self.like is None:
            return super().entering(schedule, prompt, num_layers)
        return self.like.entering(schedule, prompt, num_layers)

    @property
    def priced_as(self) -> Method:
        """`like`: a twin has its method's schedule under any budget, though it pays for no ranking."""
        return self if self.like is None else self.like.priced_as

    def plan(self, view: View, visual: Sequence[int]) -> list[tuple[int, int]]:
        """For each prompt, what `like` keeps and makes together; nothing is merged."""
        if self.like is None:
            return super().plan(view, visual)
        return [(stay + made, 0) for stay, made in self.like.plan(view, visual)]

    def score(self, view: View) -> Tensor:
        """Uniform numbers, [B, T]."""
        return view.draw(self.seed)

    def dial(self, ratio: float, num_layers: int, layers: Sequence[int] | None = None) -> Schedule:
        """The schedule of `like`; PyramidDrop's without one."""
        if self.like is not None:
            return self.like.dial(ratio, num_layers, layers)
        return pyramid(num_layers, ratio=ratio, layers=layers)


@dataclass(frozen=True)
class RandomAdaptive(RandomDrop):
    """The twin of a method that finds its numbers during the forward: the method itself is run for them, at its cost.

    The method sees the tokens left by the random drop, so its numbers are those that it finds for these tokens.
    """

    ranks_by_attention: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    observe: int = field(default=-1, kw_only=True)  # type: ignore[misc]

    def at(self, stage: Stage) -> Method:
        """The twin of the part that ranks at a stage."""
        part = self.like if self.like is None else self.like.at(stage)
        if part is self.like or part is None:
            return self
        return twin_of(part, self.seed)

    def looks_at(self) -> tuple[float, ...] | None:
        return None if self.like is None else self.like.looks_at()

    def looks_at_merged(self) -> tuple[float, ...] | None:
        return None if self.like is None else self.like.looks_at_merged()

    def begin(self, view: View) -> Any:
        """`begin` of the method."""
        return self.like.begin(view) if self.like is not None else None

    def score(self, view: View) -> Tensor | Ranking:  # type: ignore[override]
        """Uniform numbers, [B, T]; the method says how many stay."""
        import torch

        assert self.like is not None
        found, drawn = self.like.score(view), view.draw(self.seed)
        if not isinstance(found, Ranking):
            return drawn
        if found.makes is not None:
            return Ranking(drawn, found.stays + found.makes, torch.zeros_like(found.stays))
        counts = zip(found.stays.tolist(), view.visual_counts)
        stays = [n + self.like.merges(max(0, now - n)) for n, now in counts]
        return Ranking(drawn, torch.tensor(stays))

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        """The method's own cost: an upper bound, since nothing is merged here."""
        assert self.like is not None
        return self.like.selection(schedule, prompt, sizes)


def twin_of(method: Method, seed: int = 0) -> RandomDrop:
    """The random twin of a method, for the same schedule.

    Raises:
        ValueError: If the method is random itself.
    """
    if isinstance(method, RandomDrop):
        raise ValueError("a random method is its own control: twin=true is for the method it is compared with")
    if method.pixels != 1:
        raise ValueError(f"{type(method).__name__} drops no token: it has no random twin")
    if method.adaptive:
        return RandomAdaptive(seed=seed, like=replace(method), positions=method.positions, observe=method.observe)
    return RandomDrop(seed=seed, like=replace(method), positions=method.positions)
