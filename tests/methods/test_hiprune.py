"""HiPrune against what its official programs computed: tests/vectors/README.md has the cases.

pytest tests/methods/test_hiprune.py
"""

from __future__ import annotations

import pytest
import torch

from pdrop import HiPrune, Schedule, Stage, attach
from pdrop.conformance.families import build
from pdrop.conformance.prompts import collate, sample
from pdrop.methods.hiprune import beside
from pdrop.methods.tower import layer_number
from tests.methods.test_merging_towers import inputs_of, qwen
from tests.support.cases import RAGGED, batch_of, prefill_flops_of_grids
from tests.support.official import in_front, names, read

SCORES, STATES = 1e-5, 2e-4
HALF = Schedule((Stage(0, keep=0.5),))


@pytest.mark.parametrize("name", names("before_decoder", "hiprune"))
def test_hiprune(name: str) -> None:
    """Kept tokens of every tile, both attentions, and what enters the first layer."""
    case = read("before_decoder", "hiprune", name)
    arrays, tiles, patches = case["arrays"], len(case["pictures"]), case["side"] ** 2
    method = HiPrune(alpha=case["alpha"], object_layer=None if case["object_layer"] == 9 else case["object_layer"])
    trace, got = in_front(case, method, Schedule((Stage(0, tokens=case["keep"] * tiles),)))
    torch.testing.assert_close(got, arrays["final_embeds"], rtol=0, atol=STATES)
    kept = trace.kept[0][0]
    small = kept[kept < patches]
    assert small.tolist() == arrays["mask"][0].nonzero()[:, 0].tolist() and len(kept) == case["keep"] * tiles
    scores = trace.scores[0][0][:patches]
    marked = scores % 2 >= 1  # anchors and buffers: 1 + attention in the object layer; what stays has 2 more
    torch.testing.assert_close(scores[~marked] % 2, arrays["scores"][0][~marked], rtol=0, atol=SCORES)
    torch.testing.assert_close(scores[marked] % 2 - 1, arrays["object"][0][marked], rtol=0, atol=SCORES)
    anchors = arrays["object"][0].topk(round(case["keep"] * case["alpha"] / 5)).indices
    assert set(marked.nonzero()[:, 0].tolist()) == set(beside(anchors, case["side"], patches).tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", names("before_decoder", "hiprune_qwen2_5_vl"))
def test_hiprune_for_qwen2_5_vl(name: str) -> None:
    """As released, tokens that it counts twice are missing; where it is given means of attention, all are the same."""
    case = read("before_decoder", "hiprune_qwen2_5_vl", name)
    arrays, model = case["arrays"], qwen()
    method = HiPrune(alpha=case["alpha"], positions="original")
    entered: list[torch.Tensor] = []
    norm = model.get_decoder().layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    try:
        with attach(model, method, Schedule((Stage(0, keep=case["ratio"]),))) as trace:
            logits = model(**inputs_of(read("before_decoder", "qwen2_5_vl", case["inputs"]))).logits
    finally:
        handle.remove()
    assert trace.visual_tokens[0] == [case["wanted"]]
    if case["left"] < case["wanted"]:
        apart = torch.cdist(arrays["final_embeds"][0].double(), entered[-1][0].double())
        assert case["as_released"] and float(apart.amin(1).max()) < 0.01, "theirs are among ours"
        assert int((apart.amin(0) > 0.01).sum()) == case["wanted"] - case["left"]
        return
    torch.testing.assert_close(entered[-1], arrays["final_embeds"], rtol=0, atol=STATES)
    there = logits[0].abs().sum(-1) > 0
    torch.testing.assert_close(logits[0, there], arrays["logits"][0], rtol=0, atol=5e-4)


def test_the_layers_are_the_authors_by_depth() -> None:
    """9 of CLIP's 24, 16 of Qwen2.5-VL's 32; on other towers the same share of the depth."""
    (objects, late), (merged, last) = HiPrune.tower_layers, HiPrune.merged_tower_layers
    assert [layer_number(n, 24) for n in (objects, late)] == [8, 22]
    assert [layer_number(n, 32) for n in (merged, last)] == [15, 31]
    assert [layer_number(0.375, depth) for depth in (1, 2, 5, 26)] == [0, 0, 1, 9]
    assert HiPrune(object_layer=5).looks_at() == (4, -2) and HiPrune(object_layer=5).looks_at_merged() == (4, -1)


def test_neighbours_go_on_at_the_end_of_a_row_and_stop_at_the_ends() -> None:
    found = beside(torch.tensor([0, 3, 15]), 4, 16).view(5, 3).T.tolist()
    assert found == [[0, 0, 1, 0, 4], [3, 2, 4, 0, 7], [15, 14, 15, 11, 15]]


@torch.no_grad()
def test_anchors_and_buffers_beyond_the_number() -> None:
    """The official code raises; here those with the most attention in the object layer stay, anchors first."""
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    for tokens, left in ((0, [0, 0, 0, 0]), (3, [3, 2, 0, 3]), (90, [16, 32, 0, 16])):
        with attach(model, HiPrune(alpha=1.0), Schedule((Stage(0, tokens=tokens),))) as trace:
            model(**batch)
        assert trace.visual_tokens[0] == left


@torch.no_grad()
@pytest.mark.product(2)
@pytest.mark.parametrize("layer", [1, 2])
def test_flops_of_a_layer_with_windows_and_of_one_without(layer: int) -> None:
    """In closed form as counted; of several pictures of different sizes."""
    family = "qwen2_5_vl"
    model, method = build(family, dtype=torch.float32), HiPrune(object_layer=layer, positions="original")
    one = collate(family, [sample(family, model, (3, 5, 6), 1)])
    counted, closed, _ = prefill_flops_of_grids(model, one, method, HALF)
    assert counted == pytest.approx(closed, rel=1e-6)


def test_what_cannot_be_is_refused_in_a_line() -> None:
    for wrong in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="object_layer is a layer of the vision tower, counted from 1"):
            HiPrune(object_layer=wrong)
    with pytest.raises(ValueError, match=r"has 2 layers, and layers \[8\] are asked for"):
        attach(build("llava"), HiPrune(object_layer=9), HALF)
