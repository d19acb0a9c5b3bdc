"""Schedules: the papers' defaults and ablations, canonical spelling, and every refusal.

pytest tests/contracts/test_schedule.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdrop import FastV, PyramidDrop, RandomDrop
from pdrop.schedule import Schedule, Stage, kept, none, pyramid, single

DRAWN = settings(derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    ("stages", "layers"),
    [(3, (10, 20)), (4, (8, 16, 24)), (5, (6, 12, 18, 24)), (1, ()), (2, (16,))],
    ids=lambda value: str(value),
)
def test_the_stages_of_the_paper(stages: int, layers: tuple[int, ...]) -> None:
    """arXiv 2410.17247: S=4 is the default, S=3 and S=5 the ablation of its appendix B, for 32 layers."""
    schedule = pyramid(num_layers=32, stages=stages)
    assert schedule.layers == layers
    assert [stage.keep for stage in schedule] == [0.5**s for s in range(1, stages)]


@pytest.mark.parametrize(
    ("schedule", "tokens"),
    [
        pytest.param(pyramid(32), 270, id="pyramiddrop"),  # table 5
        pytest.param(single(2, 0.5), 306, id="fastv-k2-half"),  # table 5
        pytest.param(pyramid(32, layers=(2, 8, 16), ratio=0.19), 64, id="budget-64"),  # the authors, issue 29
        pytest.param(pyramid(32, layers=(2, 8, 16), ratio=0.42), 128, id="budget-128"),
        pytest.param(pyramid(32, layers=(2, 8, 16), ratio=0.56), 192, id="budget-192"),
        pytest.param(none(32), 576, id="none"),
    ],
)
def test_average_tokens_of_576(schedule: Schedule, tokens: int) -> None:
    assert abs(schedule.mean_keep(32) * 576 - tokens) < 1.0
    assert abs(schedule.mean_keep(32, visual=576) * 576 - tokens) < 1.5, "whole tokens lose a fraction per stage"


def test_tokens_per_layer() -> None:
    assert pyramid(32).tokens_per_layer(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert single(2, 0.5).tokens_per_layer(25, 4) == [25, 25, 12, 12]
    upwards = single(2, 0.5).tokens_per_layer(25, 4, count=lambda stage, visual: math.ceil(visual * (stage.keep or 0)))
    assert upwards == [25, 25, 13, 13]
    listed = Schedule((Stage(2, tokens=300), Stage(6, tokens=200)))
    assert listed.tokens_per_layer(576, 8) == [576] * 2 + [300] * 4 + [200] * 2
    assert listed.tokens_per_layer(250, 8) == [250] * 6 + [200] * 2, "a count above what a prompt has keeps it all"
    assert listed.mean_keep(8, visual=0) == 1.0


def test_ablation_of_lambda() -> None:
    """arXiv 2410.17247, table 7: lambda .4, .5, .6 at 8/16/24."""
    for ratio in (0.4, 0.5, 0.6):
        share = (1 + ratio + ratio**2 + ratio**3) / 4
        assert pyramid(32, ratio=ratio).mean_keep(32) == pytest.approx(share, abs=1e-9)


def test_counts_are_the_whole_part_of_a_double_product() -> None:
    assert kept(Stage(2, 0.29), 100) == 28  # 100 * 0.29 is 28.999999999999996
    assert kept(Stage(2, 0.58), 100) == 57
    assert kept(Stage(2, 1.0), 7) == 7
    assert kept(Stage(2, 0.0), 7) == 0
    assert kept(Stage(2, tokens=9), 7) == 7


def test_each_method_rounds_as_its_own_code_does() -> None:
    """FastV's rounds halves to even, PyramidDrop's takes the whole part; published lists are taken as they are."""
    half, share, listed = Stage(2, 0.5), Stage(2, 0.29), Stage(2, tokens=30)
    for method, counts in ((PyramidDrop(), (12, 13, 28)), (FastV(), (12, 14, 29)), (RandomDrop(), (12, 13, 28))):
        assert (method.count(half, 25), method.count(half, 27), method.count(share, 100)) == counts
        assert method.count(listed, 100) == 30
        assert method.count(listed, 20) == 20


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    layers = sorted(draw(st.sets(st.integers(1, 99), max_size=5)))
    if draw(st.booleans()):
        counts = sorted(draw(st.lists(st.integers(0, 9999), min_size=len(layers), max_size=len(layers))))[::-1]
        return Schedule(tuple(Stage(layer, tokens=count) for layer, count in zip(layers, counts)))
    shares = st.floats(0, 1, allow_subnormal=False)
    keeps = sorted(draw(st.lists(shares, min_size=len(layers), max_size=len(layers))))[::-1]
    return Schedule(tuple(map(Stage, layers, keeps)))


@DRAWN
@given(schedules())
def test_parse_reads_what_str_writes(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule
    assert str(Schedule.parse(str(schedule))) == str(schedule)
    assert Schedule.parse(str(schedule).replace(" ", ", ")) == schedule
    assert hash(Schedule.parse(str(schedule))) == hash(schedule)


@DRAWN
@given(schedules(), st.integers(0, 3000))
def test_tokens_never_come_back(schedule: Schedule, visual: int) -> None:
    entering = schedule.tokens_per_layer(visual, 100)
    assert entering == sorted(entering, reverse=True)
    assert entering[0] == visual
    assert 0 <= schedule.mean_keep(100, visual) <= 1


@DRAWN
@given(st.integers(1, 100), st.integers(1, 12), st.floats(0, 1))
def test_every_pyramid_fits_its_layers(num_layers: int, stages: int, ratio: float) -> None:
    if stages > num_layers:
        with pytest.raises(ValueError, match="do not fit"):
            pyramid(num_layers, stages, ratio)
        return
    schedule = pyramid(num_layers, stages, ratio)
    assert len(schedule) == stages - 1
    assert all(0 < layer < num_layers for layer in schedule.layers)


def test_one_fraction_is_one_schedule() -> None:
    assert Schedule((Stage(2, 0.1 + 0.2),)) == Schedule((Stage(2, 0.3),)) == Schedule.parse("2:.3")
    assert str(Schedule((Stage(2, 0.1 + 0.2),))) == "2:0.3"
    assert str(pyramid(32)) == "8:0.5 16:0.25 24:0.125"
    assert repr(pyramid(32)) == "Schedule('8:0.5 16:0.25 24:0.125')"
    assert str(Schedule()) == "" and Schedule.parse("  ") == Schedule()


REFUSED: list[Any] = [
    pytest.param(lambda: Stage(-1, 0.5), "whole number from 0 on", id="layer-negative"),
    pytest.param(lambda: Stage(True, 0.5), "whole number from 0 on", id="layer-bool"),
    pytest.param(lambda: Stage(2.0, 0.5), "whole number from 0 on", id="layer-float"),  # type: ignore[arg-type]
    pytest.param(lambda: Stage(2), "one of keep=, tokens= and adaptive=True", id="neither-keep-nor-tokens"),
    pytest.param(lambda: Stage(2, 0.5, 7), "one of keep=, tokens= and adaptive=True", id="both-keep-and-tokens"),
    pytest.param(lambda: Stage(2, 0.5, adaptive=True), "one of keep=", id="both-keep-and-adaptive"),
    pytest.param(lambda: Schedule((Stage(2, 0.5), Stage(4, adaptive=True))), "not both", id="keep-then-adaptive"),
    pytest.param(lambda: Schedule((Stage(2, adaptive=True),)).tokens_per_layer(9, 4), "run it", id="adaptive-unknown"),
    pytest.param(lambda: Stage(2, 1.2), "between 0 and 1", id="keep-above-1"),
    pytest.param(lambda: Stage(2, -0.1), "between 0 and 1", id="keep-negative"),
    pytest.param(lambda: Stage(2, math.nan), "between 0 and 1", id="keep-nan"),
    pytest.param(lambda: Stage(2, "0.5"), "between 0 and 1", id="keep-text"),  # type: ignore[arg-type]
    pytest.param(lambda: Stage(2, True), "between 0 and 1", id="keep-bool"),
    pytest.param(lambda: Stage(2, tokens=-1), "count from 0 on", id="tokens-negative"),
    pytest.param(lambda: Stage(2, tokens=1.5), "count from 0 on", id="tokens-float"),  # type: ignore[arg-type]
    pytest.param(lambda: Schedule((Stage(4, 0.5), Stage(2, 0.25))), "rise", id="layers-fall"),
    pytest.param(lambda: Schedule((Stage(4, 0.5), Stage(4, 0.25))), "each named once", id="layers-twice"),
    pytest.param(lambda: Schedule((Stage(2, 0.5), Stage(4, 0.6))), "do not come back", id="keep-grows"),
    pytest.param(lambda: Schedule((Stage(2, tokens=5), Stage(4, tokens=6))), "do not come back", id="tokens-grow"),
    pytest.param(lambda: Schedule((Stage(2, 0.5), Stage(4, tokens=6))), "not both", id="mixed"),
    pytest.param(lambda: Schedule.parse("8-0.5"), "'8-0.5' is not a stage", id="parse-nonsense"),
    pytest.param(lambda: Schedule.parse("8:0.5 16"), "'16' is not a stage", id="parse-half"),
    pytest.param(lambda: Schedule.parse("8:50%"), "is not a stage", id="parse-percent"),
    pytest.param(lambda: Schedule.parse("8:1.5"), "between 0 and 1", id="parse-share"),
    pytest.param(lambda: pyramid(32).check(24), "layers are numbered 0..23", id="after-the-last-layer"),
    pytest.param(lambda: single(32, 0.5, num_layers=32), "numbered 0..31", id="at-the-end"),
    pytest.param(lambda: pyramid(16, stages=40), "40 stages do not fit into 16 layers", id="too-many-stages"),
    pytest.param(lambda: pyramid(16, stages=0), "whole number from 1 on", id="no-stage"),
    pytest.param(lambda: pyramid(16, stages=2.5), "whole number from 1 on", id="half-a-stage"),  # type: ignore[arg-type]
    pytest.param(lambda: pyramid(32, ratio=1.2), "between 0 and 1", id="ratio-above-1"),
    pytest.param(lambda: pyramid(32, ratio=math.nan), "between 0 and 1", id="ratio-nan"),
    pytest.param(lambda: single(2, -0.5), "between 0 and 1", id="single-negative"),
    pytest.param(lambda: pyramid(32, layers=(8, 40)), "boundary at layer 40", id="explicit-layer-outside"),
    pytest.param(
        lambda: Schedule((Stage(2, tokens=5),)).mean_keep(32), "needs the number of visual tokens", id="mean-of-counts"
    ),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_refusals_say_what_is_wrong(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()
