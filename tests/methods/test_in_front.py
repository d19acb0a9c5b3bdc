"""Methods before the decoder against what the official programs computed: tests/vectors/README.md has the cases.

What enters the first layer is compared as a whole: it fixes which tokens stay, their order, what is made, and where it
stands.

    pytest tests/methods/test_in_front.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pdrop import (
    SCOPE,
    CDPruner,
    CDPrunerEmbeddings,
    DivPrune,
    FasterVLM,
    FastV,
    HiPrune,
    HiRED,
    HoloV,
    Method,
    PruMerge,
    Schedule,
    Stage,
    VisionZip,
    VisPruner,
    attach,
)
from pdrop.conformance.families import READ_TOWERS, build
from pdrop.conformance.prompts import collate, sample
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.methods.base import View
from pdrop.methods.cdpruner import likeliest, scaled
from pdrop.methods.divprune import diverse
from pdrop.methods.holov import ZERO, arranged
from pdrop.methods.scope import covering
from pdrop.methods.tower import Tile
from pdrop.methods.vispruner import thinned
from pdrop.shapes import ModelSizes, PromptSize
from tests.support.cases import RAGGED, batch_of, check_generate
from tests.support.official import Says, clip_folder, in_front, inputs_of, names, read

SCORES, STATES = 1e-5, 2e-4


def cases(method: str) -> list[Any]:
    """The cases of a method whose picture goes through a tower."""
    return [
        name for name in names("before_decoder", method) if read("before_decoder", method, name)["kind"] != "features"
    ]


def features(method: str) -> list[str]:
    """The cases of a method's choosing alone."""
    return [name for name in names("before_decoder", method) if name not in cases(method)]


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


@pytest.mark.parametrize("name", features("divprune"))
def test_divprune_of_given_features(name: str) -> None:
    """In the order of choice; wanting more than there are, the official code takes the same token again and again."""
    arrays = read("before_decoder", "divprune", name)["arrays"]
    count = min(len(arrays["selected"]), len(arrays["features"]))
    assert diverse(arrays["features"], count).tolist() == arrays["selected"].tolist()[:count]


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

METHODS = [
    FasterVLM(),
    VisionZip(contextual=2),
    VisPruner(),
    HoloV(crops=4),
    SCOPE(),
    HiRED(),
    PruMerge(),
    CDPrunerEmbeddings(),
    HiPrune(alpha=0.6),
]


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
        if isinstance(method, PruMerge) and family == "llava_onevision":
            continue  # its tower has no class token
        check_generate(model, batch, method)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [FasterVLM(), VisionZip(contextual=2), VisPruner(), SCOPE()], ids=lambda method: type(method).__name__
)
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
        assert len(small) == (3 if isinstance(method, VisionZip) else 4), "a class token takes one of them"


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


# ---------------------------------------------------------------- strips, coverage, look-alikes, tiles


@pytest.mark.parametrize("name", cases("holov"))
def test_holov(name: str) -> None:
    case = read("before_decoder", "holov", name)
    chosen = case["arrays"]["selected"][0].tolist()
    trace = entering(case, HoloV(crops=case["crops"]), tokens=case["keep"])
    assert [list(token.sources) for token in trace.merged[0][0]] == [[n] if n >= 0 else [] for n in named(case, chosen)]
    assert trace.kept[0][0].tolist() == sorted(n for n in named(case, chosen) if n >= 0), "moved tokens are kept ones"


