"""The tokens of a forward as they are dropped: pure tensor code, no model.

Shapes: B prompts, L tokens of the padded prompts, T tokens alive, D hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pdrop.methods.transfer import moved, on_device, read_back
from pdrop.methods.view import Block


def take(x: Tensor, index: Tensor) -> Tensor:
    """Row b of the result is x[b, index[b]]. x [B or 1, T, ...], index [B, T'] -> [B, T', ...]."""
    index = index.to(x.device)
    if x.ndim == 2:
        return x.expand(len(index), -1).gather(1, index)
    if len(x) == len(index) == 1:
        return x[:, index[0]]
    return x.expand(len(index), *x.shape[1:])[torch.arange(len(index), device=x.device)[:, None], index]


@dataclass(frozen=True)
class Marks:
    """Marks of the input tokens, on the host: each [B, L]."""

    ids: Tensor
    valid: Tensor  # token, or padding?
    visual: Tensor  # visual token?
    query: Tensor  # query token?

    @property
    def numbers(self) -> Tensor:
        """For a visual token, its number among its prompt's, from 0."""
        return self.visual.cumsum(1) - 1


def block_of(marks: Marks) -> Block | None:
    """The one block of all prompts' visual tokens; None if they are not at the same places, or there is padding."""
    visual, query = marks.visual[0], marks.query[0].nonzero()[:, 0].tolist()
    if not marks.valid.all() or len(query) != 1 or not visual.any():
        return None
    if not (marks.visual == visual).all() or not (marks.query == marks.query[0]).all():
        return None
    start, count = int(visual.int().argmax()), int(visual.sum())
    contiguous = bool(visual[start : start + count].all())
    return Block(start, start + count, query[0]) if contiguous and query[0] >= start + count else None


