"""Budgets: the settings that papers leave out, equal spending for every method, and bounds for what cannot be met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrop import (
    DivPrune,
    FasterVLM,
    FastV,
    Pool,
    PruMerge,
    PyramidDrop,
    RandomDrop,
    Schedule,
    SparseVLM,
    SparseVLMPlus,
    Uniform,
    VisionZip,
    pyramid,
    single,
    solve,
)
from pdrop.cost.budget import Budget, Pricing
from pdrop.cost.flops import cost
from pdrop.methods.base import Method
from pdrop.methods.pyramiddrop_schedules import pyramiddrop
from pdrop.methods.random_drop import twin_of
from pdrop.models.shipped import names, read, reference_prompt
from pdrop.shapes import ModelSizes, PromptSize

SIZE: Any = dict(num_layers=32, visual_tokens=576)
METHODS = [PyramidDrop(), FastV(), SparseVLM(), SparseVLMPlus(), RandomDrop()]


@pytest.mark.parametrize(
    ("layers", "tokens", "ratio"),
    [
        ((8, 16, 24), 192, 0.253),
        ((2, 8, 16), 192, 0.560),
        ((2, 8, 16), 128, 0.420),
        ((2, 8, 16), 64, 0.192),
        ((2, 4, 6, 8), 192, 0.696),
        ((2, 4, 6, 8), 128, 0.587),
        ((2, 4, 6, 8), 64, 0.369),
        ((4, 8, 16), 192, 0.527),
        ((4, 8, 16), 128, 0.353),
    ],
)
def test_the_lambdas_that_papers_do_not_print(layers: tuple[int, ...], tokens: int, ratio: float) -> None:
    schedule = solve(PyramidDrop(), f"avg_tokens:{tokens}", **SIZE, layers=layers)
    assert schedule.layers == layers
    assert schedule.stages[0].keep == pytest.approx(ratio, abs=6e-4)
    assert sum(schedule.tokens_per_layer(576, 32)) / 32 == pytest.approx(tokens, abs=1)


@pytest.mark.parametrize(("tokens", "kept"), [(192, 166), (128, 98), (64, 29)])
def test_what_fastv_must_keep(tokens: int, kept: int) -> None:
    (stage,) = solve(FastV(), f"avg_tokens:{tokens}", **SIZE)
    assert stage.layer == 2 and FastV().count(stage, 576) == kept
    assert (2 * 576 + 30 * kept) / 32 <= tokens < (2 * 576 + 30 * (kept + 1)) / 32, "as many as the budget pays for"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("budget", ["avg_tokens:192", "avg_tokens:128", "keep:0.25", "flops:0.45", "kv:0.4"])
def test_one_budget_is_the_same_for_every_method(method: Method, budget: str) -> None:
    wanted, schedule = Budget.parse(budget), solve(method, budget, **SIZE)
    tokens = method.tokens_per_layer(schedule, 576, 32)
    spent = Pricing(method.priced_as, 32, PromptSize(0, 576))(schedule, wanted.kind)
    assert spent == pytest.approx(wanted.amount, rel=0.01)
    if wanted.kind == "avg_tokens":
        assert sum(tokens) / 32 == pytest.approx(wanted.amount, abs=1)


@pytest.mark.parametrize("name", ["llava_1_5_7b", "llava_1_5_13b", "qwen2_5_vl_7b"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_budget_of_flops_is_what_the_tables_show(method: Method, name: str) -> None:
    arch, prompt = ModelSizes.from_config(read(name)), reference_prompt(name)
    for budget in ("flops:0.5", "kv:0.45"):
        schedule = solve(
            method, budget, arch.layers, prompt.visual, text_tokens=prompt.text, arch=arch, images=prompt.images
        )
        left = prompt.under(method, schedule, arch.layers)
        spent = cost(arch, [left], schedule, method, 2)
        shown = spent.prefill_flops_ratio if budget.startswith("flops") else spent.kv_ratio
        assert shown == pytest.approx(float(budget.split(":")[1]), abs=0.003)


NAMED = {  # layers, tokens: STAR-Pro's ratio, and what whole tokens then let in on average
    (32, 192): (0.5810, 191.4), (32, 128): (0.4371, 127.8), (32, 64): (0.1960, 63.5),
    (40, 192): (0.586, 190.95), (40, 128): (0.448, 127.65), (40, 64): (0.225, 63.6),
}  # fmt: skip


def test_a_column_of_budgets_has_one_shape() -> None:
    """Boundaries 2 and the quarters, whatever the budget; the ratios are those of re-runs, to their digits."""
    for (layers, tokens), (ratio, entering) in NAMED.items():
        solved = solve(PyramidDrop(), f"avg_tokens:{tokens}", num_layers=layers, visual_tokens=576)
        named = pyramiddrop(layers, tokens)
        assert solved.layers == named.layers == (2, layers // 4, layers // 2, 3 * layers // 4)
        assert solved.stages[0].keep == pytest.approx(ratio, abs=6e-4) and named.stages[0].keep == ratio
        average = sum(PyramidDrop().tokens_per_layer(named, 576, layers)) / layers
        assert average == pytest.approx(entering, abs=0.06)
    every = {solve(PyramidDrop(), f"keep:{keep}", num_layers=12, visual_tokens=144).layers for keep in (0.2, 0.5, 0.9)}
    assert every == {(2, 3, 6, 9)}
    assert solve(PyramidDrop(), "avg_tokens:576", **SIZE) == pyramid(32, ratio=1.0, layers=(2, 8, 16, 24))
    assert solve(PyramidDrop(), "avg_tokens:192", **SIZE, layers=(8, 16, 24)).layers == (8, 16, 24), "asked for"
    assert solve(RandomDrop(), "avg_tokens:64", **SIZE) == solve(PyramidDrop(), "avg_tokens:64", **SIZE)
    three = solve(PyramidDrop(), "avg_tokens:300", **SIZE, dial=lambda ratio, at: pyramid(32, 3, ratio, at))
    assert three.layers == (10, 20), "another number of stages is another family"
    twin = solve(twin_of(FastV()), "avg_tokens:64", **SIZE, dial=lambda ratio, layers: single(2, ratio))
    assert twin == solve(FastV(), "avg_tokens:64", **SIZE)


@pytest.mark.parametrize("tokens", [192, 128, 64, 32, 320])
def test_a_number_of_tokens_before_the_decoder_is_met_exactly(tokens: int) -> None:
    """A third of 576 has no decimal fraction: the readable one next above it lets 192 in, not 191."""
    for method in (DivPrune(), FasterVLM(), VisionZip(), PruMerge()):
        schedule = solve(method, f"avg_tokens:{tokens}", **SIZE)
        assert method.tokens_per_layer(schedule, 576, 32) == [tokens] * 32, (method, schedule)
        assert len(str(schedule.stages[0].keep)) <= 8


REFUSED: list[Any] = [
    (PyramidDrop(), "avg_tokens:128", {"layers": (8, 16, 24)}, r"8/16/24 cannot go below 144 of 576"),
    (PyramidDrop(), "avg_tokens:30", {}, r"2/8/16/24 cannot go below 36 of 576 .*; layers=\[1, 8, 16, 24\] can"),
    (PyramidDrop(), "avg_tokens:10", {"layers": (1, 8)}, r"1/8 cannot go below 18 of 576 average tokens$"),
    (FastV(), "avg_tokens:30", {}, r"2 cannot go below 36 of 576 average tokens"),
    (FastV(), "flops:0.05", {}, r"2 cannot go below 0\.06\d of the flops"),
    (SparseVLM(), "avg_tokens:500", {}, r"3/7/16 cannot go above 344"),
    (PyramidDrop(), "avg_tokens:600", {}, "has 576 visual tokens in all"),
    (PyramidDrop(), "tokens:192", {}, "avg_tokens, keep, flops, kv, prefill_ms"),
    (PyramidDrop(), "flops:45", {}, "at most 1, not 45"),
    (PyramidDrop(), "flops:0.5", {"text_tokens": 60}, "give arch="),
    (PyramidDrop(), "prefill_ms:20", {}, "give measure="),
    (Method(), "avg_tokens:192", {}, "Method has no schedule of its own"),
]


@pytest.mark.parametrize(("method", "budget", "more", "words"), REFUSED)
def test_what_cannot_be_met_is_refused_with_the_bound(method: Method, budget: str, more: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(method, budget, **SIZE, **more)


def test_a_schedule_that_no_dial_turns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 cannot go above 306 of 576"):
        solve(FastV(), "avg_tokens:400", **SIZE, dial=lambda ratio, layers: single(2, 0.5))


def test_milliseconds_are_met_by_measuring() -> None:
    asked: list[Schedule] = []

    def measure(schedule: Schedule) -> float:
        asked.append(schedule)
        return 10 + 90 * schedule.mean_keep(32)

    schedule = solve(PyramidDrop(), "prefill_ms:50", **SIZE, measure=measure)
    assert measure(schedule) == pytest.approx(50, rel=0.03) and len(asked) < 12
    with pytest.raises(ValueError, match=r"8/16/24 cannot go below 32\.5 ms per prefill"):
        solve(PyramidDrop(), "prefill_ms:5", **SIZE, layers=(8, 16, 24), measure=measure)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.integers(4, 80), st.integers(20, 6000), st.floats(0.3, 0.95))
def test_any_depth_and_any_prompt(layers: int, visual: int, keep: float) -> None:
    schedule = solve(PyramidDrop(), f"keep:{keep:.6f}", num_layers=layers, visual_tokens=visual)
    spent = sum(PyramidDrop().tokens_per_layer(schedule, visual, layers)) / layers
    assert keep * visual - len(schedule) < spent <= keep * visual + 0.01


COUNTED = [*METHODS, Uniform(), Pool(), SparseVLM(recycle=0.8, tokens_per_cluster=2), SparseVLMPlus(recycle=0.3)]
SHIPPED = {name: (ModelSizes.from_config(read(name)), reference_prompt(name)) for name in names()}


@settings(derandomize=True, deadline=None, database=None, max_examples=250)
@given(
    method=st.sampled_from(COUNTED),
    name=st.sampled_from(sorted(SHIPPED)),
    kind=st.sampled_from(["avg_tokens", "keep", "flops", "kv"]),
    share=st.floats(0.02, 1),
    shape=st.tuples(st.integers(4, 60), st.integers(6, 60), st.integers(1, 8)),  # layers, width, key heads
    side=st.integers(3, 40),
    images=st.integers(1, 5),
    text=st.integers(1, 300),
)
def test_a_budget_is_never_overspent_and_twins_get_the_same(
    method: Method, name: str, kind: str, share: float, shape: tuple[int, int, int], side: int, images: int, text: int
) -> None:
    """Any method, model shape and number of images; what the tables show of the result is the judge."""
    layers, width, heads = shape
    sizes, prompt = SHIPPED[name]
    sizes = replace(sizes, layers=layers, hidden=64 * width, heads=8, kv_heads=heads, intermediate=150 * width)
    if sizes.tower.grid is None:
        seen: Any = [(1, side * sizes.tower.merge, side * sizes.tower.merge)]
        prompt = PromptSize(text, side * side, images=seen).times(images)
    else:
        prompt = replace(prompt, text=text).times(images)
    amount = share * prompt.visual if kind == "avg_tokens" else share
    size: Any = dict(num_layers=layers, visual_tokens=int(prompt.visual), text_tokens=text, arch=sizes)
    schedule, refusal = attempt(method, f"{kind}:{amount:.6f}", **size, images=prompt.images)
    if schedule is None:
        assert "cannot go" in refusal
        edge = method.dial(float("above" in refusal), layers)  # what the bound is the bound of
        assert (spend(method, edge, sizes, prompt, kind) < amount) == ("above" in refusal), refusal
        return
    assert spend(method, schedule, sizes, prompt, kind) <= amount + 1e-6
    left = prompt.under(method, schedule, layers)
    if not isinstance(method, RandomDrop):
        twin = twin_of(method)
        other = solve(twin, f"{kind}:{amount:.6f}", **size, images=prompt.images)
        assert prompt.under(twin, other, layers) == left and other == schedule
        assert spend(twin, schedule, sizes, prompt, kind) <= amount + 1e-6
    # and no more than a token of each stage is left unspent: at a slightly larger ratio the budget does not pay
    ratio, price = schedule.stages[0].keep or 0.0, Pricing(method, layers, prompt, sizes)
    if ratio + 3e-6 < 1:
        more = method.dial(ratio + 3e-6, layers, schedule.layers)
        assert max(price(more, kind), price.unrounded(more, kind)) > amount - 1e-6


def attempt(*arguments: Any, **more: Any) -> tuple[Schedule | None, str]:
    """The schedule, or why there is none."""
    try:
        return solve(*arguments, **more), ""
    except ValueError as error:
        return None, str(error)


def spend(method: Method, schedule: Schedule, sizes: ModelSizes, prompt: PromptSize, kind: str) -> float:
    """What the tables show."""
    shown = cost(sizes, [prompt.under(method, schedule, sizes.layers)], schedule, method, 2)
    tokens = sum(shown.visual_tokens_per_layer) / sizes.layers
    return {
        "avg_tokens": tokens,
        "keep": shown.mean_keep,
        "flops": shown.prefill_flops_ratio,
        "kv": shown.kv_ratio,
    }[kind]
