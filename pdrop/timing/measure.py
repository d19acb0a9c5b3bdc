"""Everything that is measured of one run, next to the unpruned model: stages, answers, memory, and its validity.

    model = shipped.build("llava_1_5_7b", dtype="bfloat16", attn_implementation="sdpa", device="cuda")
    inputs = shipped.noise_prompt(model.config, shipped.reference_prompt("llava_1_5_7b"), batch=4)
    inputs = {name: x.to("cuda", torch.bfloat16 if x.is_floating_point() else None) for name, x in inputs.items()}
    found = measure(model, inputs, PyramidDrop(), pyramid(32), TimingProtocol("mine", 2, 10, new_tokens=(1, 64)))
    found["end_to_end"]["64"]["ratio"]["median"]        # time of a 64-token answer / the unpruned model's

Measurements, each in a separate pass: answers of a fixed length (time to the first token, time per token, end to end at
every length asked for), prefill if no answer is asked for, vision tower with projector, selection inside the attached
hooks, preprocessing if there is a processor, peak memory, and on CUDA the answers again with other attention kernels.
This model and the unpruned one take turns on the same inputs (pdrop/timing/paired.py); conditions are recorded before
and after. Needs only torch and transformers, so that it runs on a bare machine with a GPU.

The result is plain data, as in a record: an interval of times is {unit, median, iqr, p90, low, high, values}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from pdrop.engine import attach
from pdrop.engine.hooks import rows_not_packed
from pdrop.methods.base import Method
from pdrop.models.attention import sdpa_order
from pdrop.schedule import Schedule
from pdrop.timing.clock import ClockedAttachment, Timed, model_device, time_call
from pdrop.timing.conditions import conditions, invalid
from pdrop.timing.memory import memory
from pdrop.timing.nvidia import clocks_at_work
from pdrop.timing.paired import interval, paired_ratio, prefill, take_turns
from pdrop.timing.protocol import TimingProtocol
from pdrop.timing.timeline import answer

Measurement = dict[str, Any]
# of `selection` on a GPU, in the record
BOUND = "an upper bound: each hook is timed alone, with the device's queue emptied before and after it"
NOT_PIXELS = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    schedule: Schedule,
    protocol: TimingProtocol,
    preprocess: Callable[[], Any] | None = None,
    tokenizer: Any = None,
) -> Measurement:
    """Measure a run.

    Args:
        model: In eval mode, with nothing attached.
        inputs: One batch of prompts with their pixels, on the model's device.
        method: The method to measure,
        schedule: with this schedule, which has a boundary.
        protocol: How long, how many tokens, whether memory.
        preprocess: Makes the inputs from images and text; timed on the CPU if given.
        tokenizer: The prompts' tokenizer, for methods that read the question.

    Returns:
        `stages` ({name: {this, none, ratio}}), `end_to_end` (the same by length), `kernels` (both, by the order of
        attention kernels), `memory`, `conditions` (before, after), `invalid` (why the numbers do not count; empty if
        they do), `notes` (remarks on a stage) and `protocol`.

    Raises:
        ValueError: If the schedule is empty or the protocol times nothing.
    """
    if not schedule.stages:
        raise ValueError("a schedule without a boundary drops nothing: there is nothing to compare")
    device = model_device(model)
    attachment = attach(model, method, schedule, tokenizer=tokenizer)
    with rows_not_packed(model, inputs):
        before = at_work(model, inputs, device)
        found = turns(model, inputs, attachment, protocol, device)
        stages: Measurement = found["stages"]
        pixels = {name: value for name, value in inputs.items() if name not in NOT_PIXELS}
        if pixels:
            stages["vision"] = unpaired_times(lambda: tower_ms(model, pixels, device), protocol)
        stages["selection"] = unpaired_times(lambda: selection_ms(model, inputs, method, schedule, tokenizer), protocol)
        if preprocess is not None:
            stages["preprocess"] = unpaired_times(lambda: time_call(preprocess, torch.device("cpu")).wall_ms, protocol)
        if protocol.memory:
            found["memory"] = peaks(model, inputs, attachment, protocol, device)
        for name in protocol.kernels:
            with sdpa_order(name):
                found.setdefault("kernels", {})[name] = turns(model, inputs, attachment, protocol, device)
        after = at_work(model, inputs, device)
    found |= {"notes": {"selection": BOUND} if device.type == "cuda" else {}}
    return found | described({"before": before, "after": after}, invalid(before, after), inputs, protocol)


def measure_prefill(
    model: Any,
    inputs: Mapping[str, Any],
    method: Method,
    schedule: Schedule,
    protocol: TimingProtocol,
    tokenizer: Any = None,
) -> Measurement:
    """Prefills and conditions only: an indication that can be measured on a busy machine.

    Arguments, errors and result as in `measure`, with one stage and no answers. Load by others is in the conditions and
    does not make it invalid: both sides take turns under it.
    """
    if not schedule.stages:
        raise ValueError("a schedule without a boundary drops nothing: its prefill is the unpruned one, not timed")
    device, attachment = model_device(model), attach(model, method, schedule, tokenizer=tokenizer)
    with rows_not_packed(model, inputs):
        before = at_work(model, inputs, device)
        found = prefills(model, inputs, attachment, protocol, device)
        after = at_work(model, inputs, device)
    conditions = {"before": before, "after": after}
    return found | described(conditions, invalid(before, after, busy=False), inputs, protocol)


def described(
    conditions: Measurement, invalid: list[str], inputs: Mapping[str, Any], protocol: TimingProtocol
) -> Measurement:
    """Remarks and settings of a measurement other than its numbers."""
    return {
        "conditions": conditions,
        "invalid": invalid,
        "protocol": protocol.spelled,
        "batch": len(inputs["input_ids"]),
        "images": protocol.images,
    }


def at_work(model: Any, inputs: Mapping[str, Any], device: torch.device) -> Measurement:
    """The current conditions, with the clocks of a GPU under prefills."""
    clocks = clocks_at_work(lambda: prefill(model, inputs), device) if device.type == "cuda" else {}
    return conditions(model) | clocks


def turns(
    model: Any, inputs: Mapping[str, Any], attachment: Any, protocol: TimingProtocol, device: torch.device
) -> Measurement:
    """`stages` and `end_to_end`: answers, or prefills if no answers are asked for."""
    timed = answers if protocol.new_tokens else prefills
    return timed(model, inputs, attachment, protocol, device)


def prefills(
    model: Any, inputs: Mapping[str, Any], attachment: Any, protocol: TimingProtocol, device: torch.device
) -> Measurement:
    """One prefill per turn."""

    def call() -> Timed:
        return time_call(lambda: prefill(model, inputs), device)

    samples = take_turns({"this": within(attachment, call), "none": call}, protocol)
    times = {name: [sample.wall_ms for sample in side] for name, side in samples.items()}
    return {"stages": {"prefill": paired_times(times["this"], times["none"])}, "end_to_end": {}}


def within(attachment: Any, call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with the method attached."""

    def attached() -> Any:
        with attachment:
            return call()

    return attached


