"""One budget for every method: what one may spend, turned into the method's own knob. No torch.

    solve(PyramidDrop(), "avg_tokens:192", num_layers=32, visual_tokens=576)    # 2/8/16/24, 0.581 at each
    solve(FastV(), "avg_tokens:192", num_layers=32, visual_tokens=576)          # Schedule('2:0.288889')

Why: "192 tokens" means four things in this field (tokens at the input, after the second layer, on average over layer
inputs, on average over layer outputs), and one ratio costs every method something else. A budget is what is equal:

    avg_tokens:192     visual tokens entering a layer, mean over the layers, merged ones included
    keep:0.333         the same as a share of the prompt's visual tokens
    flops:0.45         prefill FLOPs / with nothing dropped, as in every table (pdrop/cost/flops.py), ranking included
    kv:0.4             bytes of the cache after the prefill / with nothing dropped
    prefill_ms:35      median time of a prefill, by measuring

All of them are for one prompt of a given size. They are met as closely as whole tokens allow, and never overspent. The
knob is the ratio of the method's schedule. Boundaries stay where they are, but for a pyramid of three that nobody asked
boundaries for: PyramidDrop's own (8/16/24 of 32 layers) cannot spend less than a quarter, so under any budget it has
one at layer 2 as well, as re-runs of it have (2/8/16/24; 2/10/20/30 of 40 layers): a column of budgets has one shape.
What cannot be reached is refused with the bound. A random twin is priced as its method, ranking included, and so has
the same schedule.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from pdrop.cost.flops import paper_macs_visual, prefill_flops
from pdrop.schedule import Schedule
from pdrop.shapes import Images, ModelSizes, PromptSize

if TYPE_CHECKING:
    from pdrop.methods.base import Method

KINDS = ("avg_tokens", "keep", "flops", "kv", "prefill_ms")
LLAMA_7B = (4096, 11008)  # hidden and intermediate size, where no architecture is given: LLaVA-1.5-7B's
Dial = Callable[[float, Sequence[int] | None], Schedule]  # (ratio, boundaries or None for its own) -> schedule


@dataclass(frozen=True)
class Budget:
    """What may be spent: one of KINDS, and how much of it."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "avg_tokens:192".

        Raises:
            ValueError: If it is not a budget.
        """
        match = re.fullmatch(r"\s*(\w+)\s*:\s*(\d+\.?\d*|\.\d+)\s*", str(text))
        if match is None or match[1] not in KINDS:
            raise ValueError(
                f"budget is one of {', '.join(KINDS)} with an amount, such as avg_tokens:192, not {text!r}"
            )
        kind, amount = match[1], float(match[2])
        if kind in ("keep", "flops", "kv") and amount > 1:
            raise ValueError(f"budget {kind} is a share of what nothing dropped costs, at most 1, not {amount:g}")
        return cls(kind, amount)

    def in_words(self, amount: float, visual: int) -> str:
        """An amount of this kind."""
        return {
            "avg_tokens": f"{amount:.4g} of {visual} average tokens",
            "prefill_ms": f"{amount:.4g} ms per prefill",
        }.get(self.kind, f"{amount:.3f} of the {self.kind} of nothing dropped")


@dataclass(frozen=True)
class Pricing:
    """What a method's schedule costs a prompt of this size.

    Attributes:
        method: Whose tokens, ranking and merging are counted.
        layers: Of the decoder.
        prompt: Its size.
        sizes: The model's; without them, FLOPs are the papers' (visual tokens alone, in a Llama of 7B's width).
    """

    method: Method
    layers: int
    prompt: PromptSize
    sizes: ModelSizes | None = None

    def __call__(self, schedule: Schedule, kind: str) -> float:
        """The amount of `kind` that the schedule spends, in whole tokens."""
        return self.price(self.prompt.under(self.method, schedule, self.layers), schedule, kind)

    def unrounded(self, schedule: Schedule, kind: str) -> float:
        """The same for fractions of tokens, as a prompt of any size spends it; of lists and merging, the same."""
        if not all(stage.keep is not None for stage in schedule) or self.method.merges(round(self.prompt.visual)):
            return self(schedule, kind)
        tokens, share = [], 1.0
        keeps = {stage.layer: stage.keep for stage in schedule}
        for layer in range(self.layers):
            share = keeps.get(layer, share) or 0.0
            tokens.append(share * self.prompt.visual)
        return self.price(replace(self.prompt, visual_per_layer=tuple(tokens)), schedule, kind)

    def price(self, prompt: PromptSize, schedule: Schedule, kind: str) -> float:
        """What a prompt spends whose visual tokens are those that enter each layer."""
        layers, whole = prompt.visual_per_layer, prompt.undropped()
        if kind == "avg_tokens":
            return fmean(layers)
        if kind == "keep":
            return fmean(layers) / prompt.visual
        if kind == "kv":
            return sum(prompt.tokens_per_layer) / sum(whole.tokens_per_layer)
        if self.sizes is None:
            return paper_macs_visual(*LLAMA_7B, layers) / paper_macs_visual(*LLAMA_7B, whole.visual_per_layer)
        selection = self.method.selection(schedule, prompt, self.sizes)
        return prefill_flops(self.sizes, prompt, selection)["total"] / prefill_flops(self.sizes, whole)["total"]


def solve(
    method: Method,
    budget: str,
    num_layers: int,
    visual_tokens: int,
    *,
    text_tokens: float = 0,
    arch: ModelSizes | None = None,
    images: Images | None = None,
    layers: Sequence[int] | None = None,
    dial: Dial | None = None,
    measure: Callable[[Schedule], float] | None = None,
) -> Schedule:
    """The method's schedule that spends a budget, and never more than that. A random twin gets its method's.

    Args:
        method: Whose schedule it is.
        budget: Such as "avg_tokens:192", "flops:0.45", "kv:0.4"; see the module's head.
        num_layers: Layers of the decoder.
        visual_tokens: Visual tokens of the prompt.
        text_tokens: Its other tokens.
        arch: The model's sizes, for "flops"; without them, the papers' FLOPs of visual tokens alone.
        images: What goes through the tower; default: worked out from the visual tokens.
        layers: Boundaries that must be kept; default: the method's own.
        dial: (ratio, boundaries or None) -> schedule, where the method's own family is not wanted.
        measure: Milliseconds of a prefill under a schedule, for "prefill_ms".

    Raises:
        ValueError: If it is not a budget, or cannot be met; then with the bound.
    """
    if isinstance(method, type) or not hasattr(method, "priced_as"):
        raise ValueError(f"method is an object such as FastV(), not {method!r}")
    for name, number in (("num_layers", num_layers), ("visual_tokens", visual_tokens)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{name} is a whole number, not {number!r}")
    wanted = Budget.parse(budget)
    if visual_tokens < 1:
        raise ValueError(f"a budget is spent on visual tokens: visual_tokens is at least 1, not {visual_tokens}")
    if wanted.kind == "flops" and arch is None and text_tokens:
        raise ValueError("FLOPs of a prompt with text need the model's sizes: give arch=, or leave out text_tokens")
    if wanted.kind == "prefill_ms" and measure is None:
        raise ValueError(f"budget {budget} is met by measuring: give measure=, or use run.py, which has the model")
    turn = dial or functools.partial(own_dial, method, num_layers)
    if wanted.kind == "avg_tokens" and wanted.amount > visual_tokens:
        raise ValueError(f"budget {budget} cannot be met: the prompt has {visual_tokens} visual tokens in all")
    prompt = PromptSize(text_tokens, visual_tokens, images=images)
    spent, aimed = measure, None
    if measure is None or wanted.kind != "prefill_ms":
        price = Pricing(method.priced_as, num_layers, prompt, arch)
        spent, aimed = (functools.partial(way, kind=wanted.kind) for way in (price, price.unrounded))
    assert spent is not None

    boundaries = layers if layers is not None else for_budgets(turn, num_layers)
    found = meet(functools.partial(turn_at, turn, boundaries), spent, wanted, aimed)
    if isinstance(found, Schedule):
        return found.check(num_layers)
    edge, direction, schedule = found
    bound = f"{at_layers(schedule)} cannot go {direction} {wanted.in_words(edge, visual_tokens)}"
    raise ValueError(f"budget {budget} cannot be met: {bound}{lower(boundaries, layers, direction)}")


def meet(
    turn: Callable[[float], Schedule],
    spent: Callable[[Schedule], float],
    wanted: Budget,
    aimed: Callable[[Schedule], float] | None = None,
) -> Schedule | tuple[float, str, Schedule]:
    """The schedule by bisection over the ratio; or (the bound, "below" or "above", the schedule there).

    Args:
        turn: From a ratio to its schedule.
        spent: What a schedule spends: at most the budget.
        wanted: The budget.
        aimed: What its fractions would spend without rounding to whole tokens: the ratio is the one that meets this,
            and so fits prompts of other sizes, unless whole tokens then spend too much. None where it is measured.
    """
    turn = functools.cache(turn)
    low, high = 0.0, 1.0
    least, most = spent(turn(low)), spent(turn(high))
    slack = 1e-9 * max(1.0, most)
    if wanted.amount < least - slack:
        return least, "below", turn(low)
    if wanted.amount > most + slack:
        return most, "above", turn(high)

    def within(ratio: float) -> bool:
        return spent(turn(ratio)) <= wanted.amount + slack

    def reached(ratio: float) -> bool:
        return within(ratio) and (aimed is None or aimed(turn(ratio)) <= wanted.amount + slack)

    for _ in range(7 if aimed is None else 32):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) else (low, middle)
    if aimed is None:
        return turn(low)
    # six digits are less than a token of a prompt of a hundred thousand, and can be read; of 576, 192 are 0.333334
    readable = (round(low, 6), math.ceil(low * 1e6) / 1e6, math.floor(low * 1e6) / 1e6)
    paid = [ratio for ratio in readable if ratio <= 1 and within(ratio)]
    return turn(max(paid, key=lambda ratio: spent(turn(ratio)), default=low))


def turn_at(turn: Dial, boundaries: Sequence[int] | None, ratio: float) -> Schedule:
    """The schedule at a ratio, with these boundaries."""
    return turn(ratio, boundaries)


def own_dial(method: Method, num_layers: int, ratio: float, layers: Sequence[int] | None) -> Schedule:
    """The schedule of the method's own family."""
    return method.dial(ratio, num_layers, layers)


def for_budgets(turn: Dial, num_layers: int) -> tuple[int, ...] | None:
    """Boundaries of a pyramid of three under any budget: 2 and its own. None for other families: theirs."""
    own = turn(0.5, None)
    if [stage.keep for stage in own] != [0.5, 0.25, 0.125]:
        return None
    return tuple(sorted({min(2, own.layers[0]), *own.layers}))


def lower(boundaries: Sequence[int] | None, asked: Sequence[int] | None, direction: str) -> str:
    """How a pyramid spends less, where it can and its boundaries were not asked for."""
    if direction == "above" or asked is not None or boundaries is None or boundaries[0] < 2:
        return ""
    return f"; layers={[1, *boundaries[1:]]} can"


def at_layers(schedule: Schedule) -> str:
    """Boundaries as papers write them: 8/16/24."""
    return "/".join(map(str, schedule.layers)) or "no boundary"
