"""Timing protocols: how long to measure, as in conf/latency/. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdrop.models.attention import check_kernel


@dataclass(frozen=True)
class TimingProtocol:
    """How long to measure.

    Attributes:
        name: Its name in the record.
        warmup: Untimed calls of each side first, at the same shapes.
        pairs: Least number of paired measurements; 0 = nothing is timed.
        min_seconds: Measure further pairs until they have taken this long.
        steady: Warm up until the last three calls differ by less than this share, at most ten times `warmup`. 0: do not
            look.
        new_tokens: Lengths of generated answers, for decoding and end-to-end times. Empty: prefill only.
        images: Images in the prompt.
        kernels: Orders of torch's attention kernels (pdrop/models/attention.py) that are timed, too: on CUDA, of sdpa.
        memory: Whether peak memory is measured, in a pass of its own.
        fresh: Whether a run is measured in fresh processes,
        repeats: and in how many of them.
    """

    name: str
    warmup: int = 1
    pairs: int = 0
    min_seconds: float = 0.0
    steady: float = 0.0
    new_tokens: Sequence[int] = ()
    images: int = 1
    kernels: Sequence[str] = ()
    memory: bool = False
    fresh: bool = False
    repeats: int = 1

    def __post_init__(self) -> None:
        self._check_kinds()
        object.__setattr__(self, "new_tokens", tuple(sorted(set(self.new_tokens))))
        object.__setattr__(self, "kernels", tuple(dict.fromkeys(self.kernels)))
        if self.warmup < 0 or self.pairs < 0 or self.min_seconds < 0 or self.steady < 0:
            raise ValueError(f"a timing protocol has no negative numbers: {self}")
        if self.images < 1 or self.repeats < 1 or any(n < 1 for n in self.new_tokens):
            raise ValueError(f"images, repeats and new_tokens are whole numbers from 1 on: {self}")
        if self.repeats > 1 and not self.fresh:
            raise ValueError(f"latency.repeats={self.repeats} are processes: set latency.fresh=true, too")

    def _check_kinds(self) -> None:
        """Refuse values of the wrong type, since dials come from a command line."""
        whole = "a whole number"
        kinds: dict[str, tuple[str, tuple[type, ...]]] = dict.fromkeys(
            ("warmup", "pairs", "images", "repeats"), (whole, (int,))
        )
        kinds |= dict.fromkeys(("min_seconds", "steady"), ("a number", (int, float)))
        kinds |= dict.fromkeys(("memory", "fresh"), ("true or false", (bool,)))
        for name, (words, types) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, types) or isinstance(value, bool) != (bool in types):
                raise ValueError(f"latency.{name} is {words}, not {value!r}")
        if not isinstance(self.kernels, Sequence) or isinstance(self.kernels, str):
            raise ValueError(f"latency.kernels is a list such as [flash,cudnn], not {self.kernels!r}")
        for kernel in self.kernels:
            check_kernel("each of latency.kernels", kernel)
        lengths = self.new_tokens
        if not isinstance(lengths, Sequence) or isinstance(lengths, str) or any(type(n) is not int for n in lengths):
            raise ValueError(f"latency.new_tokens is a list of whole numbers, such as [1,16], not {lengths!r}")

    @property
    def measures(self) -> bool:
        return self.pairs > 0

    @property
    def spelled(self) -> str:
        """The protocol as part of a run's identity: everything that is not at its default."""
        parts = [f"{self.name} {self.warmup}/{self.pairs}/{self.min_seconds:g}"]
        parts += [f"steady {self.steady:g}"] if self.steady else []
        parts += [f"new {'/'.join(map(str, self.new_tokens))}"] if self.new_tokens else []
        parts += [f"images {self.images}"] if self.images > 1 else []
        parts += [f"kernels {'/'.join(self.kernels)}"] if self.kernels else []
        parts += ["memory"] if self.memory else []
        parts += [f"fresh {self.repeats}"] if self.fresh else []
        return " ".join(parts)
