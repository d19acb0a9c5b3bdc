"""Where visual tokens are dropped, and how many stay. Pure Python, known before any model is loaded.

A schedule is a tuple of stages, each opened by a boundary: "on the input of layer k, before it runs, this many of
the prompt's ORIGINAL visual tokens stay". It knows nothing of methods, which decide WHICH tokens stay.

    >>> pyramid(num_layers=32)
    Schedule('8:0.5 16:0.25 24:0.125')
    >>> pyramid(num_layers=32).mean_keep(32)
    0.46875
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One boundary: from `layer` (0-based, on its input) on, this much of the original visual tokens stays.

    Exactly one of `keep` (fraction of the original tokens, 0..1), `tokens` (a count, for published lists such as
    SparseVLM's) and `adaptive` (the method finds the number prompt by prompt) is given. A count above what a prompt
    has keeps everything. Boundary 0 is before the first decoder layer: no layer sees what is dropped there.
    """

    layer: int
    keep: float | None = None
    tokens: int | None = None
    adaptive: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise ValueError(f"a boundary's layer is a whole number from 0 on, not {self.layer!r}")
        if (self.keep is not None) + (self.tokens is not None) + self.adaptive != 1:
            raise ValueError(f"a stage takes one of keep=, tokens= and adaptive=True (layer {self.layer})")
        if self.keep is not None:
            if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 <= self.keep <= 1:
                raise ValueError(f"keep is a fraction between 0 and 1, not {self.keep!r} (layer {self.layer})")
            object.__setattr__(self, "keep", canonical(self.keep))
        elif not self.adaptive and (
            isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0
        ):
            raise ValueError(f"tokens is a count from 0 on, not {self.tokens!r} (layer {self.layer})")

    def __str__(self) -> str:
        share = f"{self.tokens}t" if self.keep is None else f"{self.keep:.12g}"
        return f"{self.layer}:{'adaptive' if self.adaptive else share}"


def canonical(value: float) -> float:
    """The double with the shortest 12-digit spelling: 0.1 + 0.2 and 0.3 are one fraction, hence one run."""
    return float(f"{value:.12g}")


