"""Stages, answers, memory, conditions: what is measured of a cell. No test here depends on how fast anything is."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import training_args
from transformers.utils.import_utils import enable_tf32

from pdrop import Method, PyramidDrop, Schedule, attach, pyramid
from pdrop.cli import compose
from pdrop.conformance.families import CORE, build, fresh
from pdrop.conformance.prompts import sample, single
from pdrop.cost.flops import kv_bytes
from pdrop.methods.random_drop import twin_of
from pdrop.record import EQUAL_CONDITIONS
from pdrop.runs.settings import Settings, scheduled
from pdrop.runs.timed import in_fresh_processes, measured_alone
from pdrop.shapes import ModelSizes
from pdrop.timing.clock import Timed
from pdrop.timing.conditions import conditions, differences, invalid, refuse_differences, tf32
from pdrop.timing.measure import measure, pooled
from pdrop.timing.memory import cache_bytes, peak, weight_bytes
from pdrop.timing.paired import prefill, warm_up
from pdrop.timing.protocol import TimingProtocol
from pdrop.timing.timeline import Timeline, answer

CPU = torch.device("cpu")
SCHEDULE = pyramid(6, layers=(2, 4), ratio=0.5)
METHOD = PyramidDrop(positions="original")


def test_an_answer_has_a_fixed_length_and_a_time_for_each_token() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    model.generation_config.eos_token_id = list(range(150))  # most of what comes next would end the answer
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    line = answer(model, inputs, 5, CPU)
    assert len(line.ms) == 5 == len(seen)
    assert list(line.ms) == sorted(line.ms) and line.ms[0] > 0
    assert line.ttft_ms == line.ms[0] and line.wall_ms == line.ms[-1]
    assert line.tpot_ms == pytest.approx((line.ms[4] - line.ms[0]) / 4)
    assert Timeline((3.0,), 1.0).tpot_ms is None
    with attach(model, METHOD, SCHEDULE) as trace:
        answer(model, inputs, 3, CPU)
    assert trace.prefills == 1, "one prompt, then steps on its cache"


@pytest.mark.product(2)
@pytest.mark.parametrize("family", CORE)
def test_a_run_has_every_measurement(family: str) -> None:
    model = fresh(family, "sdpa", torch.float32)
    inputs = single(family, sample(family, model, (3, 5, 2)))
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    protocol = TimingProtocol("test", warmup=1, pairs=3, new_tokens=(1, 4), memory=True)
    found = measure(model, inputs, METHOD, SCHEDULE, protocol, preprocess=lambda: None)
    assert set(found["stages"]) == {"prefill", "decode", "vision", "selection", "preprocess"}
    assert set(found["end_to_end"]) == {"1", "4"}
    for times in (found["stages"]["prefill"], found["stages"]["decode"], *found["end_to_end"].values()):
        this, none, ratio = (times[side]["values"] for side in ("this", "none", "ratio"))
        assert len(this) == len(none) == len(ratio) == 3
        assert ratio == pytest.approx([a / b for a, b in zip(this, none)])
        assert times["ratio"]["low"] <= times["ratio"]["median"] <= times["ratio"]["high"]
    assert found["end_to_end"]["1"] == found["stages"]["prefill"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    layers = found["memory"]["this"]["kv_per_layer"]
    arch = ModelSizes.from_config(model.config)
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].numel() - visual
    entering = METHOD.tokens_per_layer(SCHEDULE, visual, 6)
    assert layers == [kv_bytes(arch, [n + text], 4) for n in entering], "the cache's tensors are the closed form"
    assert found["memory"]["this"]["weights"] == weight_bytes(model)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    if not (len(found["invalid"]) and "load" in found["invalid"][0]):  # others may use this machine
        assert found["invalid"] == []


def test_prefill_alone_where_no_answer_is_asked_for() -> None:
    model = build("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    found = measure(model, inputs, METHOD, SCHEDULE, TimingProtocol("test", pairs=2))
    assert found["end_to_end"] == {} and "decode" not in found["stages"] and "memory" not in found
    with pytest.raises(ValueError, match="nothing to compare"):
        measure(model, inputs, METHOD, Schedule(), TimingProtocol("test", pairs=2))


def test_warm_until_steady() -> None:
    times = iter([90.0, 30.0, 12.0, 10.1, 10.0, 10.05, 1.0])
    assert warm_up(lambda: Timed(next(times), 0.0), TimingProtocol("x", warmup=3, pairs=1, steady=0.02)) == 6
    falling = iter(range(1000, 0, -100))
    assert warm_up(lambda: Timed(float(next(falling)), 0.0), TimingProtocol("x", warmup=1, pairs=1, steady=0.02)) == 10
    assert warm_up(lambda: Timed(1.0, 0.0), TimingProtocol("x", warmup=2, pairs=1)) == 2


# ------------------------------------------------------------------ conditions


def test_backends_are_noted_of_tower_and_decoder_apart() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    model.model.vision_tower.set_attn_implementation("eager")
    found = conditions(model)
    assert (found["attention_decoder"], found["attention_tower"]) == ("sdpa", "eager")
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", torch.get_num_threads())


@pytest.mark.parametrize("name", EQUAL_CONDITIONS)
def test_what_may_not_be_compared_is_refused(name: str) -> None:
    here = conditions(build("llava", "sdpa", torch.float32))
    assert differences(here, dict(here, load=99.0)) == []
    refuse_differences(here, here)
    with pytest.raises(ValueError, match=rf"may not be compared: {name}: .* and other"):
        refuse_differences(here, here | {name: "other"})
    assert invalid(here, here | {name: "other"})[0].startswith(f"changed while measuring: {name}")


def test_a_device_that_others_use_gives_no_result() -> None:
    gpu: dict[str, Any] = dict.fromkeys(EQUAL_CONDITIONS) | {"device": "cuda", "others_gib": 0.4}
    assert invalid(gpu, gpu) == []
    assert invalid(gpu, gpu | {"others_gib": 30.0}) == ["others hold 30.0 GiB of the GPU"]
    cpu: dict[str, Any] = dict.fromkeys(EQUAL_CONDITIONS) | {"device": "cpu", "threads": 1, "cores": 4, "load": 2.0}
    assert invalid(cpu, cpu) == []
    assert "a load of 9.0 on 4 cores" in invalid(cpu | {"load": 9.0}, cpu)[0]


def test_processes_are_pooled_only_under_equal_conditions() -> None:
    model = build("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    cells = [
        measure(model, inputs, METHOD, SCHEDULE, TimingProtocol("t", pairs=2, new_tokens=(1, 2))) for _ in range(2)
    ]
    both = pooled(cells)
    values = [cell["stages"]["prefill"]["ratio"]["values"] for cell in cells]
    assert both["stages"]["prefill"]["ratio"]["values"] == pytest.approx(values[0] + values[1])
    assert [p["prefill"] for p in both["processes"]] == [c["stages"]["prefill"]["ratio"]["median"] for c in cells]
    cells[1]["conditions"]["before"]["threads"] = 7
    with pytest.raises(ValueError, match="threads: 1 and 7"):
        pooled(cells)


# ------------------------------------------------------------------ memory


def test_bytes_of_a_cache_and_of_a_peak() -> None:
    model = build("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    held = cache_bytes(prefill(model, inputs).past_key_values)
    assert held == [2 * 2 * 8 * 4 * inputs["input_ids"].numel()] * 6  # keys and values, 2 heads of 8, float32

    def big() -> None:
        torch.ones(100, 1 << 20).sum()  # 400 MiB

    found = peak(big, CPU)["resident"]
    assert found is None or 350 << 20 < found < 600 << 20


# ------------------------------------------------------------------ fresh processes


def of_embedded(protocol: TimingProtocol, method: Method = METHOD) -> Settings:
    """The embedded model on the CPU, nothing asked."""
    dials = {"tasks": [], "method": "none", "device": "cpu", "batch_size": 1}
    settings = replace(compose.settings(dials), method=method, protocol=protocol)
    return scheduled(settings, pyramid(12, ratio=0.3))


@pytest.mark.slow
def test_a_fresh_process_measures_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = TimingProtocol("full", warmup=1, pairs=2, new_tokens=(1, 2), images=2, fresh=True, repeats=1)
    settings = of_embedded(protocol, PyramidDrop())
    alone = in_fresh_processes(settings)
    found = alone.found
    assert len(found["end_to_end"]["2"]["ratio"]["values"]) == 2 and found["images"] == 2
    assert found["conditions"]["before"]["threads"] == torch.get_num_threads()
    assert "preprocess" in found["stages"]
    assert alone.counted == settings.prompt.under(settings.method, settings.schedule, 12)
    assert alone.timed_prompt == {"text": 14, "visual": 288}
    forked = multiprocessing.get_context("fork")  # what fails at once needs no fresh imports
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forked)
    with pytest.raises(RuntimeError, match=r"failed: .*no such folder"):
        in_fresh_processes(replace(settings, source=replace(settings.source, path="/no/where")))


@pytest.mark.parametrize("method", [METHOD, twin_of(METHOD, seed=3)], ids=["method", "twin"])
def test_settings_hold_all_that_a_process_needs(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    from pdrop.timing import measure as module

    protocol = TimingProtocol("full", warmup=1, pairs=2, new_tokens=(1, 2), fresh=True)
    settings = of_embedded(protocol, method)
    seen: list[Any] = []
    monkeypatch.setattr(module, "measure", lambda *given: seen.append(given) or {"found": 1})
    threads = torch.get_num_threads()
    sent = ForkingPickler.loads(ForkingPickler.dumps(settings))  # as multiprocessing hands it over
    text, prompt, counted = measured_alone(sent, threads)
    assert json.loads(text) == {"found": 1} and prompt["visual"] == 144 and counted is not None
    _, inputs, asked, schedule, told, make, tokenizer = seen[0]
    assert asked == method and schedule == settings.schedule and told == protocol and make is not None
    assert inputs["input_ids"].shape[0] == 1 and tokenizer is not None


def test_protocols_say_what_is_wrong_with_them() -> None:
    assert TimingProtocol("quick", 2, 10, 1.5).spelled == "quick 2/10/1.5"
    full = TimingProtocol("full", 5, 20, 10, 0.02, (16, 1), memory=True, fresh=True, repeats=3)
    assert full.spelled == "full 5/20/10 steady 0.02 new 1/16 memory fresh 3"
    with pytest.raises(ValueError, match=r"latency\.fresh=true"):
        TimingProtocol("x", repeats=2)
    with pytest.raises(ValueError, match="from 1 on"):
        TimingProtocol("x", new_tokens=(0,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("pairs", "abc"), ("pairs", None), ("pairs", 2.5), ("warmup", True), ("memory", "maybe"), ("fresh", 1)],
        *[("min_seconds", "1s"), ("steady", None), ("new_tokens", 2), ("new_tokens", "16"), ("new_tokens", ["a"])],
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_dial(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^latency\.{field} is .*, not {value!r}$".replace("[", r"\[")):
        TimingProtocol("x", **{field: value})


def test_tf32_is_read_however_it_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older flag raises once the newer way of asking has been used anywhere in the process."""
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision, torch.backends.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert not tf32()
        matmul.fp32_precision = "tf32"
        assert tf32()
        matmul.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
        assert tf32(), "that of all backends holds where none is set"
        with pytest.raises(RuntimeError, match="legacy and new"):
            bool(matmul.allow_tf32)
        for asked in (True, False):  # as a training sets it
            enable_tf32.cache_clear()
            matmul.fp32_precision = torch.backends.fp32_precision = "none"
            training_args.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, tf32=asked)
            assert tf32() is asked
        for said, meant in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(said)
            assert tf32() is meant
    finally:
        enable_tf32.cache_clear()
        matmul.fp32_precision, torch.backends.fp32_precision = before
    for asked in (True, False):
        matmul.allow_tf32 = asked
        assert tf32() is asked