def named(case: dict[str, Any], chosen: list[int]) -> list[int]:
    """Numbers that leave newlines out, as numbers of visual tokens: rows of the joined picture end in one."""
    if case["kind"] != "anyres":
        return chosen
    patches, width = case["side"] ** 2, case["grid"][0] * case["side"]
    return [n if n < patches else n + (n - patches) // width for n in chosen]


@pytest.mark.parametrize("name", features("holov"))
def test_holov_of_given_attention(name: str) -> None:
    case = read("before_decoder", "holov", name)
    for attention, chosen in zip(case["arrays"]["attention"], case["arrays"]["selected"].tolist()):
        crops, count = case["crops"], case["keep"]
        assert arranged(attention, crops, count, "zeros") == chosen
        handed_on = arranged(attention, crops, count, "redistribute")
        assert len(set(handed_on)) == count and ZERO not in handed_on, "nothing is lost, nothing twice"
        assert set(chosen) - {ZERO} <= set(handed_on)


@torch.no_grad()
def test_holov_s_surplus_is_zeros_or_handed_on() -> None:
    attention = torch.full((40,), 1e-3)
    attention[10:20] = 1.0
    zeros, handed_on = (arranged(attention, 4, 24, overflow) for overflow in ("zeros", "redistribute"))
    assert zeros.count(ZERO) == 14 and zeros[:10] == list(range(10, 20))
    assert sorted(handed_on)[:1] == [0] and handed_on.count(ZERO) == 0 and len(set(handed_on)) == 24


@pytest.mark.parametrize("name", cases("scope"))
def test_scope(name: str) -> None:
    entering(read("before_decoder", "scope", name), SCOPE(), tokens=read("before_decoder", "scope", name)["keep"])


@pytest.mark.parametrize("name", features("scope"))
def test_scope_of_given_features(name: str) -> None:
    case = read("before_decoder", "scope", name)
    arrays = case["arrays"]
    for features, scores, chosen in zip(arrays["features"], arrays["scores"], arrays["selected"]):
        turns = covering(features, scores, case["keep"], case["alpha"], case["combined"])
        assert turns.tolist() == chosen.tolist()


@pytest.mark.parametrize("name", [name for name in cases("vispruner") if not name.startswith("v03")])
def test_vispruner(name: str) -> None:
    case = read("before_decoder", "vispruner", name)
    trace = entering(case, VisPruner(ratio=case["important_ratio"]), tokens=case["keep"] * len(case["pictures"]))
    patches = case["side"] ** 2
    arrays = case["arrays"]
    chosen = arrays["mask"][0].nonzero()[:, 0] if "mask" in arrays else arrays["selected"][0].sort().values
    assert [n for n in trace.kept[0][0].tolist() if n < patches] == chosen.tolist()


def test_vispruner_round_by_round() -> None:
    """At 576 tokens rounding decides which tokens meet rounds later: each round is held on its own."""
    arrays = read("before_decoder", "vispruner", "v03")["arrays"]
    states, rounds = arrays["features"][0], arrays["left_after_round"][:, 0].long()
    ranked = arrays["scores"][0].argsort(descending=True, stable=True)
    important = len(arrays["important"][0])
    assert ranked[:important].tolist() == arrays["important"][0].tolist()
    before, held = ranked[important:], 0
    for left in rounds:
        after = left[left >= 0]
        found = before[thinned(states[before], len(after))]
        assert set(found.tolist()) == set(after.tolist())
        held += found.tolist() == after.tolist()
        before = after
    assert held >= len(rounds) - 1, "in one round two neighbours are equally alike, to 3e-8"


@pytest.mark.parametrize("name", [name for name in cases("hired") if name[:3] not in ("h06", "h12")])
def test_hired(name: str) -> None:
    case = read("before_decoder", "hired", name)
    arrays = case["arrays"]
    total = case.get("total") or int(case["side"] ** 2 * case["rate"])
    trace, got = in_front(case, HiRED(), Schedule((Stage(0, tokens=total),)))
    want = arrays["final_visual"].flatten(0, -2)
    torch.testing.assert_close(got[2:-2], want, rtol=0, atol=STATES)
    small = int(arrays["mask"].view(-1, case["side"] ** 2)[0].sum())
    assert sum(n < case["side"] ** 2 for n in trace.kept[0][0].tolist()) == small


def test_hired_loses_nothing_in_padding_that_was_cut() -> None:
    """The official code chooses first and keeps 59 of 96 here; budgets of the tiles are its own."""
    case = read("before_decoder", "hired", "h06")
    trace, _ = in_front(case, HiRED(), Schedule((Stage(0, tokens=case["total"]),)))
    small, tiles = case["total"] // 2, case["arrays"]["budgets"].tolist()
    assert len(trace.kept[0][0]) == small + sum(tiles)


def test_hired_has_tiles_beside_each_other_where_they_are() -> None:
    """The official code chooses the same tokens, then puts the tiles below each other and loses most of them."""
    case = read("before_decoder", "hired", "h12")
    trace, _ = in_front(case, HiRED(), Schedule((Stage(0, tokens=case["total"]),)))
    side, kept = case["side"], trace.kept[0][0].tolist()
    found = torch.zeros_like(case["arrays"]["mask"])
    for n in kept:
        row, column = divmod(n - side**2, 2 * side + 1)  # of the joined picture, whose rows end in a newline
        if n < side**2:
            found[0, n] = True
        else:
            found[1 + column // side, row * side + column % side] = True
    assert torch.equal(found, case["arrays"]["mask"])


def test_hired_s_quadrants() -> None:
    best, picture = (
        torch.arange(16.0),
        [Tile(0, ()), *(Tile(n + 1, (place, place + 9)) for n, place in enumerate([0, 4, 50, 54]))],
    )
    flat, quadrants = (HiRED(shares=shares).parts_of(best, None, picture) for shares in ("flat", "quadrants"))  # type: ignore[arg-type]
    assert flat[0].tolist() == [0, 1, 2, 3]
    assert quadrants[0].tolist() == [0, 1, 4, 5] and quadrants[3].tolist() == [10, 11, 14, 15]


# ---------------------------------------------------------------- the question, and tokens that are made


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Folders with the vectors' CLIP, by the patches of a side."""
    return {side: str(clip_folder(tmp_path_factory.mktemp(f"clip{side}"), side)) for side in (8, 24)}


@pytest.mark.parametrize("name", cases("cdpruner"))
def test_cdpruner(name: str, clips: dict[int, str]) -> None:
    case = read("before_decoder", "cdpruner", name)
    ids, tiles, patches = case["arrays"]["text_ids"].tolist(), len(case["pictures"]), case["side"] ** 2
    words = " ".join(f"w{n}" for n in ids[1:-1])
    question = f"{words} Answer the question using a single word or phrase. ASSISTANT:"
    trace = entering(case, CDPruner(clip=clips[case["side"]]), case["keep"] * tiles, Says(question))
    kept = [n for n in trace.kept[0][0].tolist() if n < patches]
    assert kept == case["arrays"]["kept"][0].tolist()
    turns = trace.scores[0][0][:patches].argsort(descending=True, stable=True)[: len(kept)]
    assert turns.tolist() == case["arrays"]["selected"][0].tolist(), "the order in which they are chosen"


@pytest.mark.parametrize("name", features("cdpruner"))
def test_cdpruner_of_given_features(name: str) -> None:
    """Relevance over all pictures of a call; wanting more than there are keeps all."""
    case = read("before_decoder", "cdpruner", name)
    arrays = case["arrays"]
    image, text = (torch.nn.functional.normalize(arrays[f"{kind}_embeds"], dim=-1) for kind in ("image", "text"))
    relevance = scaled(-(image @ text.T).mean(-1))
    torch.testing.assert_close(relevance, arrays["relevance"], rtol=0, atol=SCORES)
    for own, states, chosen in zip(relevance, arrays["features"], arrays["selected"].tolist()):
        states, count = torch.nn.functional.normalize(states, dim=-1), min(case["keep"], len(states))
        assert likeliest(own[:, None] * (states @ states.T) * own, count).tolist() == chosen[:count]


@torch.no_grad()
def test_cdpruner_needs_its_clip_and_a_tokenizer(clips: dict[int, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip=FOLDER.*CDPrunerEmbeddings"):
        CDPruner()
    with pytest.raises(ValueError, match=r"no config\.json"):
        CDPruner(clip=str(tmp_path))
    method = CDPruner(clip=clips[8])
    assert clips[8] not in str(method.arguments()), "what is in the folder tells runs apart, not its path"
    assert method.arguments()["clip"] != CDPruner(clip=clips[24]).arguments()["clip"]
    case = read("before_decoder", "cdpruner", "c01")
    with pytest.raises(ValueError, match="tokenizer=TOKENIZER"):
        in_front(case, method, Schedule((Stage(0, tokens=9),)))
    model = build("llava")
    refused = pytest.raises(ValueError, match="another CLIP than the vision tower")
    with attach(model, method, Schedule((Stage(0, tokens=9),)), tokenizer=Says("w3")), refused:
        model(**batch_of("llava", model, RAGGED))


@torch.no_grad()
def test_cdpruner_costs_what_is_counted(clips: dict[int, str]) -> None:
    case = read("before_decoder", "cdpruner", "c01")
    model, batch = inputs_of(case)
    method, schedule = CDPruner(clip=clips[8]), Schedule((Stage(0, tokens=13),))
    with attach(model, method, schedule, tokenizer=Says("w3 w4 w5")) as trace:
        counted = counted_prefill_flops(model, batch)["total"]
    sizes, text = ModelSizes.from_config(model.config), batch["input_ids"].shape[1] - trace.visual[0]
    prompt = PromptSize(text, trace.visual[0], tuple(row[0] for row in trace.visual_tokens), images=1)
    closed = prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))["total"]
    assert counted == pytest.approx(closed, rel=1e-9)


def test_likeliest_is_the_largest_determinant_step_by_step() -> None:
    """Against determinants; and with the rank exhausted, every token once (the official code repeats some)."""
    states = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    kernel = states @ states.T
    turns = likeliest(kernel, 12).tolist()
    assert sorted(turns) == list(range(12))
    for number in range(4):
        rest = [n for n in range(12) if n not in turns[:number]]
        best = max(
            rest, key=lambda n: torch.linalg.det(kernel.double()[[*turns[:number], n]][:, [*turns[:number], n]]).item()
        )
        assert best == turns[number]
    assert torch.isfinite(scaled(torch.ones(4))).all()


@torch.no_grad()
@pytest.mark.parametrize("name", cases("prumerge"))
def test_prumerge(name: str) -> None:
    case = read("before_decoder", "prumerge", name)
    model, _ = inputs_of(case)
    asking = model.model.vision_tower.encoder.layers[-1].self_attn.q_proj
    before = [parameter.clone() for parameter in asking.parameters()]
    for parameter in asking.parameters():
        parameter.mul_(case["last_q_scale"])
    try:
        method = PruMerge(plus=case["plus"])
        chosen = case["arrays"]["selected"][0].tolist()
        stage = Stage(0, adaptive=True) if case["adaptive"] else Stage(0, tokens=len(chosen) + 1)
        trace, got = in_front(case, method, Schedule((stage,)))
    finally:
        for parameter, value in zip(asking.parameters(), before):
            parameter.copy_(value)
    torch.testing.assert_close(got, case["arrays"]["final_embeds"], rtol=0, atol=STATES)
    assert [token.centre for token in trace.merged[0][0]][:-1] == chosen, "in order of attention, the steps, the rest"
    torch.testing.assert_close(trace.scores[0][0], case["arrays"]["scores"][0], rtol=0, atol=SCORES)


@torch.no_grad()
def test_prumerge_plus_where_the_official_code_raises() -> None:
    """No outliers, two pictures: the one extra token of each; a fixed number is met by attention and steps."""
    case = dict(read("before_decoder", "prumerge", "m16"), pictures=[1])
    model, _ = inputs_of(case)
    asking = model.model.vision_tower.encoder.layers[-1].self_attn.q_proj
    before = [parameter.clone() for parameter in asking.parameters()]
    for parameter in asking.parameters():
        parameter.zero_()
    try:
        trace, _ = in_front(case, PruMerge(plus=True), Schedule((Stage(0, adaptive=True),)))
    finally:
        for parameter, value in zip(asking.parameters(), before):
            parameter.copy_(value)
    assert trace.visual_tokens[0] == [1]
    trace, _ = in_front(case, PruMerge(plus=True), Schedule((Stage(0, tokens=145),)))
    centres = [token.centre for token in trace.merged[0][0]]
    assert trace.visual_tokens[0] == [145] and len(set(centres)) == 145
    by_attention = trace.scores[0][0].argsort(descending=True, stable=True)[:72].tolist()
    assert centres[:72] == by_attention and centres[72:144] == sorted(centres[72:144])
