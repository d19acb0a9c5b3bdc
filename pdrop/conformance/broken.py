"""Methods and engines with faults seen in public code, made on purpose; faults.py says what must catch them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pdrop.engine import Attachment
from pdrop.engine.architecture import Rotary
from pdrop.engine.early import cache_of
from pdrop.engine.sequence import Alive, take
from pdrop.methods.base import Merged, Method, View
from pdrop.methods.fastervlm import FasterVLM
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.sparsevlm import SparseVLM
from pdrop.schedule import Schedule, Stage
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

# ------------------------------------------------------------------ engines


class Unsorted(Attachment):
    """Leaves the kept tokens in the order of their scores, as topk returns them."""

    def drop(self, run: Any, number: int, layer: Any, hidden: Tensor, given: Any) -> Tensor:
        """After the drop, order each row's visual tokens by falling score."""
        hidden = super().drop(run, number, layer, hidden, given)
        alive = run.alive
        if number not in self.boundaries or not run.dropped:
            return hidden
        rows = torch.arange(hidden.shape[1]).repeat(len(hidden), 1)
        ranked = self.prefill.ranked[-1]
        scores = ranked.scores
        for row, visual in enumerate(alive.visual):
            places = visual.nonzero()[:, 0]
            before = ranked.before.index[row].tolist()
            score = torch.tensor([scores[row, before.index(int(alive.index[row, p]))] for p in places])
            rows[row, places] = places[score.argsort(descending=True, stable=True)]
        moved = {name: take(getattr(alive, name), rows) for name in ("index", "valid", "visual", "query")}
        run.alive = replace(alive, **moved)
        ranked.after = run.alive
        return take(hidden, rows)


class Worst(Attachment):
    """Keeps the lowest scores: sorts the wrong way round."""

    def drop(self, run: Any, number: int, layer: Any, hidden: Tensor, given: Any) -> Tensor:
        """With the order reversed."""
        run.alive = Turned(**vars(run.alive) | {"block": None})
        return super().drop(run, number, layer, hidden, given)


class Turned(Alive):
    """The kept tokens, chosen with the order reversed."""

    def best(self, scores: Tensor, keep: list[int], protected: list[int]) -> Tensor:
        return super().best(-scores, keep, protected)


class Hungry(Attachment):
    """Lets text compete with the picture."""

    def drop(self, run: Any, number: int, layer: Any, hidden: Tensor, given: Any) -> Tensor:
        """With every token except the query as a candidate."""
        run.alive = Open(**vars(run.alive) | {"block": None})
        return super().drop(run, number, layer, hidden, given)


class Open(Alive):
    """The kept tokens, with text among the candidates."""

    @property
    def candidates(self) -> Tensor:
        return self.valid & ~self.query


class Doubled(Attachment):
    """Reads a layer's attention by running the layer again, which appends its keys and values again."""

    def enter(self, number: int, layer: Any, args: Any, kwargs: Any) -> Any:
        """After the layer before the first boundary, leave what a second run would have left."""
        cache: Any = cache_of(kwargs)
        prompted = self.run is not None and self.run.prompts is not None
        if 0 < number == min(self.boundaries) and cache is not None and prompted:
            held = cache.layers[number - 1]
            held.keys, held.values = torch.cat([held.keys] * 2, 2), torch.cat([held.values] * 2, 2)
        return super().enter(number, layer, args, kwargs)


class Stale(Attachment):
    """Decodes at the positions of the other policy: those given, or the cache's length."""

    def plain(self, past: Any, mask: Any) -> bool:
        """Never: every step goes through the hooks."""
        return False

    def rotary(self, run: Any, hidden: Tensor, given: Rotary) -> Rotary:
        """The declared policy, in the prompt only."""
        if run.prompts is not None or not run.staged:
            return super().rotary(run, hidden, given)
        if self.method.positions == "compact":
            return given
        decoder: Any = self.architecture.decoder
        rotary: Rotary = decoder.rotary_emb(hidden, torch.tensor([[run.past]]))
        return rotary


class SeesAll(Attachment):
    """Gives eager attention a boolean mask, which is added as zeros and ones."""

    def mask(self, run: Any, number: int, hidden: Tensor, cache: Any) -> Any:
        """True and False instead of 0 and minus infinity."""
        made = super().mask(run, number, hidden, cache)
        return made == 0 if isinstance(made, Tensor) and made.is_floating_point() else made


class Leaky(Attachment):
    """Leaves a hook when it detaches."""

    def __exit__(self, *exception: object) -> None:
        self.handles = self.handles[:-1]
        super().__exit__(*exception)


def late(model: Any, method: Method, schedule: Schedule) -> Any:
    """Cuts one layer after the one it was asked to cut at."""
    return Attachment(model, method, Schedule(tuple(replace(s, layer=s.layer + 1) for s in schedule)))


