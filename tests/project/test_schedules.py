"""docs/schedules.md: every row of its three tables is what the code computes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from pdrop.cli.compose import choose, settings
from pdrop.cost.budget import solve
from pdrop.cost.flops import prefill_flops, selection_flops
from pdrop.methods.base import Method
from pdrop.runs.settings import Settings
from pdrop.schedule import Schedule, Stage, pyramid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"
FOUND = "found"  # prompt by prompt
BUDGETS = (192, 128, 64)


def rows(section: str, number: int = 0) -> Iterator[list[str]]:
    """The cells of a table under a heading, without its head."""
    part = PAGE.read_text().split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    tables = re.findall(r"(?:^\|.*\n)+", part, re.M)
    for line in tables[number].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("| ").split(" | ")]


PUBLIC = list(rows("PyramidDrop in public code"))
KNOBS = list(rows("Which setting gives which budget"))
SOLVED = list(rows("Which setting gives which budget", 1))


@pytest.mark.parametrize("row", PUBLIC, ids=lambda row: row[0][:40])
def test_public_schedules_have_the_mean_that_is_printed(row: list[str]) -> None:
    _, layers, boundaries, kept, mean = row
    at, shares = [int(layer) for layer in boundaries.split("/")], kept.split()
    if len(shares) == 1:
        schedule = pyramid(int(layers), ratio=float(kept), layers=at)
    elif kept.endswith("t"):
        schedule = Schedule(tuple(Stage(layer, tokens=int(n[:-1])) for layer, n in zip(at, shares, strict=True)))
    else:
        schedule = Schedule(tuple(Stage(layer, keep=float(n)) for layer, n in zip(at, shares, strict=True)))
    assert f"{fmean(schedule.tokens_per_layer(576, int(layers))):.1f}" == mean


@functools.cache
def model() -> Settings:
    """LLaVA-1.5-7B, without weights."""
    return settings({"model": "llava_1_5_7b", "method": "none", "tasks": [], "device": "cpu"})


def of(words: str) -> tuple[Method, Schedule]:
    """What a command line says: method=dart ratio=0.3."""
    dials = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in words.split())}
    method, schedule = choose(dials.pop("method"), dials)
    assert method is not None
    return method, schedule(model().source.layers)


def mean_of(method: Method, schedule: Schedule) -> float:
    return fmean(model().prompt.under(method, schedule, model().source.layers).visual_per_layer)


def ranking_of(method: Method, schedule: Schedule) -> float:
    """What choosing costs, of the undropped prefill."""
    sizes, whole = model().source.sizes, model().prompt
    assert sizes is not None
    prompt = whole.under(method, schedule, sizes.layers)
    spent = selection_flops(sizes, prompt, method.selection(schedule, prompt, sizes))
    return spent / prefill_flops(sizes, whole.undropped(sizes.layers))["total"]


def percent(share: float) -> str:
    return "0" if not share else f"{100 * share:.2f} %" if share < 0.00995 else f"{100 * share:.1f} %"


@pytest.mark.parametrize("row", KNOBS, ids=lambda row: row[1].strip("`"))
def test_published_settings_have_the_mean_and_the_cost_that_are_printed(row: list[str]) -> None:
    method, schedule = of(row[1].strip("`"))
    if row[2] == FOUND:
        assert any(stage.adaptive for stage in schedule)
        return
    shown = [f"{mean_of(method, schedule):.1f}".removesuffix(".0"), percent(ranking_of(method, schedule))]
    assert shown == row[2:]


@pytest.mark.parametrize("row", SOLVED, ids=lambda row: row[0].split("`")[1])
def test_budgets_have_the_knob_that_is_printed(row: list[str]) -> None:
    methods = re.findall(r"`(\w+)`", row[0])
    assert methods
    for method in methods:
        assert [solved(method, tokens) for tokens in BUDGETS] == row[1:], method


def solved(name: str, tokens: int) -> str:
    """The first boundary's share and the mean under budget=avg_tokens:N; or that there is none."""
    method, _ = choose(name, {})
    layers, visual = model().source.layers, round(model().prompt.visual)
    assert method is not None
    if name == "feather" and tokens < 144:
        with pytest.raises(ValueError, match="8/16 cannot go below 144 of 576"):
            solve(method, f"avg_tokens:{tokens}", layers, visual)
        return "refused"
    schedule = solve(method, f"avg_tokens:{tokens}", layers, visual)
    first = schedule.stages[0]
    where = f" at {first.layer}" if name == "vtw" else ""
    return f"{first.keep or 0:.6g}{where} ({mean_of(method, schedule):.1f})"


def test_every_method_with_a_knob_is_on_the_page() -> None:
    from pdrop.cli.compose import choices

    said = " ".join(cell for table in (KNOBS, SOLVED) for row in table for cell in row)
    # controls without a number; a rank, prompt by prompt; what needs a folder to be made
    fixed = {"none", "no_image", "downsample", "sparsevlm_v1", "cdpruner"}
    assert [name for name in choices("method") if name not in fixed and not re.search(rf"\b{name}\b", said)] == []
