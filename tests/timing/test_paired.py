"""Timing: who is measured, in which order, and what is made of the numbers. No test here depends on how fast it is."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pdrop.conformance.families import fresh
from pdrop.conformance.prompts import sample, single
from pdrop.methods.base import View
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.record import Interval
from pdrop.schedule import Schedule, pyramid
from pdrop.timing.clock import Timed, time_call
from pdrop.timing.paired import (
    decoder_inputs,
    interval,
    paired_ratio,
    prefill,
    prefill_ratio,
    selection_share,
    take_turns,
)
from pdrop.timing.protocol import TimingProtocol

SCHEDULE = pyramid(6, layers=(2, 4), ratio=0.5)


def test_sides_take_turns() -> None:
    order = []

    def side(name: str) -> Any:
        def call() -> Timed:
            order.append(name)
            return Timed(float(len(order)), 0.0)

        return call

    samples = take_turns({name: side(name) for name in "ab"}, TimingProtocol("test", warmup=2, pairs=3))
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert [sample.wall_ms for sample in samples["a"]] == [5, 8, 9]
    assert [sample.wall_ms for sample in samples["b"]] == [6, 7, 10]


def test_turns_go_on_until_the_time_is_up() -> None:
    def call() -> Timed:
        return time_call(lambda: sum(range(100_000)), torch.device("cpu"))

    samples = take_turns({"one": call}, TimingProtocol("test", warmup=0, pairs=1, min_seconds=0.1))["one"]
    assert len(samples) > 1
    assert sum(sample.wall_ms for sample in samples[:-1]) <= 100


def test_interval() -> None:
    got = interval([1.0, 2.0, 3.0, 4.0, 100.0], "ms")
    assert (got.unit, got.median, got.iqr) == ("ms", 3.0, 2.0)
    assert got.low >= 1.0 and got.low < 3.0 < got.high <= 100.0
    assert got.values == [1.0, 2.0, 3.0, 4.0, 100.0]
    assert interval([1.0, 2.0, 3.0, 4.0, 100.0], "ms") == got  # the resampling is seeded
    constant = interval([2.0] * 7, "ms")
    assert (constant.median, constant.iqr, constant.low, constant.high) == (2.0, 0.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="nothing was measured"):
        interval([], "ms")


def test_a_paired_ratio_cancels_drift() -> None:
    drift = [1.0, 1.5, 3.0, 2.0, 5.0, 1.2]
    got = paired_ratio([0.5 * x for x in drift], drift)
    assert (got.unit, got.median, got.iqr, got.low, got.high) == ("ratio", 0.5, 0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="are not pairs"):
        paired_ratio([1.0], [1.0, 2.0])


def test_prefill_ratio_times_both_sides_and_leaves_the_model_alone() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    seen: list[int] = []
    layer = model.model.language_model.layers[-1]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    before = prefill(model, inputs).logits
    hooks = hooks_of(model)
    whole = seen.pop()

    this, unpruned, ratio = prefill_ratio(
        model, inputs, PyramidDrop(), SCHEDULE, TimingProtocol("test", warmup=1, pairs=4)
    )
    assert hooks_of(model) == hooks
    kept = whole - 32 + 8
    # two warm-ups, then pairs that swap who goes first
    assert seen == [kept, whole] + [kept, whole, whole, kept] * 2
    assert [len(x.values) for x in (this, unpruned, ratio)] == [4, 4, 4]
    assert ratio.values == pytest.approx([a / b for a, b in zip(this.values, unpruned.values)])
    assert (this.unit, unpruned.unit, ratio.unit) == ("ms", "ms", "ratio")
    assert all(isinstance(x, Interval) and x.low <= x.median <= x.high and x.low > 0 for x in (this, unpruned, ratio))
    handle.remove()
    assert torch.equal(prefill(model, inputs).logits, before)


def test_a_prefill_is_the_whole_prompt_to_one_logit() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    calls: list[str] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    output = prefill(model, inputs)
    assert output.logits.shape[:2] == (1, 1)
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert calls == ["tower"]
    alone = prefill(model, decoder_inputs(inputs))
    assert calls == ["tower"]
    assert alone.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def hooks_of(model: Any) -> list[int]:
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


def test_selection_share_grows_with_what_selection_does() -> None:
    @dataclass(frozen=True)
    class Slow(PyramidDrop):
        def score(self, view: View) -> torch.Tensor:
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
            return super().score(view)

    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    prefill(model, inputs)  # transformers registers hooks of its own at the first forward
    before = hooks_of(model)
    assert 0 < selection_share(model, inputs, PyramidDrop(), SCHEDULE) < 1
    # two boundaries spin for 0.4 s of the processor's time; the tiny model itself takes some milliseconds
    assert 0.5 < selection_share(model, inputs, Slow(), SCHEDULE) < 1
    assert hooks_of(model) == before


def test_the_benchmark_compares_every_case_with_the_unpruned_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    bench = importlib.import_module("benchmarks.bench")
    model = bench.build(layers=8, hidden=32, heads=2, intermediate=64)
    prefill(model, bench.prompt(model, 4))
    before = hooks_of(model)
    result = bench.bench_prefill(model, 576, 2, 1, bench.cases(8))
    rows = result["cases"]
    assert set(rows) == {case.name for case in bench.cases(8)}
    assert all(len(row["cpu_ratio"]["values"]) == 2 for row in rows.values())
    assert rows["PyramidDrop S=4 .5"]["flops_ratio"] > rows["its random twin"]["flops_ratio"]
    assert rows["keep = 1"]["flops_ratio"] > 1  # it ranks, and drops nothing
    decoding = bench.bench_decode(model, 576, TimingProtocol("test", warmup=0, pairs=2))
    assert all(0 < row["flops_ratio"] < 1 for row in decoding["cases"].values())
    assert hooks_of(model) == before


def test_what_is_not_timed() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    with pytest.raises(ValueError, match="without a boundary"):
        prefill_ratio(model, inputs, PyramidDrop(), Schedule(), TimingProtocol("test", pairs=1))
    with pytest.raises(ValueError, match="times nothing"):
        prefill_ratio(model, inputs, PyramidDrop(), SCHEDULE, TimingProtocol("off"))
    with pytest.raises(ValueError, match="negative"):
        TimingProtocol("wrong", pairs=-1)


def test_protocols_of_the_command_line() -> None:
    folder = Path(__file__).parents[2] / "conf" / "latency"
    for path in folder.glob("*.yaml"):
        fields = yaml.safe_load(path.read_text())
        assert fields.pop("_target_") == "pdrop.timing.protocol.TimingProtocol"
        protocol = TimingProtocol(**fields)
        assert protocol.name == path.stem
        assert protocol.measures == (path.stem != "off")
