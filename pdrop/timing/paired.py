"""The time of a prefill, as a ratio to the unpruned model measured in turns with it.

Why a ratio: on a shared machine, absolute times drift by far more than dropping saves. So both sides run
in one process, on the same inputs and attention backend, taking turns (ABBA: each pair swaps who goes first), and the
result is the median of the paired ratios with a bootstrap interval. Raw values are kept.

What is timed: one call of the model with `use_cache=True, logits_to_keep=1`, what `generate` does before the first
token: vision tower, projector, decoder, selection, filling the cache, lm_head on the last position. Not included: image
preprocessing, tokenisation, sampling. `decoder_inputs(inputs)` leaves the tower out, for the unpruned model. On a GPU
the clock is a pair of CUDA events around the call, synchronised; on a CPU it is perf_counter. Other stages:
pdrop/timing/measure.py.

    protocol = TimingProtocol("quick", warmup=1, pairs=5, min_seconds=1.0)
    this, unpruned, ratio = prefill_ratio(model, inputs, PyramidDrop(), pyramid(num_layers=32), protocol)
    print(f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")

Needs torch, transformers and nothing of the evaluation, so it runs on a bare machine with a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pdrop.engine import attach
from pdrop.engine.hooks import rows_not_packed
from pdrop.methods.base import Method
from pdrop.pace import Pace
from pdrop.record import Interval
from pdrop.schedule import Schedule
from pdrop.timing.clock import ClockedAttachment, Timed, model_device, time_call
from pdrop.timing.protocol import TimingProtocol

log = logging.getLogger(__name__)

RESAMPLES = 2000


def prefill_ratio(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    method: Method,
    schedule: Schedule,
    protocol: TimingProtocol,
    tokenizer: Any = None,
) -> tuple[Interval, Interval, Interval]:
    """Time prefills of a dropping and of the unpruned model, in turns.

    Args:
        model: In eval mode, with nothing attached.
        inputs: Arguments of `model(**inputs)` for one batch of prompts, on the model's device, without a cache.
        method: The method to time,
        schedule: with this schedule, which must have a boundary.
        protocol: How long.
        tokenizer: The prompts' tokenizer, for methods that read the question.

    Returns:
        This prefill in ms, the unpruned one in ms, and the paired ratio this / unpruned.

    Raises:
        ValueError: If the schedule is empty or the protocol times nothing.
    """
    if not schedule.stages:
        raise ValueError("a schedule without a boundary drops nothing: its prefill is the unpruned one, not timed")
    attachment = attach(model, method, schedule, tokenizer=tokenizer)

    def dropping() -> Timed:
        with attachment:
            return time_call(lambda: prefill(model, inputs), model_device(model))

    def unpruned() -> Timed:
        return time_call(lambda: prefill(model, inputs), model_device(model))

    with rows_not_packed(model, inputs):
        samples = take_turns({"this": dropping, "unpruned": unpruned}, protocol)
    this, base = ([sample.wall_ms for sample in samples[name]] for name in ("this", "unpruned"))
    return interval(this, "ms"), interval(base, "ms"), paired_ratio(this, base)


def selection_share(model: torch.nn.Module, inputs: Mapping[str, Any], method: Method, schedule: Schedule) -> float:
    """Share of one prefill that is spent on dropping. Do not use it to time a prefill: its clocks take time."""
    with (attachment := ClockedAttachment(model, method, schedule)):
        begin = attachment.seconds()
        prefill(model, inputs)
        return attachment.spent / (attachment.seconds() - begin)


def prefill(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One prefill as `generate` does it; returns the model's output with the filled cache."""
    with torch.inference_mode():
        return model(**inputs, use_cache=True, logits_to_keep=1)


def decoder_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for timing the unpruned decoder alone: without pixels the placeholder ids are embedded like words.

    They then count as text, so nothing is dropped; pass features (`mm_encoder_outputs`) to time dropping without the
    tower.
    """
    return {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}


def take_turns(sides: Mapping[str, Callable[[], Timed]], protocol: TimingProtocol) -> dict[str, list[Timed]]:
    """Measure several sides in rounds, each in the opposite order of the previous round (ABBA, ABCCBA, ...).

    Args:
        sides: Functions to call, by name; each call gives one sample.
        protocol: `pairs` is the least number of rounds.

    Returns:
        By name, one sample per round: samples at the same index were taken in the same round.

    Raises:
        ValueError: If the protocol times nothing.
    """
    if not protocol.measures:
        raise ValueError(f"the timing protocol {protocol.name!r} times nothing")
    for side in sides.values():
        warm_up(side, protocol)
    samples: dict[str, list[Timed]] = {name: [] for name in sides}
    started, rounds, pace = time.perf_counter(), 0, Pace("timing", "rounds")
    while rounds < protocol.pairs or time.perf_counter() - started < protocol.min_seconds:
        for name in list(sides)[:: 1 if rounds % 2 == 0 else -1]:
            samples[name].append(sides[name]())
        rounds += 1
        pace.at(rounds)
    log.info("timed         %d rounds in %.1f s", rounds, time.perf_counter() - started)
    return samples


def warm_up(side: Callable[[], Timed], protocol: TimingProtocol) -> int:
    """Call a side until it is warm; returns the number of calls."""
    seen = [side().wall_ms for _ in range(protocol.warmup)]
    while protocol.steady and len(seen) < 10 * max(1, protocol.warmup):
        last = seen[-3:]
        if len(last) == 3 and max(last) - min(last) < protocol.steady * min(last):
            break
        seen.append(side().wall_ms)
    return len(seen)


def interval(values: Sequence[float], unit: str, seed: int = 0) -> Interval:
    """Median, interquartile range and bootstrap 95 % interval of the median.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("nothing was measured")
    x = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(x), (RESAMPLES, len(x)))
    low, high = np.percentile(np.median(x[drawn], axis=1), (2.5, 97.5))
    lower, upper = np.percentile(x, (25, 75))
    return Interval(unit, float(np.median(x)), float(upper - lower), float(low), float(high), [float(v) for v in x])


def paired_ratio(this: Sequence[float], base: Sequence[float]) -> Interval:
    """Interval of the ratios this / base of paired values; the bootstrap draws whole pairs.

    Raises:
        ValueError: If the two are not of the same length.
    """
    if len(this) != len(base):
        raise ValueError(f"{len(this)} and {len(base)} values are not pairs")
    return interval([a / b for a, b in zip(this, base)], "ratio")
