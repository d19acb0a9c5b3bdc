"""Methods inside the decoder against what the official programs computed: tests/vectors/README.md has the cases.

Kept tokens, scores, logits of the prefill, five cached steps, cache lengths and the norms of the cached keys, which
carry the positions.

    pytest tests/methods/test_in_decoder.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pdrop import DART, FEATHER, VTW, FitPrune, Method, Schedule, Stage, V2Drop, attach, single
from pdrop.methods.fitprune_tables import FITPRUNE, fitprune
from pdrop.methods.pyramiddrop_schedules import pyramiddrop
from pdrop.runs.calibration import fitprune as fit
from pdrop.runs.calibration import withdrawal_layer
from tests.engine.test_vectors import CACHE, LOGITS, SCORES, read_model, single_row
from tests.support.official import IMAGE, check_cache, names, read

FIRST = {
    "dart": ["d01", "d11"],
    "v2drop": ["v03", "v09"],
    "vtw": ["w01"],
    "feather": ["g05", "g11"],
    "fitprune": ["f04"],
}


def cases(method: str) -> list[Any]:
    """All cases, of which those not in FIRST take longer."""
    return [
        pytest.param(name, id=name, marks=[] if name[:3] in FIRST[method] else [pytest.mark.exhaustive])
        for name in names("in_decoder", method)
    ]


@torch.no_grad()
def forward(case: dict[str, Any], method: Method, schedule: Schedule, ends: Tensor | None = None) -> Any:
    """The trace, once everything that the model computes has been found to be the official program's.

    Args:
        ends: Which visual tokens the official logits are of, where that code drops some after the last layer.
    """
    arrays, (model, batch) = case["arrays"], single_row(case, "sdpa")
    rows = model.model.get_image_features(None).pooler_output
    model.model.get_image_features = lambda pixel_values, **kwargs: BaseModelOutputWithPooling(
        last_hidden_state=rows[0][None], pooler_output=rows
    )
    with attach(model, method, schedule) as trace:
        prefill = model(**batch, past_key_values=DynamicCache(config=model.config))
        out = model.generate(
            **batch,
            max_new_tokens=case["decode_steps"] + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    left = batch["input_ids"][0] != IMAGE
    places = (~left).nonzero()[:, 0]
    left[places[trace.kept[-1][0] if ends is None else ends]] = True
    torch.testing.assert_close(prefill.logits[0, left], arrays["prefill_logits"], rtol=0, atol=LOGITS)
    assert out.sequences[0, -len(arrays["tokens"]) :].tolist() == arrays["tokens"].tolist()
    torch.testing.assert_close(torch.cat(out.logits[1:]), arrays["decode_logits"], rtol=0, atol=LOGITS)
    check_cache(out.past_key_values, arrays, CACHE)
    return trace


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=SCORES * float(want.max()))


@pytest.mark.parametrize("name", cases("dart"))
def test_dart(name: str) -> None:
    case = read("in_decoder", "dart", name)
    arrays, most = case["arrays"], case["max_num_trunction"]
    stage = Stage(case["K"], 1 - case["reduction_ratio"]) if most is None else Stage(case["K"], tokens=most)
    trace = forward(case, DART(), Schedule((stage,)))
    assert trace.kept[0][0].tolist() == arrays["kept"].tolist()
    assert len(trace.kept[0][0]) == case["kept_count"] == DART().count(stage, case["image_tokens"])
    pivots = (trace.scores[0][0] == 2).nonzero()[:, 0].tolist()
    assert pivots == sorted(arrays["image_pivots"].tolist())


@pytest.mark.parametrize("name", cases("v2drop"))
def test_v2drop(name: str) -> None:
    case = read("in_decoder", "v2drop", name)
    keep, stages = 1.0, []
    for layer, ratio in zip(case["layers"], case["ratios"]):  # of what is left
        keep *= ratio
        stages.append(Stage(layer, keep))
    trace = forward(case, V2Drop(), Schedule(tuple(stages)))
    for stage, count in enumerate(case["kept_counts"]):
        assert trace.kept[stage][0].tolist() == case["arrays"][f"stage{stage}_kept"].tolist()
        assert len(trace.kept[stage][0]) == count
        close(trace.scores[stage][0], case["arrays"][f"stage{stage}_scores"])


@pytest.mark.parametrize("name", cases("vtw"))
def test_vtw(name: str) -> None:
    case = read("in_decoder", "vtw", name)
    trace = forward(dict(case, image_tokens=case["image_tokens"][0]), VTW(), single(case["k"], 0.0))
    assert trace.visual_tokens[case["k"]] == [0]


@pytest.mark.parametrize("counts", [False, True], ids=["published-rule", "counts"])
@pytest.mark.parametrize("name", cases("feather"))
def test_feather(name: str, counts: bool) -> None:
    case = read("in_decoder", "feather", name)
    kind = case["predefined_mask"] or ""
    stride = int(kind.partition("=")[2] or 0)
    method = FEATHER(stride=stride, reduction=case["fastv_ratio"], rotated=not kind)
    numbers = zip(case["fastv_k"], case["kept_counts"])
    stages = [Stage(layer, tokens=n) if counts else Stage(layer, adaptive=True) for layer, n in numbers]
    trace = forward(case, method, Schedule(tuple(stages)))
    for stage in range(len(stages)):
        assert trace.kept[stage][0].tolist() == case["arrays"][f"stage{stage}_kept"].tolist()
        scores, want = trace.scores[stage][0], case["arrays"][f"stage{stage}_scores"]
        close(torch.where(scores >= 1, scores - 1, scores), want)


@pytest.mark.parametrize("name", cases("fitprune"))
def test_fitprune(name: str) -> None:
    case = read("in_decoder", "fitprune", name)
    arrays, left, stages, layers = case["arrays"], case["image_tokens"], [], len(case["delete_scheme"])
    for layer, gone in case["delete_scheme"].items():
        left -= gone
        if gone and int(layer) + 1 < layers:
            stages.append(Stage(int(layer) + 1, tokens=left))
    ends = arrays.get(f"layer{layers - 1}_kept")
    trace = forward(case, FitPrune(), Schedule(tuple(stages)), None if ends is None else ends.long())
    for number, stage in enumerate(stages):
        assert trace.kept[number][0].tolist() == arrays[f"layer{stage.layer - 1}_kept"].tolist()
        close(trace.scores[number][0], arrays[f"layer{stage.layer - 1}_scores"])
    if case["reduction_ratio"]:
        assert [*fitprune(32, reduction=case["reduction_ratio"])][: len(stages)] == stages


def test_fitprunes_tables_have_the_averages_that_their_names_stand_for() -> None:
    means = [round(sum(FitPrune().tokens_per_layer(fitprune(32, reduction=name), 576, 32)) / 32) for name in FITPRUNE]
    assert means == [541, 493, 424, 362, 302, 274, 245, 188, 131, 73]
    for name in FITPRUNE:
        shares = fitprune(32, 1 - name / 100)
        assert FitPrune().tokens_per_layer(shares, 576, 32) == FitPrune().tokens_per_layer(
            fitprune(32, reduction=name), 576, 32
        )
    between = [
        sum(FitPrune().tokens_per_layer(fitprune(32, ratio), 576, 32)) for ratio in (0.0, 0.15, 0.3, 0.35, 0.4, 1.0)
    ]
    assert between == sorted(between) and between[-1] == 576 * 32


def test_darts_number_is_its_own() -> None:
    """4 + 8 * (b // 8) of a budget b, and every table shows that."""
    for tokens, stay in ((192, 196), (128, 132), (64, 68), (320, 324), (7, 4)):
        assert DART().tokens_per_layer(Schedule((Stage(2, tokens=tokens),)), 576, 32)[2] == stay
    for keep, stay in ((1 - 0.667, 188), (1 - 0.778, 124), (1 - 0.889, 60)):
        assert DART().tokens_per_layer(single(2, keep), 576, 32)[2] == stay


# ---------------------------------------------------------------- what is found on samples


def samples_of(case: dict[str, Any]) -> tuple[Any, list[dict[str, Tensor]]]:
    """The model, and each sample as a batch: ids of the text are those whose embeddings it has."""
    count, start = case["image_tokens"], case["image_start"]
    rows = [case["arrays"][f"sample{number}_embeds"].float() for number in range(case["samples"])]
    model = read_model(case, rows[0][start : start + count])
    table = model.get_input_embeddings().weight
    batches, pictures = [], []
    for embedded in rows:
        ids = torch.cdist(embedded, table).argmin(1)
        ids[start : start + count] = IMAGE
        batches.append({"input_ids": ids[None], "pixel_values": torch.full((1, 3, 28, 28), float(len(pictures)))})
        pictures.append(embedded[start : start + count])

    def image_features(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[pictures[int(pixel_values.flatten()[0])]])

    model.model.get_image_features = image_features
    return model, batches


def test_fitprunes_table_is_fitted_as_its_authors_fit_it() -> None:
    case = read("in_decoder", "fitcal", "c01")
    model, batches = samples_of(case)
    found = fit(model, batches, case["reduction_ratio"])
    tried = case["arrays"]["tried"].tolist()
    assert [alpha for alpha, _, _ in found.tried] == [row[0] for row in tried]
    assert [float(fits) for _, fits, _ in found.tried] == [row[1] for row in tried]
    # what goes in the last layer is on its output, which no boundary names
    assert [table[:-1] for _, _, table in found.tried] == [[int(n) for n in row[2:-1]] for row in tried]
    assert found.gone == [38, 14, 7, 2, 0, 0, 0, 0], "the last table that keeps the FLOPs, not the last that was tried"
    assert FitPrune().tokens_per_layer(found.schedule(), 100, 8) == [100, 62, 48, 41, 39, 39, 39, 39]
    with pytest.raises(ValueError, match="no table saves 100%"):
        fit(model, batches[:1], 1.0)


def test_the_layer_of_vtw_is_searched_as_its_authors_search_it() -> None:
    case = read("in_decoder", "vtw", "w05")
    model, batch = single_row(dict(case, image_tokens=case["image_tokens"][0]), "sdpa")
    layer, divergences = withdrawal_layer(model, [batch], threshold=-1.0)
    assert layer is None and list(divergences) == [5, 6, 7]
    torch.testing.assert_close(
        torch.tensor([*divergences.values()]), case["arrays"]["findk_kl"].float(), rtol=1e-3, atol=1e-6
    )
    enough = max(divergences.values())
    assert withdrawal_layer(model, [batch], threshold=enough)[0] == 5


def test_pyramiddrops_named_budgets_are_what_they_say() -> None:
    for budget in (192, 128, 64):
        schedule = pyramiddrop(32, budget)
        assert schedule.layers == (2, 8, 16, 24) and pyramiddrop(40, budget).layers == (2, 10, 20, 30)
        assert schedule.mean_keep(32) * 576 == pytest.approx(budget, abs=0.2)
    with pytest.raises(ValueError, match="192, 128, 64"):
        pyramiddrop(32, 96)
