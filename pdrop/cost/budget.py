"""One budget for every method, converted to the ratio of the method's own schedule. No torch.

    solve(PyramidDrop(), "avg_tokens:192", num_layers=32, visual_tokens=576)    # 2/8/16/24, 0.581 at each
    solve(FastV(), "avg_tokens:192", num_layers=32, visual_tokens=576)          # Schedule('2:0.288889')

Why: "192 tokens" has four meanings in this field (tokens at the input, after the second layer, on average over layer
inputs, on average over layer outputs), and one ratio costs each method something different. A budget makes one of these
equal:

    avg_tokens:192     visual tokens entering a layer, mean over the layers, merged ones included
    keep:0.333         the same as a share of the prompt's visual tokens
    flops:0.45         prefill FLOPs / those with nothing dropped, ranking included (pdrop/cost/flops.py)
    kv:0.4             bytes of the cache after the prefill / those with nothing dropped
    prefill_ms:35      median time of a prefill, measured

All are for one prompt of a given size. They are met as closely as whole tokens allow, and never exceeded, by the ratio
of the method's schedule. Boundaries do not change, with one exception: a pyramid of three without boundaries given by
the user. PyramidDrop's own boundaries (8/16/24 of 32 layers) cannot spend less than a quarter, so under any budget it
has one at layer 2 as well, as in re-runs of it (2/8/16/24; 2/10/20/30 of 40 layers), and all budgets have the same
shape. A budget that cannot be met is refused with the bound. A random twin is priced as its method, ranking included,
and so has the same schedule.
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
LLAMA_7B = (4096, 11008)  # hidden and intermediate size if no architecture is given: LLaVA-1.5-7B's
Dial = Callable[[float, Sequence[int] | None], Schedule]  # (ratio, boundaries or None for its own) -> schedule


@dataclass(frozen=True)
class Budget:
    """A budget: one of KINDS, and its amount."""

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
        """An amount of this kind, as text."""
        return {
            "avg_tokens": f"{amount:.4g} of {visual} average tokens",
            "prefill_ms": f"{amount:.4g} ms per prefill",
        }.get(self.kind, f"{amount:.3f} of the {self.kind} of nothing dropped")


@dataclass(frozen=True)
class Pricing:
    """Prices a method's schedule for a prompt of one size.

    Attributes:
        method: The method whose tokens, ranking and merging are counted.
        layers: Layers of the decoder.
        prompt: Its size.
        sizes: The model's; None: FLOPs are the papers' (visual tokens only, in a Llama of 7B's width).
    """

    method: Method
    layers: int
    prompt: PromptSize
    sizes: ModelSizes | None = None

    def __call__(self, schedule: Schedule, kind: str) -> float:
        """The amount of `kind` that the schedule spends, in whole tokens."""
        return self.price(self.prompt.under(self.method, schedule, self.layers), schedule, kind)

    def unrounded(self, schedule: Schedule, kind: str) -> float:
        """The same with fractions of tokens, independent of the prompt's size; for lists and merging, in whole
        tokens."""
        if not all(stage.keep is not None for stage in schedule) or self.method.merges(round(self.prompt.visual)):
            return self(schedule, kind)
        tokens, share = [], 1.0
        keeps = {stage.layer: stage.keep for stage in schedule}
        for layer in range(self.layers):
            share = keeps.get(layer, share) or 0.0
            tokens.append(share * self.prompt.visual)
        return self.price(replace(self.prompt, visual_per_layer=tuple(tokens)), schedule, kind)

    def price(self, prompt: PromptSize, schedule: Schedule, kind: str) -> float:
        """The amount that a prompt with these visual tokens per layer spends."""
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
    """The method's schedule that spends a budget and never more. A random twin gets its method's.

    Args:
        method: The method.
        budget: Such as "avg_tokens:192", "flops:0.45", "kv:0.4"; see the module's docstring.
        num_layers: Layers of the decoder.
        visual_tokens: Visual tokens of the prompt.
        text_tokens: Its other tokens.
        arch: The model's sizes, for "flops"; None: the papers' FLOPs of visual tokens only.
        images: What goes through the tower; default: derived from the visual tokens.
        layers: Fixed boundaries; default: the method's own.
        dial: (ratio, boundaries or None) -> schedule, instead of the method's own schedules.
        measure: Milliseconds of a prefill under a schedule, for "prefill_ms".

    Raises:
        ValueError: If it is not a budget, or cannot be met (with the bound).
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
    """The schedule, by bisection over the ratio; or (the bound, "below" or "above", the schedule at the bound).

    Args:
        turn: Ratio -> schedule.
        spent: Schedule -> the amount it spends, which may be at most the budget.
        wanted: The budget.
        aimed: Schedule -> the amount without rounding to whole tokens. The ratio meets this amount, and so fits prompts
            of other sizes, unless whole tokens then spend too much. None if the amount is measured.
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
    # six digits are readable and resolve less than a token of a hundred thousand; 192 of 576 are 0.333334
    readable = (round(low, 6), math.ceil(low * 1e6) / 1e6, math.floor(low * 1e6) / 1e6)
    paid = [ratio for ratio in readable if ratio <= 1 and within(ratio)]
    return turn(max(paid, key=lambda ratio: spent(turn(ratio)), default=low))


def turn_at(turn: Dial, boundaries: Sequence[int] | None, ratio: float) -> Schedule:
    """The schedule at a ratio, with these boundaries."""
    return turn(ratio, boundaries)


def own_dial(method: Method, num_layers: int, ratio: float, layers: Sequence[int] | None) -> Schedule:
    """The method's own schedule at a ratio."""
    return method.dial(ratio, num_layers, layers)


def for_budgets(turn: Dial, num_layers: int) -> tuple[int, ...] | None:
    """Boundaries of a pyramid of three under any budget: 2 and its own. None for other schedules, which keep theirs."""
    own = turn(0.5, None)
    if [stage.keep for stage in own] != [0.5, 0.25, 0.125]:
        return None
    return tuple(sorted({min(2, own.layers[0]), *own.layers}))


def lower(boundaries: Sequence[int] | None, asked: Sequence[int] | None, direction: str) -> str:
    """How a pyramid can spend less, if its boundaries were not given; as text for a message."""
    if direction == "above" or asked is not None or boundaries is None or boundaries[0] < 2:
        return ""
    return f"; layers={[1, *boundaries[1:]]} can"


def at_layers(schedule: Schedule) -> str:
    """Boundaries as papers write them: 8/16/24."""
    return "/".join(map(str, schedule.layers)) or "no boundary"
