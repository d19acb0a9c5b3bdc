"""What is remembered: while a forward runs, and on a cache between forwards.

Shapes: B prompts, T tokens alive in the current stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pdrop.engine.sequence import Alive, Prompts, take
from pdrop.methods.base import Ranking
from pdrop.methods.layout import TokenGrid
from pdrop.methods.tower import Tower
from pdrop.methods.transfer import moved
from pdrop.schedule import Schedule

# what of each query and key head a layer turns by its rotary positions: all that its module's function turns, the first
# part alone (as far as the angles reach), nothing
Turns = Literal["all", "part", "nothing"]


def no_tower() -> Tower:
    """Where the method has not said that it looks.

    Raises:
        ValueError: Always.
    """
    raise ValueError("view.tower is kept for methods that declare that they look: set tower_layers in the class")


def no_texts(ids: Tensor, mask: Tensor) -> list[str]:
    """Where no tokenizer was given.

    Raises:
        ValueError: Always.
    """
    raise ValueError("this method reads the question's text: attach(model, method, schedule, tokenizer=TOKENIZER)")


AHEAD = 256  # decoding steps whose keys are noted beforehand


@dataclass(frozen=True)
class KeyMask:
    """Which keys that a stage caches are tokens, as against padding and fillers. Of those to come, all are."""

    tokens: Tensor  # [B, N] bool, True from `length` on
    length: int

    @classmethod
    def of(cls, tokens: Tensor) -> KeyMask:
        """Of the keys so far, [B, n] bool."""
        ahead = tokens.new_ones(len(tokens), AHEAD)
        return cls(torch.cat([tokens, ahead], 1), tokens.shape[1])

    def reaching(self, keys: int) -> KeyMask:
        """With an entry for each of so many keys."""
        if keys <= self.tokens.shape[1]:
            return self
        return replace(self, tokens=torch.cat([self.tokens, torch.ones_like(self.tokens[:, :1]).repeat(1, keys)], 1))

    @functools.cached_property
    def _fillers(self) -> Tensor:
        return (~self.tokens).sum(1, keepdim=True)

    def fillers(self, keys: int) -> Tensor:
        """How many of the first `keys` keys are no tokens, [B, 1]."""
        return self._fillers if keys >= self.length else (~self.tokens[:, :keys]).sum(1, keepdim=True)


@dataclass(frozen=True)
class Past:
    """What a cache that a pruned forward filled remembers of it."""

    schedule: Schedule
    positions: str  # as of pdrop.methods.base.Method
    whole: dict[int, KeyMask | None]  # boundary layer -> which keys from there on are tokens; None: all of them
    padded: bool  # was there padding among the tokens that came in?

    def check(self, schedule: Schedule, positions: str) -> None:
        """Refuse to go on in another way.

        Raises:
            ValueError: Naming both.
        """
        if schedule != self.schedule:
            raise ValueError(f"this cache was filled under the schedule {self.schedule}, not {schedule}")
        if positions != self.positions:
            raise ValueError(f"this cache was filled with positions={self.positions!r}, not {positions!r}")


@dataclass
class Forward:
    """What is known about one forward of the model while it runs."""

    prompts: Prompts | None  # None: nothing to drop came in
    alive: Alive | None
    mask: Tensor | None  # [B, past + new] attention mask as handed to the model
    padded: bool  # is there padding among the new tokens that came in?
    turns: Sequence[Turns]  # per layer: see pdrop.engine.probe
    samples: list[str] | None = None  # names of the prompts, mixed into what is drawn for them
    study: bool = False  # is the attention of the query tokens to be noted?
    dropped: bool = False  # has this forward dropped anything yet?
    staged: bool = False  # has anything been dropped before the current layer, in this forward or an earlier one?
    past: int = 0  # keys that the current stage has cached
    whole: Tensor | None = None  # [B, past + new] which keys of the current stage are tokens; None: all of them
    fillers: Tensor | None = None  # [B, 1] in a decoding step, how many of them are not
    handed: dict[str, Any] = field(default_factory=dict)  # what each layer of the current stage is given instead
    begun: Any = None  # what the method's `begin` returned
    pending: Tensor | Ranking | None = None  # [B, T] scores observed before the boundary to come
    deepstack: list[Tensor] | None = None  # [B, T, D] each: what is added after the first layers
    memo: dict[str, Any] = field(default_factory=dict)  # rotary embeddings and mask of the current stage
    norm: Callable[[Tensor], Tensor] = lambda states: states  # the decoder's last normalisation
    tower: Callable[[], Tower] = no_tower  # what the vision tower made of the pictures
    texts: Callable[[Tensor, Tensor], list[str]] = no_texts  # ids [B, T] under a mask as text
    layout: Callable[[], list[list[TokenGrid]]] | None = None  # reads where visual tokens lie in their pictures
    grids: list[list[TokenGrid]] | None = None  # as it was read

    def images(self) -> list[list[TokenGrid]]:
        """Where the original visual tokens of each prompt lie, read once, if a method asks."""
        if self.grids is None:
            assert self.layout is not None
            self.grids = self.layout()
        return self.grids

    def names(self, device: torch.device) -> Tensor:
        """Names of the tokens alive, [B, T]: see Alive.names."""
        assert self.prompts is not None and self.alive is not None
        if self.alive.names is not None:
            return self.alive.names
        return take(moved(self.prompts.host.numbers, device), self.alive.index)