@dataclass(frozen=True, repr=False)
class Schedule:
    """Stages by rising layer whose shares never grow. `Schedule()` drops nothing. `str` and `parse` are inverse."""

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        stages = tuple(self.stages) if isinstance(self.stages, Iterable) else (self.stages,)
        if not all(isinstance(stage, Stage) for stage in stages):
            raise ValueError(f"schedule is made of stages such as Stage(2, 0.5), not {self.stages!r}: parse reads text")
        object.__setattr__(self, "stages", stages)
        layers = [stage.layer for stage in stages]
        if layers != sorted(set(layers)):
            raise ValueError(f"the layers of a schedule rise, each named once; got {layers}")
        for before, after in zip(stages, stages[1:]):
            pair = (before.keep, after.keep) if before.keep is not None else (before.tokens, after.tokens)
            if (before.keep is None, before.adaptive) != (after.keep is None, after.adaptive):
                raise ValueError(f"a schedule gives fractions or counts, not both: {self}")
            if pair[0] is not None and pair[1] is not None and pair[1] > pair[0]:
                raise ValueError(f"dropped tokens do not come back: {after} keeps more than {before}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The boundaries' layers, rising."""
        return tuple(stage.layer for stage in self.stages)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return " ".join(map(str, self.stages))

    def __repr__(self) -> str:
        return f"Schedule({str(self)!r})"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` writes: "8:0.5 16:0.25" (fractions), "2:300t 6:200t" (counts) or "2:adaptive 6:adaptive";
        commas may separate too.

        Raises:
            ValueError: If a part is not `layer:share`.
        """
        if not isinstance(text, str):
            raise ValueError(f"schedule is text such as '8:0.5 16:0.25' here, not {text!r}")
        stages = []
        for part in re.split(r"[,\s]+", text.strip()) if text.strip() else []:
            match = re.fullmatch(r"(\d+):(?:(\d+)t|(adaptive)|(\d*\.?\d+(?:[eE][-+]?\d+)?))", part)
            if match is None:
                raise ValueError(
                    f"{part!r} is not a stage: write layer:keep such as 8:0.5, or layer:COUNTt such as 2:300t"
                )
            layer, tokens, adaptive, keep = match.groups()
            share = {"tokens": int(tokens)} if tokens else {"adaptive": True} if adaptive else {"keep": float(keep)}
            stages.append(Stage(int(layer), **share))
        return cls(tuple(stages))

    def check(self, num_layers: int) -> Schedule:
        """Return the schedule itself if every boundary lies inside a decoder of `num_layers` layers.

        Raises:
            ValueError: If a boundary is after the last layer.
        """
        if self.stages and self.stages[-1].layer >= num_layers:
            raise ValueError(
                f"schedule {self} has a boundary at layer {self.stages[-1].layer}, but the decoder's {num_layers} "
                f"layers are numbered 0..{num_layers - 1}"
            )
        return self

    def tokens_per_layer(
        self, visual: int, num_layers: int, count: Callable[[Stage, int], int] | None = None
    ) -> list[int]:
        """Visual tokens that enter each layer, for a prompt of `visual` ones.

        For a method that merges, or counts by the tokens left, only its own `tokens_per_layer` is right.

        Args:
            visual: The prompt's original number of visual tokens.
            num_layers: Layers of the decoder.
            count: The method's rounding rule, (stage, visual) -> kept; default: whole part of visual * keep.
        """
        rule, entering, now = count or kept, [], visual
        by_layer = {stage.layer: stage for stage in self.check(num_layers)}
        for layer in range(num_layers):
            now = min(now, rule(by_layer[layer], visual)) if layer in by_layer else now
            entering.append(now)
        return entering

    def mean_keep(self, num_layers: int, visual: int | None = None) -> float:
        """Mean over the layers of the fraction of original visual tokens that enter them ("average tokens" / visual).

        Schedules of counts need `visual`; fractions do not, and are then not rounded to whole tokens.
        """
        if visual is not None:
            return sum(self.tokens_per_layer(visual, num_layers)) / (visual * num_layers) if visual else 1.0
        if any(stage.keep is None for stage in self.stages):
            raise ValueError(f"schedule {self} gives no fractions: mean_keep needs the number of visual tokens")
        self.check(num_layers)
        edges = [0, *self.layers, num_layers]
        shares = [1.0, *(stage.keep or 0.0 for stage in self.stages)]
        return sum((b - a) * share for a, b, share in zip(edges, edges[1:], shares)) / num_layers


def kept(stage: Stage, visual: int) -> int:
    """Whole part of `visual * keep`, the product in double precision (PyramidDrop's own rule: 100 * 0.29 -> 28).

    Raises:
        ValueError: If the stage is adaptive: its numbers are only known during the forward.
    """
    if stage.adaptive:
        raise ValueError(f"how many tokens stay at {stage} is found prompt by prompt, in the forward: run it")
    if stage.tokens is not None:
        return min(stage.tokens, visual)
    assert stage.keep is not None
    return int(visual * stage.keep)


def pyramid(num_layers: int, stages: int = 4, ratio: float = 0.5, layers: Sequence[int] | None = None) -> Schedule:
    """PyramidDrop's schedule: the share `ratio ** s` stays from boundary s on (arXiv 2410.17247, section 3.2).

    Args:
        num_layers: Layers of the decoder.
        stages: Number of stages S; they open at multiples of num_layers // S (32 layers, S=4: 8/16/24; S=3: 10/20).
        ratio: The paper's lambda, the fraction that stays at each boundary, 0..1.
        layers: Explicit boundaries instead of `stages`, e.g. (2, 8, 16).

    Raises:
        ValueError: If the ratio is not a fraction, or the stages do not fit the layers.
    """
    check_ratio(ratio)
    check_layers(layers)
    if layers is None:
        if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages is a whole number from 1 on, not {stages!r}")
        if not isinstance(num_layers, int):
            raise ValueError(f"num_layers is a whole number, not {num_layers!r}")
        if stages > num_layers:
            raise ValueError(f"{stages} stages do not fit into {num_layers} layers: at most {num_layers}")
        layers = [num_layers // stages * s for s in range(1, stages)]
    return Schedule(tuple(Stage(layer, canonical(ratio) ** s) for s, layer in enumerate(layers, start=1))).check(
        num_layers
    )


def single(layer: int, keep: float, num_layers: int | None = None, layers: Sequence[int] | None = None) -> Schedule:
    """One boundary, as FastV has: the fraction `keep` of the visual tokens enters layer `layer` and those after it.

    FastV's K is `layer`, its R is 1 - keep (arXiv 2403.06764).

    Args:
        layer: The boundary.
        keep: The fraction that stays, 0..1.
        num_layers: Layers of the decoder, to check the boundary against.
        layers: The boundary as a list of one, the way the command line's dial spells it; wins over `layer`.

    Raises:
        ValueError: If `keep` is not a fraction, or there is not exactly one boundary inside the decoder.
    """
    check_ratio(keep)
    check_layers(layers)
    if layers is not None and len(layers) != 1:
        raise ValueError(f"this method has exactly one boundary: layers=[{layer}], not {list(layers)}")
    schedule = Schedule((Stage(layer if layers is None else layers[0], keep),))
    return schedule if num_layers is None else schedule.check(num_layers)


def none(num_layers: int | None = None) -> Schedule:
    """No boundary: nothing is dropped."""
    return Schedule()


def check_layers(layers: Sequence[int] | None) -> None:
    """Refuse boundaries that are not a list.

    Raises:
        ValueError: If `layers` is neither None nor a sequence.
    """
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise ValueError(f"layers is a list of boundaries such as (8, 16, 24), not {layers!r}")


def check_ratio(ratio: float | None) -> None:
    """Refuse what is not a fraction.

    Raises:
        ValueError: If `ratio` is not a number between 0 and 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1 or math.isnan(ratio):
        raise ValueError(f"ratio is the fraction that is kept, between 0 and 1, not {ratio!r}")