def answers(
    model: Any, inputs: Mapping[str, Any], attachment: Any, protocol: TimingProtocol, device: torch.device
) -> Measurement:
    """One generation of the longest answer per turn: it also gives the times of all shorter ones."""
    longest = max(protocol.new_tokens)

    def call() -> Any:
        return answer(model, inputs, longest, device)

    samples: Any = take_turns({"this": within(attachment, call), "none": call}, protocol)
    stages = {"prefill": paired_times(*([line.ttft_ms for line in samples[side]] for side in ("this", "none")))}
    if longest > 1:
        stages["decode"] = paired_times(*([line.tpot_ms for line in samples[side]] for side in ("this", "none")))
    lengths = {
        str(n): paired_times(*([line.ms[n - 1] for line in samples[side]] for side in ("this", "none")))
        for n in protocol.new_tokens
    }
    return {"stages": stages, "end_to_end": lengths}


def tower_ms(model: Any, pixels: Mapping[str, Any], device: torch.device) -> float:
    """Milliseconds of tower and projector."""

    def call() -> Any:
        with torch.inference_mode():
            return model.get_image_features(**pixels, return_dict=True)

    return time_call(call, device).wall_ms


def selection_ms(
    model: Any, inputs: Mapping[str, Any], method: Method, schedule: Schedule, tokenizer: Any = None
) -> float:
    """Milliseconds inside the hooks of one prefill: reading the prompt, ranking, gathering, masks."""
    with (attachment := ClockedAttachment(model, method, schedule, tokenizer)):
        prefill(model, inputs)
        return attachment.spent * 1000


def peaks(
    model: Any, inputs: Mapping[str, Any], attachment: Any, protocol: TimingProtocol, device: torch.device
) -> Measurement:
    """Peak memory of both sides."""
    longest = max(protocol.new_tokens, default=0)

    def once() -> Any:
        return prefill(model, inputs)

    def whole() -> Any:
        return answer(model, inputs, longest, device)

    last = whole if longest > 1 else None
    with attachment:
        this = memory(model, once, last, device)
    return {"this": this, "none": memory(model, once, last, device)}


def paired_times(this: Sequence[float], none: Sequence[float]) -> Measurement:
    """Times of both sides, and their paired ratio."""
    return {"this": summary(this, "ms"), "none": summary(none, "ms"), "ratio": summary(this, "ratio", none)}


def summary(values: Sequence[float], unit: str, base: Sequence[float] | None = None) -> Measurement:
    """Median, IQR, p90, bootstrap interval and raw values."""
    found = interval(values, unit) if base is None else paired_ratio(values, base)
    return {**asdict(found), "p90": float(np.percentile(found.values, 90))}


def unpaired_times(call: Callable[[], float], protocol: TimingProtocol) -> Measurement:
    """Milliseconds of a stage that both sides share, or that only one has."""
    call()
    return {"this": summary([call() for _ in range(max(3, min(10, protocol.pairs)))], "ms")}


def pooled(processes: Sequence[Measurement]) -> Measurement:
    """Measurements of one run by several processes, pooled: raw values together, intervals over all of them.

    Raises:
        ValueError: If they were made under different conditions.
    """
    from pdrop.timing.conditions import refuse_differences

    first = processes[0]
    for process in processes[1:]:
        refuse_differences(first["conditions"]["before"], process["conditions"]["before"])
    together = first | pooled_turns(processes)
    if "kernels" in first:
        kernels = {name: pooled_turns([process["kernels"][name] for process in processes]) for name in first["kernels"]}
        together["kernels"] = kernels
    together["invalid"] = sorted({reason for process in processes for reason in process["invalid"]})
    together["processes"] = [
        {name: times["ratio"]["median"] for name, times in process["stages"].items() if "ratio" in times}
        for process in processes
    ]
    return together


def pooled_turns(processes: Sequence[Measurement]) -> Measurement:
    """`stages` and `end_to_end` of several processes, pooled."""
    return {
        group: {name: pooled_times([process[group][name] for process in processes]) for name in processes[0][group]}
        for group in ("stages", "end_to_end")
    }


def pooled_times(measurements: Sequence[Measurement]) -> Measurement:
    """One measurement of several processes, pooled."""
    values = {side: [v for times in measurements for v in times[side]["values"]] for side in measurements[0]}
    if "ratio" not in values:
        return {side: summary(v, "ms") for side, v in values.items()}
    return paired_times(values["this"], values["none"])
