"""The engine against the masked float64 oracle, on cases that hypothesis draws.

Family x backend x batch of 1-4 x padding side x 0-2 images per row x schedule x method x position policy x where the
labels are. Kept tokens, scores, token counts and the logits of every remaining token must agree.

    pytest tests/engine/test_oracle.py -k qwen
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CORE, FAMILIES, LAYERS, MROPE_FAMILIES, build
from pdrop.conformance.prompts import collate, sample
from tests.support.cases import FLOAT, GREEDY, STEPS, TOLERANCE, kept_of, prolong, rule_of

METHODS: dict[str, Any] = {
    "PyramidDrop": PyramidDrop,
    "FastV": partial(FastV, several=True),
    "RandomDrop": RandomDrop,
}
MORE = [family for family in FAMILIES if family not in CORE]
DRAWN = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)
MARGIN = {"sdpa": 1e-5, "eager": 1e-3}  # closer scores count as equal
ANSWERS = {  # label spans of a row, counted in its real tokens, and the least text they need (first, last)
    "none": ([], (0, 0)),
    "end": ([(-2, 0)], (0, 2)),
    "twice": ([(-4, -3), (-2, 0)], (0, 4)),
    "early": ([(2, 3), (-2, 0)], (2, 2)),
    "only early": ([(2, 3)], (2, 0)),  # no visual token is visible to the query: all scores tie
}


@dataclass(frozen=True)
class Case:
    """One drawn batch. `rows` are the text lengths of `prompts.sample`; `answers` None means no labels."""

    rows: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...] | None
    side: str
    schedule: Schedule
    method: str
    positions: str
    video: bool = False


@st.composite
def cases(draw: st.DrawFn, family: str, video: bool = False, labels: bool = True) -> Case:
    rows = draw(st.integers(1, 4))
    labelled = labels and draw(st.booleans())
    answers = tuple(draw(st.sampled_from(list(ANSWERS))) for _ in range(rows)) if labelled else None
    texts = []
    for row in range(rows):
        first, last = ANSWERS[answers[row]][1] if answers else (0, 0)
        images = draw(st.sampled_from([1, 2, 0]))
        lengths = [draw(st.integers(0 if images else 1, 6)) for _ in range(images + 1)]
        lengths[0], lengths[-1] = max(lengths[0], first), max(lengths[-1], last)
        if not images:
            lengths[0] = max(lengths[0], first + last)
        texts.append(tuple(lengths))
    if video:
        texts[0] = texts[0] if len(texts[0]) > 1 else (texts[0][0], max(1, texts[0][0]))
    layers = sorted(draw(st.sets(st.integers(1, LAYERS - 1), min_size=1, max_size=3)))
    share = st.sampled_from([0.0, 0.125, 0.25, 0.29, 0.5, 0.58, 0.75, 1.0])
    keeps = sorted((draw(share) for _ in layers), reverse=True)
    policies = ["original"] if family in MROPE_FAMILIES else ["compact", "original"]
    return Case(
        rows=tuple(texts),
        answers=answers,
        side=draw(st.sampled_from(["left", "right"])),
        schedule=Schedule(tuple(map(Stage, layers, keeps))),
        method=draw(st.sampled_from(list(METHODS))),
        positions=draw(st.sampled_from(policies)),
        video=video,
    )


def make_batch(family: str, model: Any, case: Case) -> dict[str, torch.Tensor]:
    samples = [
        sample(family, model, texts, seed, video=case.video and seed == 0 and len(texts) > 1)
        for seed, texts in enumerate(case.rows)
    ]
    return collate(family, samples, case.side)


@torch.no_grad()
def check(family: str, backend: str, case: Case) -> None:
    """Run engine and oracle on a case and compare everything that both say."""
    model = build(family, backend, FLOAT[backend])
    reference = build(family, "sdpa", torch.float64)
    batch = make_batch(family, model, case)
    truth_batch = make_batch(family, reference, case)
    spans = [ANSWERS[answer][0] for answer in case.answers] if case.answers else None
    labels = oracle.answers_only(batch, spans) if spans else None
    method = METHODS[case.method](positions=case.positions)
    with attach(model, method, case.schedule) as trace:
        got = model(**batch, labels=labels).logits
    boundaries = {stage.layer: float(stage.keep or 0) for stage in case.schedule}
    rule = rule_of(method)
    kept = None if rule else kept_of(trace)
    truth = oracle.forward(reference, truth_batch, rule, boundaries, case.positions, labels, kept=kept)
    assume(truth.margin > MARGIN[backend])

    assert trace.prefills == 1
    assert trace.visual == truth.visual
    assert kept_of(trace) == truth.kept
    assert trace.tokens == truth.tokens
    for stage, boundary in enumerate(case.schedule):
        for row, scores in enumerate(trace.scores[stage]):
            assert scores.dtype == torch.float32
            if rule and truth.scores[stage][row]:
                want = torch.tensor(truth.scores[stage][row])
                torch.testing.assert_close(scores, want, rtol=0, atol=TOLERANCE[backend] / 10)
            if rule is None:
                check_random(boundary, trace.visual[row], truth, row, stage, labels)
    for row, alive in enumerate(truth.alive):
        torch.testing.assert_close(
            got[row, alive].double(), truth.logits[row, alive].double(), rtol=0, atol=TOLERANCE[backend]
        )
        real = batch["attention_mask"][row].nonzero()[:, 0].tolist()
        gone = [p for p in real if p not in alive]
        assert not got[row, gone].any(), "dropped places must come back as zeros"


def check_random(boundary: Stage, visual: int, truth: Any, row: int, stage: int, labels: Any) -> None:
    """Random keeps int(n * keep), only from those that were left; rows without an answer keep everything."""
    kept = truth.kept[stage][row]
    before = truth.kept[stage - 1][row] if stage else range(visual)
    assert kept == sorted(set(kept) & set(before))
    if labels is not None and not (labels[row] != -100).any():
        assert len(kept) == visual
    else:
        least = int(visual * (boundary.keep or 0))
        assert least <= len(kept) <= max(least, 2), "more than int(n * keep) only to spare a visual query token"


def draw_and_check(family: str, backend: str, examples: int, video: bool = False) -> None:
    """The same cases in every run, other ones for each family and backend."""

    @seed(zlib.crc32(f"{family} {backend} {video}".encode()))
    @settings(DRAWN, max_examples=examples)
    @given(cases(family, video))
    def drawn(case: Case) -> None:
        check(family, backend, case)

    drawn()


@pytest.mark.product(3)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CORE)
def test_engine_equals_oracle(family: str, backend: str) -> None:
    draw_and_check(family, backend, examples=30)


@torch.no_grad()
def check_decoding(family: str, case: Case) -> None:
    """Generate from a drawn case; every step's logits must be those of a recompute with the query pinned."""
    model = build(family)
    batch = make_batch(family, model, replace(case, side="left"))
    rows, length = batch["input_ids"].shape
    method = METHODS[case.method](positions=case.positions)
    with attach(model, method, case.schedule) as trace:
        out = model.generate(**batch, **GREEDY)
    boundaries = {stage.layer: float(stage.keep or 0) for stage in case.schedule}
    rule, kept = rule_of(method), kept_of(trace)
    everything, pinned = prolong(batch, out.sequences[:, :-1]), [[length - 1]] * rows
    truth = oracle.forward(
        model, everything, rule, boundaries, case.positions, queries=pinned, kept=None if rule else kept
    )
    assume(truth.margin > MARGIN["sdpa"])
    assert kept == truth.kept
    for step, logits in enumerate(out.logits):
        want = truth.logits[:, length - 1 + step]
        torch.testing.assert_close(logits.double(), want, rtol=0, atol=TOLERANCE["sdpa"])
    cached = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert [entered - cached[0] for entered in cached] == [
        min(max(layer) - length - STEPS + 1, 0) if number >= case.schedule.layers[0] else 0
        for number, layer in enumerate(truth.tokens)
    ]


@pytest.mark.product(2)
@pytest.mark.parametrize("family", CORE)
def test_decoding_equals_oracle(family: str) -> None:
    @seed(zlib.crc32(family.encode()))
    @settings(DRAWN, max_examples=12)
    @given(cases(family, labels=False))
    def drawn(case: Case) -> None:
        check_decoding(family, case)

    drawn()


@pytest.mark.parametrize("family", MORE)
def test_engine_equals_oracle_on_more_families(family: str) -> None:
    draw_and_check(family, "sdpa", examples=15)


@pytest.mark.product(2)
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava"])
def test_engine_equals_oracle_on_videos(family: str) -> None:
    draw_and_check(family, "sdpa", examples=8, video=True)