@dataclass(frozen=True)
class Prompts:
    """The padded prompts of one forward, and their counts."""

    ids: Tensor  # [B, L]
    valid: Tensor  # [B, L] token, or padding?
    visual: Tensor  # [B, L] visual token?
    query: Tensor  # [B, L] query token?
    host: Marks  # the same on the host, read without waiting for the device
    visual_counts: list[int]  # per row
    protected_counts: list[int]  # per row: visual tokens that are queries themselves and cannot go
    lengths: list[int]  # per row: tokens without padding
    max_queries: int  # the most query tokens of a row
    droppable: list[bool]  # per row: has visual tokens, and (in training) an answer to rank for
    beside: list[Tensor] = field(default_factory=list)  # what else was read with them, on the host

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.ids.shape[1]

    def draw(self, seed: int, layer: int, samples: list[str] | None = None) -> Tensor:
        """Uniform numbers for each place, [B, L] float32 on the CPU, seeded by each row's own ids up to its query.

        All visual tokens have the same id: two pictures with the same question draw the same unless `samples` names
        them.

        Args:
            seed: The run's.
            layer: The layer, so that each boundary has its own draw.
            samples: A name for each prompt; copies of a prompt in the batch (beams) share it.

        Raises:
            ValueError: If the number of names does not fit the batch.
        """
        if samples is not None and (not samples or len(self.ids) % len(samples)):
            raise ValueError(f"trace.samples names {len(samples)} prompts, but the batch has {len(self.ids)}")
        copies = len(self.ids) // len(samples) if samples else 1
        drawn = torch.zeros(self.ids.shape)
        for row, (ids, valid, query) in enumerate(zip(self.host.ids, self.host.valid, self.host.query)):
            places = valid.nonzero()[:, 0]
            end = int(query.nonzero()[-1]) if bool(query.any()) else ids.shape[0]
            own = ids[places[places <= end]].tolist()
            # a number for each place of the unpadded row: tokens after the query must not shift those before it
            name = samples[row // copies] if samples else None
            state = zlib.crc32(repr((seed, layer, name, own)).encode())
            generator = torch.Generator().manual_seed(state)
            drawn[row, places] = torch.rand(self.ids.shape[1], generator=generator)[: len(places)]
        return drawn


def read_prompts(
    ids: Tensor,
    mask: Tensor | None,
    visual_of: Callable[[Tensor], Tensor],
    labels: Tensor | None,
    position_ids: Tensor | None,
    logits_to_keep: int = 0,
    beside: Sequence[Tensor] = (),
) -> Prompts:
    """Find and count visual and query tokens, on the host: one wait for the device, whatever the batch.

    Args:
        ids: [B, L].
        mask: [B, L], 0: padding. None: there is none.
        visual_of: Which of the ids are visual tokens, [B, L] -> [B, L] bool.
        labels: [B, L], -100 = no label; the query tokens are then those before each answer.
        position_ids: As passed to the model.
        logits_to_keep: Logits are asked for this many last tokens; without labels the first of them is the query.
        beside: Other tensors to copy to the host with the same wait.

    Raises:
        ValueError: If the rows are packed sequences.
    """
    device, wanted = ids.device, (mask, labels, position_ids)
    ids_there, *read = read_back(x for x in (ids, *wanted, *beside) if x is not None)
    mask, labels, position_ids = (None if x is None else read.pop(0) for x in wanted)
    valid = torch.ones_like(ids_there, dtype=torch.bool) if mask is None else mask.bool()
    visual = visual_of(ids_there) & valid
    places = valid * torch.arange(1, valid.shape[1] + 1)
    last = places.argmax(1, keepdim=True)
    if 1 < logits_to_keep <= ids.shape[1]:  # the prompt comes with guesses of its continuation, as in prompt lookup
        first = ids.shape[1] - logits_to_keep
        pinned = valid[:, first] & ~visual[:, first + 1 :].any(1)
        last = torch.where(pinned[:, None], first, last)
    query = torch.zeros_like(valid).scatter_(1, last, True)
    if labels is not None:
        query = torch.zeros_like(valid)
        query[:, :-1] = (labels[:, 1:] != -100) & (labels[:, :-1] == -100)
        query &= valid
    if position_ids is not None and position_ids.ndim == 2:
        restart = (position_ids[:, 1:] < position_ids[:, :-1]) & valid[:, 1:] & valid[:, :-1]
        if restart.any():
            raise ValueError(
                "token dropping does not read packed sequences (position_ids that restart): pad them instead"
            )
    counts = torch.stack([visual.sum(1), (visual & query).sum(1), valid.sum(1), query.sum(1)])
    visual_counts, protected, lengths, queries = counts.tolist()
    droppable = [bool(n) and bool(asks or labels is None) for n, asks in zip(visual_counts, queries)]
    marks = Marks(ids_there, valid, visual, query)
    valid, visual, query = moved(torch.stack([valid, visual, query]), device).unbind()
    most = max(queries)
    return Prompts(ids, valid, visual, query, marks, visual_counts, protected, lengths, most, droppable, read)


@dataclass(frozen=True)
class Alive:
    """The tokens that are left. They come first in each row, in order; shorter rows are padded on the right."""

    index: Tensor  # [B, T] place in the padded prompt; for a merged token, its centre's
    valid: Tensor  # [B, T] token, or padding / filler?
    visual: Tensor  # [B, T] visual?
    query: Tensor  # [B, T] query?
    visual_counts: list[int]  # per row
    lengths: list[int]  # per row
    # [B, T] a visual token's name: its number among the prompt's original ones, or -1 - m for the m-th token that was
    # merged since. None: nothing has been merged
    names: Tensor | None = None
    made: list[int] = field(default_factory=list)  # per row: tokens merged so far, also those dropped since
    pinned: bool = False  # are any visual tokens queries themselves?
    block: Block | None = None  # where the visual tokens are, if that is known without waiting for the device

    @classmethod
    def all_of(cls, prompts: Prompts) -> Alive:
        """Before anything is dropped: the padded prompts as they are."""
        index = torch.arange(prompts.ids.shape[1], device=prompts.ids.device).expand(prompts.ids.shape)
        marks = (prompts.valid, prompts.visual, prompts.query)
        pinned, block = any(prompts.protected_counts), block_of(prompts.host) if all(prompts.droppable) else None
        return cls(index, *marks, prompts.visual_counts, prompts.lengths, pinned=pinned, block=block)

    @property
    def candidates(self) -> Tensor:
        """[B, T] visual tokens that may be dropped: not query tokens, whose logits are needed."""
        return self.visual & ~self.query if self.pinned else self.visual

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
            # fillers go past the end: their places may be those of dropped tokens that merged tokens took
            places = places.masked_fill(~self.valid, length)
            whole = states.new_zeros(len(states), length + 1, states.shape[2])
            return whole.scatter(1, places[..., None].expand_as(states), states)[:, :length]
        whole = states.new_zeros(len(states), length, states.shape[2])
        return whole.scatter(1, places[..., None].expand_as(states), states)

    def best(self, scores: Tensor, keep: list[int], protected: list[int]) -> Tensor:
        """Which tokens stay, [B, T] bool: text, and in each row the `keep` visual tokens with the highest scores.

        Args:
            scores: [B, T]; of equal scores the earlier token stays.
            keep: Per row, protected tokens included.
        """
        candidates = self.candidates
        order = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
        chosen, text = [k - p for k, p in zip(keep, protected)], self.valid ^ candidates
        order = order[:, : max(chosen)]
        if min(chosen) == max(chosen):
            return text.scatter(1, order, True)
        top = torch.arange(order.shape[1], device=order.device) < on_device(chosen, scores.device)[:, None]
        return text.scatter(1, order, top) | text

    def best_of_block(self, scores: Tensor, keep: list[int]) -> Tensor | None:
        """Which of the T rows those are, in order, [B, keep]. None: they are not in one block, as many of each."""
        if self.block is None or min(keep) != max(keep):
            return None
        ranked = scores[:, self.block.start : self.block.stop].argsort(dim=1, descending=True, stable=True)
        return ranked[:, : keep[0]].sort(dim=1).values + self.block.start

    def shorten_block(
        self, inside: Tensor, centres: Tensor | None = None, named: Tensor | None = None
    ) -> tuple[Alive, Tensor]:
        """As `shorten`, for a block in which the tokens `inside` [B, keep] stay, followed by the made tokens.

        Args:
            inside: Which of the T rows stay, in order.
            centres: [B, M] which of the T rows the made tokens take the place of, equally many for each prompt.
            named: [B, T] the names so far.
        """
        assert self.block is not None
        most, (batch, width) = 0 if centres is None else centres.shape[1], self.index.shape
        block, index, names = self.block.resized(inside.shape[1] + most), self.index, self.names
        places = torch.arange(width + most, device=index.device).expand(batch, -1)
        parts = [places[:, : block.start], inside, places[:, width:], places[:, self.block.stop : width]]
        rows, going, made = torch.cat(parts, 1), self.block.stop - block.stop, self.made
        if centres is not None and named is not None:
            first = -1 - (made[0] if made else 0)
            new = torch.arange(first, first - most, -1, device=index.device).expand(batch, -1)
            index, names = torch.cat([index, take(index, centres)], 1), torch.cat([named, new], 1)
            made = [(made[0] if made else 0) + most] * batch
        alive = Alive(
            index=take(index, rows),
            # all are tokens, and the query comes after the block, so the marks equal the end of the marks before
            valid=self.valid[:, going:],
            visual=torch.cat([self.visual[:, : block.stop], self.visual[:, self.block.stop :]], 1),
            query=self.query[:, going:],
            visual_counts=[block.stop - block.start] * batch,
            lengths=[n - going for n in self.lengths],
            names=None if names is None else take(names, rows),
            made=made,
            block=block,
        )
        return alive, rows

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
        index, (valid, visual, query) = take(self.index, rows), marked(rows, stays, self.visual, self.query)
        names = None if self.names is None else take(self.names, rows)
        return Alive(index, valid, visual, query, keep, lengths, names, self.made, self.pinned), rows

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
            after: [B, M] which of the T rows they come after instead, -1: before all.

        Returns:
            Who is left, and [B, T'] which of the T + M rows they were, the merged ones counted after the others.
        """
        (_, width), most, device = stays.shape, centres.shape[1], stays.device
        numbers = torch.arange(most, device=device)
        new = numbers < on_device(merged, device)[:, None]
        made = self.made or [0] * len(merged)
        own = torch.arange(0, width * (most + 1), most + 1, device=device)
        last = (self.candidates * own).amax(1, keepdim=True) if after is None else after.to(device) * (most + 1)
        everything = torch.cat([own.expand(len(stays), width), last + 1 + numbers], 1)
        lengths = [n - now + then + m for n, now, then, m in zip(self.lengths, self.visual_counts, keep, merged)]
        end, stays = (width + 1) * (most + 1), torch.cat([stays, new], 1)
        rows = everything.masked_fill(~stays, end).argsort(dim=1, stable=True)[:, : max(lengths)]
        names = torch.cat([named, -1 - on_device(made, device)[:, None] - numbers], 1)
        pad = torch.nn.functional.pad
        visual, query = torch.cat([self.visual, new], 1), pad(self.query, (0, most))
        valid, visual, query = marked(rows, stays, visual, query)
        alive = Alive(
            index=take(torch.cat([self.index, take(self.index, centres)], 1), rows),
            valid=valid,
            visual=visual,
            query=query,
            visual_counts=[k + m for k, m in zip(keep, merged)],
            lengths=lengths,
            names=take(names, rows),
            made=[before + m for before, m in zip(made, merged)],
            pinned=self.pinned,
        )
        return alive, rows


def marked(rows: Tensor, stays: Tensor, visual: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    """`stays` at `rows`, [B, T] -> [B, T'], and which of those that stay are visual and query tokens."""
    return (torch.stack([stays, visual, query]) & stays).gather(2, rows.expand(3, -1, -1)).unbind()
