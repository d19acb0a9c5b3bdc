"""Methods in front of the decoder against what the official programs computed: tests/vectors/README.md has the cases.

What enters the first layer is compared as a whole: it fixes which tokens stay, their order, what is made, and where it
stands.

    pytest tests/test_in_front.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import GREEDY, RAGGED, batch_of
from families import build
from official import in_front, names, read
from prompts import collate, sample

from pdrop import DivPrune, FasterVLM, FastV, Method, Schedule, Stage, VisionZip, attach
from pdrop.conformance.families import READ_TOWERS
from pdrop.methods.base import View

SCORES, STATES = 1e-5, 2e-4


def cases(method: str) -> list[Any]:
    """The cases of a method whose picture goes through a tower."""
    return [
        name for name in names("before_decoder", method) if read("before_decoder", method, name)["kind"] != "features"
    ]


def entering(case: dict[str, Any], method: Method, tokens: int | None = None, tokenizer: Any = None) -> Any:
    """The trace, once what enters the first layer has been found to be the official sequence."""
    stage = Stage(0, case["ratio"]) if tokens is None else Stage(0, tokens=tokens)
    trace, got = in_front(case, method, Schedule((stage,)), tokenizer)
    torch.testing.assert_close(got, case["arrays"]["final_embeds"], rtol=0, atol=STATES)
    return trace


@pytest.mark.parametrize("name", cases("divprune"))
def test_divprune(name: str) -> None:
    case = read("before_decoder", "divprune", name)
    trace = entering(case, DivPrune())
    assert trace.kept[0][0].tolist() == case["arrays"]["kept"].tolist()
    turns = trace.scores[0][0].argsort(descending=True, stable=True)[: case["keep"]]
    assert turns.tolist() == case["arrays"]["selected"].tolist(), "the order in which they are chosen"


@pytest.mark.parametrize("name", cases("fastervlm"))
def test_fastervlm(name: str) -> None:
    case = read("before_decoder", "fastervlm", name)
    tiles, patches = len(case["pictures"]), case["side"] ** 2
    trace = entering(case, FasterVLM(), tokens=case["keep"] * tiles)
    first = trace.scores[0][0][:patches] % 1  # the best of several tiles have 1 more
    torch.testing.assert_close(first, case["arrays"]["scores"][0], rtol=0, atol=SCORES)
    kept = [n for n in trace.kept[0][0].tolist() if n < patches]
    assert kept == sorted(case["arrays"]["selected"][0].tolist())


@pytest.mark.parametrize("name", cases("visionzip"))
def test_visionzip(name: str) -> None:
    case = read("before_decoder", "visionzip", name)
    arrays, tiles = case["arrays"], len(case["pictures"])
    method = VisionZip(contextual=case["contextual"] * tiles)
    trace = entering(case, method, tokens=(case["dominant"] + case["contextual"]) * tiles)
    dominant = case["dominant"] - 1
    assert trace.kept[0][0].tolist()[:dominant] == arrays["dominant"][0].tolist()
    made = trace.merged[0][0]
    assert not made[0].sources, "the class token is made of no patch"
    assert [token.centre for token in made[1 : 1 + case["contextual"]]] == arrays["target"][0].tolist()
    joined = {source: token.centre for token in made[1:] for source in token.sources if source != token.centre}
    merged = arrays["merged_sources"][0].tolist()
    targets = arrays["target"][0][arrays["assigned"][0]].tolist()
    assert {source: joined[source] for source in merged} == dict(zip(merged, targets))


# ---------------------------------------------------------------- what all of them share

METHODS = [FasterVLM(), VisionZip(contextual=2)]


@dataclass(frozen=True)
class Curious(FastV):
    """Looks at the tower without saying so."""

    def score(self, view: View) -> torch.Tensor:
        """Never gets there."""
        return view.tower.rows(-2)


@torch.no_grad()
def test_the_tower_is_left_alone_by_methods_that_do_not_look() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    before = [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.vision_tower.modules()
    ]
    with attach(model, FastV(), Schedule((Stage(2, 0.5),))):
        hooked = [
            len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.model.vision_tower.modules()
        ]
    assert hooked == before
    with attach(model, Curious(), Schedule((Stage(2, 0.5),))), pytest.raises(ValueError, match="set tower_layers"):
        model(**batch)


@torch.no_grad()
@pytest.mark.parametrize("family", READ_TOWERS)
def test_generate_sees_the_tower_that_a_forward_sees(family: str) -> None:
    """Tiles of all shapes, cut and whole: `generate` has features alone to tell them by; beams share a picture."""
    model = build(family)
    samples = [sample(family, model, texts, seed) for seed, texts in enumerate([(3, 5), (2, 4, 6), (6, 2), (1, 3)])]
    batch = collate(family, samples)
    for method in METHODS:
        with attach(model, method, Schedule((Stage(0, 0.4),))) as trace:
            model(**batch)
            order = [row.tolist() for row in trace.order[0]]
            model.generate(**batch, **GREEDY)
            assert [row.tolist() for row in trace.order[0]] == order
            model.generate(**batch, **(GREEDY | {"num_beams": 2}))
            assert [row.tolist() for row in trace.order[0]] == [row for row in order for _ in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_tile_has_its_share(method: Method) -> None:
    model = build("llava_next")
    one = sample("llava_next", model, (3, 5), 3)
    assert one["image_sizes"].tolist() == [[50, 40]]
    tiles = one["pixel_values"].shape[1]
    for tokens in (tiles * 4, tiles * 4 + 3):
        with attach(model, method, Schedule((Stage(0, tokens=tokens),))) as trace:
            model(**collate("llava_next", [one]))
        assert trace.visual_tokens[0] == [tiles * 4]
        small = [n for n in trace.kept[0][0].tolist() if n < 16]
        assert len(small) == (4 if isinstance(method, FasterVLM) else 3), "a class token takes one of them"


def test_a_tower_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="FasterVLM reads the vision tower, and that of Qwen2VL"):
        attach(build("qwen2_vl"), FasterVLM(positions="original"), Schedule((Stage(0, 0.5),)))
    deep = type("Deep", (FasterVLM,), {"tower_layers": (5,)})()
    with pytest.raises(ValueError, match="has 2 layers"):
        attach(build("llava"), deep, Schedule((Stage(0, 0.5),)))


@torch.no_grad()
def test_budgets_at_the_edges() -> None:
    """Nothing, one token, a number above what there is: the official codes raise for some of these."""
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    for method in (DivPrune(), *METHODS):
        for tokens, left in ((0, [0, 0, 0, 0]), (2, [2, 2, 0, 2]), (90, [16, 32, 0, 16])):
            with attach(model, method, Schedule((Stage(0, tokens=tokens),))) as trace:
                model(**batch)
            assert trace.visual_tokens[0] == left, (method, tokens)
