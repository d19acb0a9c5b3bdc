"""State: of a running forward, and on a cache between forwards.

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

# the part of each query and key head that a layer rotates: all that its module's function rotates, the first
# part alone (as far as the angles reach), nothing
Turns = Literal["all", "part", "nothing"]


def no_tower() -> Tower:
    """Stands in for the tower's reader if the method does not declare `tower_layers`.

    Raises:
        ValueError: Always.
    """
    raise ValueError("view.tower is kept for methods that declare that they look: set tower_layers in the class")


def no_texts() -> list[str]:
    """Stands in for the prompts' text if no tokenizer was given.

    Raises:
        ValueError: Always.
    """
    raise ValueError("this method reads the question's text: attach(model, method, schedule, tokenizer=TOKENIZER)")


AHEAD = 256  # decoding steps for which a key mask is allocated in advance


@dataclass(frozen=True)
class KeyMask:
    """Which cached keys of a stage are tokens, not padding or fillers. All later keys are tokens."""

    tokens: Tensor  # [B, N] bool, True from `length` on
    length: int

    @classmethod
    def of(cls, tokens: Tensor) -> KeyMask:
        """The mask of the keys so far, [B, n] bool."""
        ahead = tokens.new_ones(len(tokens), AHEAD)
        return cls(torch.cat([tokens, ahead], 1), tokens.shape[1])

    def reaching(self, keys: int) -> KeyMask:
        """The same with an entry for each of `keys` keys."""
        if keys <= self.tokens.shape[1]:
            return self
        return replace(self, tokens=torch.cat([self.tokens, torch.ones_like(self.tokens[:, :1]).repeat(1, keys)], 1))

    @functools.cached_property
    def _whole(self) -> Tensor:
        return self.tokens[:, : self.length].sum(1, keepdim=True)

    def count(self, keys: int) -> Tensor:
        """How many of the first `keys` keys are tokens, [B, 1]; a decoding step launches one operation for it."""
        if keys < self.length:
            return self.tokens[:, :keys].sum(1, keepdim=True)
        return self._whole if keys == self.length else self._whole + (keys - self.length)


@dataclass(frozen=True)
class Past:
    """What a cache filled by a pruned forward remembers about it."""

    schedule: Schedule
    positions: str  # as of pdrop.methods.base.Method
    whole: dict[int, KeyMask | None]  # boundary layer -> which keys from there on are tokens; None: all of them
    padded: bool  # was there padding among the tokens that came in?

    def check(self, schedule: Schedule, positions: str) -> None:
        """Refuse to continue under another schedule or other positions.

        Raises:
            ValueError: Naming both.
        """
        if schedule != self.schedule:
            raise ValueError(f"this cache was filled under the schedule {self.schedule}, not {schedule}")
        if positions != self.positions:
            raise ValueError(f"this cache was filled with positions={self.positions!r}, not {positions!r}")


@dataclass
class Forward:
    """The state of one running forward of the model."""

    prompts: Prompts | None  # None: the input has nothing to drop
    alive: Alive | None
    mask: Tensor | None  # [B, past + new] attention mask as passed to the model
    padded: bool  # is there padding among the new tokens that came in?
    turns: Sequence[Turns]  # per layer: see pdrop.engine.probe
    samples: list[str] | None = None  # names of the prompts, mixed into the seeds of their draws
    study: bool = False  # is the attention of the query tokens to be recorded?
    dropped: bool = False  # has this forward dropped anything yet?
    staged: bool = False  # has anything been dropped before the current layer, in this forward or an earlier one?
    past: int = 0  # keys that the current stage has cached
    whole: Tensor | None = None  # [B, past + new] which keys of the current stage are tokens; None: all of them
    held: KeyMask | None = None  # in a decoding step, the same of those that are cached
    handed: dict[str, Any] = field(default_factory=dict)  # arguments that replace each layer's in the current stage
    begun: Any = None  # what the method's `begin` returned
    pending: Tensor | Ranking | None = None  # [B, T] scores for the next boundary, observed in the layer before it
    deepstack: list[Tensor] | None = None  # [B, T, D] each: features to be added after the first layers
    memo: dict[str, Any] = field(default_factory=dict)  # rotary embeddings and mask of the current stage
    norm: Callable[[Tensor], Tensor] = lambda states: states  # the decoder's final normalisation
    tower: Callable[[], Tower] = no_tower  # reads the vision tower
    texts: Callable[[], list[str]] = no_texts  # each prompt's question
    layout: Callable[[], list[list[TokenGrid]]] | None = None  # reads where visual tokens are in their pictures
    grids: list[list[TokenGrid]] | None = None  # the result of `layout`

    def images(self) -> list[list[TokenGrid]]:
        """The grids of each prompt's original visual tokens, read once, if a method asks for them."""
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
