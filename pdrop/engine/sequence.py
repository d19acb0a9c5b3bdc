"""The tokens of a forward while they get fewer: pure tensor code, no model.

Shapes: B prompts, L tokens of the padded prompts, T tokens alive, D hidden size.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pdrop.methods.transfer import on_device


def take(x: Tensor, index: Tensor) -> Tensor:
    """Row b of the result is x[b, index[b]]. x [B or 1, T, ...], index [B, T'] -> [B, T', ...]."""
    index = index.to(x.device)
    if len(x) == len(index) == 1:
        return x[:, index[0]]
    return x.expand(len(index), *x.shape[1:])[torch.arange(len(index), device=x.device)[:, None], index]


@dataclass(frozen=True)
class Prompts:
    """What came in: the padded prompts of one forward, and what they count to."""

    ids: Tensor  # [B, L]
    valid: Tensor  # [B, L] token, or padding?
    visual: Tensor  # [B, L] visual token?
    query: Tensor  # [B, L] query token?
    visual_counts: list[int]  # per row
    protected_counts: list[int]  # per row: visual tokens that are queries themselves and cannot go
    lengths: list[int]  # per row: tokens without padding
    max_queries: int  # the most query tokens of a row
    droppable: list[bool]  # per row: has visual tokens, and (in training) an answer to rank for

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.ids.shape[1]

    @functools.cached_property
    def on_the_host(self) -> tuple[Tensor, ...]:
        """ids, valid and query on the CPU, read once a forward, [3, B, L]."""
        return tuple(torch.stack([self.ids, self.valid.to(self.ids.dtype), self.query.to(self.ids.dtype)]).cpu())

    def draw(self, seed: int, layer: int, samples: list[str] | None = None) -> Tensor:
        """Uniform numbers for each place, [B, L] float32 on the CPU, drawn from each row's own ids up to its query.

        All visual tokens have one id: two pictures under one question draw alike unless `samples` names them.

        Args:
            seed: The run's.
            layer: Each boundary draws anew.
            samples: A name for each prompt; where the batch holds several copies of each (beams), they share it.

        Raises:
            ValueError: If the names do not fit the batch.
        """
        if samples is not None and (not samples or len(self.ids) % len(samples)):
            raise ValueError(f"trace.samples names {len(samples)} prompts, but the batch has {len(self.ids)}")
        copies = len(self.ids) // len(samples) if samples else 1
        drawn = torch.zeros(self.ids.shape)
        for row, (ids, valid, query) in enumerate(zip(*self.on_the_host)):
            places = valid.nonzero()[:, 0]
            end = int(query.nonzero()[-1]) if bool(query.any()) else ids.shape[0]
            own = ids[places[places <= end]].tolist()
            # a number for each place of the unpadded row: what follows the query must not shift those before it
            name = samples[row // copies] if samples else None
            state = zlib.crc32(repr((seed, layer, name, own)).encode())
            generator = torch.Generator().manual_seed(state)
            drawn[row, places] = torch.rand(self.ids.shape[1], generator=generator)[: len(places)]
        return drawn


def read_prompts(
    ids: Tensor,
    valid: Tensor,
    visual: Tensor,
    labels: Tensor | None,
    position_ids: Tensor | None,
    logits_to_keep: int = 0,
) -> Prompts:
    """Find and count visual and query tokens. One device synchronisation, whatever the batch.

    Args:
        ids: [B, L]. valid, visual: [B, L] bool. labels: [B, L], -100 = no label; the query tokens are then those
            before each answer. position_ids: as handed to the model.
        logits_to_keep: Logits are asked of the last so many tokens; without labels the first of them is the query.

    Raises:
        ValueError: If the rows are packed sequences.
    """
    visual = visual & valid
    places = valid * torch.arange(1, valid.shape[1] + 1, device=valid.device)
    last = places.argmax(1, keepdim=True)
    if 1 < logits_to_keep <= ids.shape[1]:  # the prompt comes with guesses of its continuation, as in prompt lookup
        first = ids.shape[1] - logits_to_keep
        pinned = valid[:, first] & ~visual[:, first + 1 :].any(1)
        last = torch.where(pinned[:, None], first, last)
    query = torch.zeros_like(valid).scatter_(1, last, True)
    answered = torch.ones_like(query[:, 0])
    if labels is not None:
        query = torch.zeros_like(valid)
        query[:, :-1] = (labels[:, 1:] != -100) & (labels[:, :-1] == -100)
        query &= valid
        answered = query.any(1)
    packed = torch.zeros_like(answered)
    if position_ids is not None and position_ids.ndim == 2:
        restart = (position_ids[:, 1:] < position_ids[:, :-1]) & valid[:, 1:] & valid[:, :-1]
        packed = restart.any(1).expand_as(answered)
    counts = torch.stack(
        [visual.sum(1), (visual & query).sum(1), valid.sum(1), query.sum(1), answered.int(), packed.int()]
    )
    visual_counts, protected, lengths, queries, answers, packs = counts.tolist()
    if any(packs):
        raise ValueError("token dropping does not read packed sequences (position_ids that restart): pad them instead")
    droppable = [bool(n) and bool(a) for n, a in zip(visual_counts, answers)]
    return Prompts(ids, valid, visual, query, visual_counts, protected, lengths, max(queries), droppable)


@dataclass(frozen=True)
class Alive:
    """The tokens that are left. Of each row those come first, in order; shorter rows are filled up on the right."""

    index: Tensor  # [B, T] place in the padded prompt; of a merged token, its centre's
    valid: Tensor  # [B, T] token, or padding / filler?
    visual: Tensor  # [B, T] visual?
    query: Tensor  # [B, T] query?
    visual_counts: list[int]  # per row
    lengths: list[int]  # per row
    # [B, T] a visual token's name: its number among the prompt's original ones, or -1 - m for the m-th token that was
    # merged since. None: nothing has been merged
    names: Tensor | None = None
    made: list[int] = field(default_factory=list)  # per row: tokens merged so far, those that went again included

    @classmethod
    def all_of(cls, prompts: Prompts) -> Alive:
        """Before anything is dropped: the padded prompts as they are."""
        index = torch.arange(prompts.ids.shape[1], device=prompts.ids.device).expand(prompts.ids.shape)
        return cls(index, prompts.valid, prompts.visual, prompts.query, prompts.visual_counts, prompts.lengths)

    @property
    def candidates(self) -> Tensor:
        """[B, T] visual tokens that may go: not those whose own logits are needed."""
        return self.visual & ~self.query

    @property
    def ragged(self) -> bool:
        return min(self.lengths) < self.index.shape[1]

    def to(self, device: torch.device) -> Alive:
        """With its tensors on `device`: under a device map the layers are on several."""
        if self.index.device == device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("index", "valid", "visual", "query")}
        return replace(self, **moved, names=None if self.names is None else self.names.to(device))

    def spread(self, states: Tensor, length: int) -> Tensor:
        """Every row back to its place in the padded prompt, zeros elsewhere. [B, T, D] -> [B, length, D]."""
        if self.ragged:
            states = states.masked_fill(~self.valid[..., None], 0)  # fillers differ from backend to backend
        places = self.index
        if self.ragged and self.names is not None:
            # a merged token took the place of one that went, which may be a filler's too: these go out of the way
            places = places.masked_fill(~self.valid, length)
            whole = states.new_zeros(len(states), length + 1, states.shape[2])
            return whole.scatter(1, places[..., None].expand_as(states), states)[:, :length]
        whole = states.new_zeros(len(states), length, states.shape[2])
        return whole.scatter(1, places[..., None].expand_as(states), states)

    def best(self, scores: Tensor, keep: list[int], protected: list[int]) -> Tensor:
        """Which tokens stay, [B, T] bool: text, and of each row the `keep` visual tokens with the highest scores.

        Args:
            scores: [B, T]; equal scores are broken by place, the earlier token stays.
            keep: Per row, protected ones among them.
        """
        order = scores.masked_fill(~self.candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
        chosen = on_device([k - p for k, p in zip(keep, protected)], scores.device)
        top = torch.arange(order.shape[1], device=order.device) < chosen[:, None]
        return self.valid & (~self.candidates | torch.zeros_like(top).scatter_(1, order, top))

    def shorten(self, stays: Tensor, keep: list[int]) -> tuple[Alive, Tensor]:
        """Without the tokens that go.

        Args:
            stays: [B, T] bool.
            keep: Visual tokens among them, per row.

        Returns:
            Who is left, and [B, T'] which of the T rows they were.
        """
        lengths = [n - now + then for n, now, then in zip(self.lengths, self.visual_counts, keep)]
        rows = stays.int().argsort(dim=1, descending=True, stable=True)[:, : max(lengths)]
        # fillers are neither visual nor query: they must not compete at the next boundary
        index, valid = take(self.index, rows), take(stays, rows)
        visual, query = take(self.visual & stays, rows), take(self.query & stays, rows)
        names = None if self.names is None else take(self.names, rows)
        return Alive(index, valid, visual, query, keep, lengths, names, self.made), rows

    def shorten_with(
        self,
        stays: Tensor,
        keep: list[int],
        centres: Tensor,
        merged: list[int],
        named: Tensor,
        after: Tensor | None = None,
    ) -> tuple[Alive, Tensor]:
        """Without the tokens that go, and with merged ones after the last candidate of each row.

        After the last one that was, not the last that stays: no text may see what was made from later tokens.

        Args:
            stays: [B, T] bool.
            keep: Visual tokens among them, per row.
            centres: [B, M] which of the T rows the merged tokens take the place of.
            merged: How many of the M are a row's.
            named: [B, T] the names so far.
            after: [B, M] which of the T rows they stand after instead, -1: before all.

        Returns:
            Who is left, and [B, T'] which of the T + M rows they were, the merged ones counted after the others.
        """
        (_, width), most, device = stays.shape, centres.shape[1], stays.device
        numbers = torch.arange(most, device=device)
        new = numbers < on_device(merged, device)[:, None]
        made = self.made or [0] * len(merged)
        own = torch.arange(width, device=device) * (most + 1)
        last = (self.candidates * own).amax(1, keepdim=True) if after is None else after.to(device) * (most + 1)
        stays, everything = (
            torch.cat([stays, new], 1),
            torch.cat([own.expand(len(stays), width), last + 1 + numbers], 1),
        )
        no = torch.zeros_like(new)
        lengths = [n - now + then + m for n, now, then, m in zip(self.lengths, self.visual_counts, keep, merged)]
        end = (width + 1) * (most + 1)
        rows = everything.masked_fill(~stays, end).argsort(dim=1, stable=True)[:, : max(lengths)]
        names = torch.cat([named, -1 - on_device(made, device)[:, None] - numbers], 1)
        alive = Alive(
            index=take(torch.cat([self.index, take(self.index, centres)], 1), rows),
            valid=take(stays, rows),
            visual=take(torch.cat([self.visual, ~no], 1) & stays, rows),
            query=take(torch.cat([self.query, no], 1) & stays, rows),
            visual_counts=[k + m for k, m in zip(keep, merged)],
            lengths=lengths,
            names=take(names, rows),
            made=[before + m for before, m in zip(made, merged)],
        )
        return alive, rows