class Rounds(Attachment):
    """Drops at least one token, whatever the schedule says."""

    def __init__(self, model: Any, method: Method, schedule: Schedule):
        class Miserly(type(method)):  # type: ignore[misc]
            def stays(self, stage: Stage, visual: int, now: int) -> int:
                return max(0, min(now - 1, int(super().stays(stage, visual, now))))

        miserly: Any = object.__new__(Miserly)
        miserly.__dict__.update(vars(method))
        super().__init__(model, miserly, schedule)


class Rewinds(Attachment):
    """Drops before layer 0 without telling the cache."""

    def enter(self, number: int, layer: Any, args: Any, kwargs: Any) -> Any:
        """As the engine, but the cache is not told."""
        given = super().enter(number, layer, args, kwargs)
        cache = cache_of(kwargs)
        if number == 0 and cache is not None and cache.layers:
            cache.layers[0].gone = 0
        return given


class OneOff(Attachment):
    """Takes the tower's class token for the first patch."""

    def enter(self, number: int, layer: Any, args: Any, kwargs: Any) -> Any:
        """Each token's row is the one before its own."""
        run = self.run
        if run is not None and number == 0 and self.tower is not None:
            seen = run.tower
            run.tower = lambda: replace(seen(), source=(seen().source - 1).clamp(min=-1))
        return super().enter(number, layer, args, kwargs)


class Windows(Attachment):
    """Gives tokens the attention of other tokens, as code does that leaves it in the order of the tower's windows."""

    def enter(self, number: int, layer: Any, args: Any, kwargs: Any) -> Any:
        """Each token gets its neighbour's."""
        run = self.run
        if run is not None and number == 0 and self.tower is not None:
            seen = run.tower
            run.tower = lambda: replace(seen(), _rows=lambda layer: seen().rows(layer).roll(1, -1))
        return super().enter(number, layer, args, kwargs)


class Early(Attachment):
    """Shows a layer's input in place of its output."""

    def watch(self, number: int, layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        super().watch(number, layer, args, kwargs, args[0])


class AtTheEnd(Attachment):
    """Puts all merged tokens at the end of the picture."""

    def drop(self, run: Any, number: int, layer: Any, hidden: Tensor, given: Any) -> Tensor:
        """Ignores the places that the method gives."""
        run.alive = AtEnd(**vars(run.alive) | {"block": None})
        return super().drop(run, number, layer, hidden, given)


class AtEnd(Alive):
    """The kept tokens, with merged ones after them."""

    def shorten_with(self, *given: Any) -> Any:
        """Without the last argument, the places."""
        return super().shorten_with(*given[:5])


# ------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Lots(PyramidDrop):
    """Draws from the process's own random numbers."""

    def score(self, view: View) -> Tensor:
        return torch.rand(view.index.shape, device=view.index.device)


@dataclass(frozen=True)
class OfTheBatch(PyramidDrop):
    """Ranks by similarity to the first prompt of the batch, as code does that was written for one prompt."""

    def score(self, view: View) -> Tensor:
        """With index [0] instead of the prompt's own."""
        asked = view.hidden[0, view.query[0]].mean(0)
        return (view.hidden * asked).sum(-1).float()


@dataclass(frozen=True)
class Hindsight(PyramidDrop):
    """Ranks by the last token of the sequence, even if it belongs to an answer."""

    def score(self, view: View) -> Tensor:
        """With the query rows at the end of the sequence."""
        last = view.valid & (view.valid.flip(1).cumsum(1).flip(1) == 1)
        return view.attention(last, 1)


@dataclass(frozen=True)
class Severed(SparseVLM):
    """Cuts the gradient where it merges."""

    def merge(self, view: View, scores: Tensor, goes: Tensor, going: list[int]) -> Merged:
        made = super().merge(view, scores, goes, going)
        return replace(made, states=made.states.detach())


@dataclass(frozen=True)
class Boastful(FastV):
    """Says it keeps fewer tokens than it does."""

    ranks_by_attention: ClassVar[bool] = False

    def tokens_per_layer(self, schedule: Schedule, visual: int, num_layers: int) -> list[int]:
        """Counted after the boundary's layer, as budgets are that count a layer's output."""
        entering = super().tokens_per_layer(schedule, visual, num_layers)
        return [*entering[1:], entering[-1]]


@dataclass(frozen=True)
class Free(FasterVLM):
    """Says that reading the vision tower costs nothing."""

    def selection(self, schedule: Schedule, prompt: PromptSize, sizes: ModelSizes) -> SelectionCost:
        return SelectionCost()


@dataclass(frozen=True)
class FirstPicture(FasterVLM):
    """Ranks every picture by the attention of the first, as code does that was written for one picture."""

    def score(self, view: View) -> Tensor:
        """The first tile's attention for all."""
        attention = view.tower.rows(-2).mean(1)
        return self.by_tile(view, view.tower.of(view.index, attention[:1].expand_as(attention)))
