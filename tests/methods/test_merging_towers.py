"""Methods before the decoder where the tower makes one token of several patches: tests/vectors/README.md has the cases.

pytest tests/methods/test_merging_towers.py
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from pdrop import CDPrunerEmbeddings, HiPrune, HoloV, Method, Schedule, Stage, VisionZip, attach
from pdrop.conformance.families import MERGED_TOWERS, build
from pdrop.conformance.prompts import collate, sample
from pdrop.methods.base import View
from pdrop.methods.random_drop import twin_of
from pdrop.shapes import ModelSizes, PromptSize
from tests.support.cases import RAGGED, check_generate, prefill_flops_of_grids
from tests.support.official import VECTORS, names, read

CASES = names("before_decoder", "qwen2_5_vl")
METHODS: list[Method] = [
    VisionZip(contextual=2, positions="original"),
    VisionZip(contextual=0.1, positions="original"),
    HoloV(crops=3, positions="original"),
    HoloV(crops=3, overflow="redistribute", positions="original"),
    CDPrunerEmbeddings(positions="original"),
    HiPrune(alpha=0.6, object_layer=2, positions="original"),
]


@functools.cache
def qwen() -> Any:
    """The vectors' Qwen2.5-VL."""
    folder = VECTORS / "before_decoder" / "models"
    own = json.loads((folder / "qwen2_5_vl.json").read_text())
    text, ids = own["text"], own["ids"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    rope["mrope_section"] = text.pop("rope_scaling")["mrope_section"]
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=own["vision"],
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    renamed = {
        name
        if name.startswith("lm_head")
        else f"model.{name}"
        if name.startswith("visual")
        else f"model.language_{name}": v
        for name, v in load_file(folder / "qwen2_5_vl.safetensors").items()
    }
    model.load_state_dict({name: value.float() for name, value in renamed.items()})
    return model.eval()


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    """What the model is called with."""
    arrays = case["arrays"]
    ids = arrays["input_ids"]
    kinds = (ids == qwen().config.image_token_id).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": arrays["pixel_values"].float(),
        "image_grid_thw": arrays["grid"],
    }


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_visionzip_for_qwen2_5_vl(name: str) -> None:
    """The authors' program: what enters the first layer, its positions (in the logits), what is dominant or made."""
    case = read("before_decoder", "qwen2_5_vl", name)
    arrays, model = case["arrays"], qwen()
    method = VisionZip(contextual=case["contextual"], positions="original")
    entered: list[Tensor] = []
    norm = model.get_decoder().layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0].clone()))
    try:
        with attach(model, method, Schedule((Stage(0, tokens=case["dominant"] + case["contextual"]),))) as trace:
            logits = model(**inputs_of(case)).logits
    finally:
        handle.remove()
    torch.testing.assert_close(entered[-1], arrays["final_embeds"], rtol=0, atol=2e-4)
    assert trace.kept[0][0].tolist() == arrays["dominant"].tolist()
    assert [token.centre for token in trace.merged[0][0]] == arrays["targets"].tolist()
    there = logits[0].abs().sum(-1) > 0
    torch.testing.assert_close(logits[0, there], arrays["logits"][0], rtol=0, atol=5e-4)
    # theirs: the sum over all rows, the mean over heads and patches; ours: the sum over heads, the mean over rows
    heads, rows, patches = model.config.vision_config.num_heads, 4 * case["tokens"], 4
    torch.testing.assert_close(trace.scores[0][0], arrays["scores"] * heads * patches / rows, rtol=0, atol=1e-5)
    share = VisionZip(contextual=case["ratios"][1], positions="original")
    with attach(model, share, Schedule((Stage(0, tokens=case["dominant"] + case["contextual"]),))) as trace:
        model(**inputs_of(case))
    assert [token.centre for token in trace.merged[0][0]] == arrays["targets"].tolist(), "the same as a fraction"


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_holov_for_qwen2_5_vl(name: str) -> None:
    """The authors' function, given each token's own attention, which their program mixes up."""
    case = read("before_decoder", "qwen2_5_vl", name)
    keep = case["dominant"] + case["contextual"]
    method = HoloV(crops=case["holov_crops"], positions="original")
    with attach(qwen(), method, Schedule((Stage(0, tokens=keep),))) as trace:
        qwen()(**inputs_of(case))
    assert [next(iter(token.sources)) for token in trace.merged[0][0]] == case["arrays"]["holov_positions"].tolist()


# ---------------------------------------------------------------- what they share


@torch.no_grad()
@pytest.mark.parametrize("family", MERGED_TOWERS)
def test_a_picture_is_seen_as_it_is_alone(family: str) -> None:
    """Pictures of all sizes in one call, window by window or not: attention and keys of each, filled up with zeros."""
    model = build(family)
    seen: list[Any] = []
    one, two = (sample(family, model, (3, 5, 4), seed) for seed in (1, 3))
    for samples in ([one, two], [one], [two]):
        with attach(model, spying(seen), Schedule((Stage(0, keep=0.5),))):
            model(**collate(family, samples))
    together, alone = seen[0], [tower for tower in seen[1:]]
    tiles = [tile for pictures in together.pictures for picture in pictures for tile in picture]
    grids = [grid for own in (one, two) for grid in own["image_grid_thw"].tolist()]
    assert [tile.rows for tile in tiles] == [h * w // 4 for _, h, w in grids] == [len(tile.places) for tile in tiles]
    for number, tile in enumerate(tiles):
        own, there = alone[number // 2], number % 2
        assert torch.all(together.rows(-1)[number, :, tile.rows :] == 0)
        for got, want in ((together.rows(-1), own.rows(-1)), (together.keys(-1), own.keys(-1))):
            torch.testing.assert_close(got[number, :, : tile.rows], want[there, :, : tile.rows], rtol=0, atol=1e-6)
        assert torch.equal(together.states[number, : tile.rows], own.states[there, : tile.rows])
        assert together.rows(-1)[number].sum(-1).tolist() == pytest.approx([1, 1], abs=1e-6)


def spying(seen: list[Any]) -> Method:
    """A VisionZip that shows what it sees of the tower."""

    class Spying(VisionZip):
        def score(self, view: View) -> Tensor:
            """As VisionZip."""
            seen.append(view.tower)
            return super().score(view)

    return Spying(contextual=2, positions="original")


@torch.no_grad()
@pytest.mark.product(1)
@pytest.mark.parametrize("family", MERGED_TOWERS)
def test_generate_sees_what_a_forward_sees(family: str) -> None:
    """One picture, two, none; videos by themselves, frame by frame; beams share a picture."""
    model = build(family)
    for videos in (False, True):
        texts = ((3, 5), (2, 4), (7,)) if videos else RAGGED
        samples = [sample(family, model, own, seed, video=videos and len(own) > 1) for seed, own in enumerate(texts)]
        batch = collate(family, samples)
        for method in METHODS:
            check_generate(model, batch, method)


@torch.no_grad()
def test_every_picture_has_its_share_by_its_size() -> None:
    """And a twin as many; images beside videos in one call are refused."""
    model = build("qwen2_5_vl")
    one = sample("qwen2_5_vl", model, (3, 5, 4), 1)
    sizes = [h * w // 4 for _, h, w in one["image_grid_thw"].tolist()]
    assert sizes == [6, 9]
    for method in METHODS:
        for own in (method, twin_of(method, 3)):
            with attach(model, own, Schedule((Stage(0, keep=0.5),))) as trace:
                model(**collate("qwen2_5_vl", [one]))
            whole = method.count(Stage(0, keep=0.5), sum(sizes))
            assert trace.visual_tokens[0] == [sum(whole * size // sum(sizes) for size in sizes)]
            prompt = PromptSize(9, sum(sizes), images=[(1, 4, 6), (1, 6, 6)])
            assert method.entering(Schedule((Stage(0, keep=0.5),)), prompt, 6) == [trace.visual_tokens[0][0]] * 6
    both = sample("qwen2_5_vl", model, (3, 5, 4), 1, video=True)
    with (
        attach(model, METHODS[0], Schedule((Stage(0, keep=0.5),))),
        pytest.raises(ValueError, match="images and videos"),
    ):
        model(**collate("qwen2_5_vl", [both]))


@torch.no_grad()
@pytest.mark.product(2)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("texts", [(3, 5), (3, 5, 6)], ids=["one picture", "two pictures"])
def test_flops_in_closed_form_are_those_counted(method: Method, texts: tuple[int, ...]) -> None:
    for family in MERGED_TOWERS:
        model = build(family, dtype=torch.float32)
        one = collate(family, [sample(family, model, texts, 1)])
        counted, closed, trace = prefill_flops_of_grids(model, one, method, Schedule((Stage(0, keep=0.5),)))
        # not in the closed form: what Qwen3-VL adds after its first layers is mixed like the tokens that are made
        hidden = ModelSizes.from_config(model.config).hidden
        added = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ())) * hidden
        mixed = 2 * len(trace.merged[0][0]) * one["input_ids"].shape[1] * added
        assert counted == pytest.approx(closed + mixed, rel=1e-6), family


def test_what_cannot_be_is_refused_in_a_line() -> None:
    for wrong in (-1, True, 0.0, 1.0, 1.5, "10"):
        with pytest.raises(ValueError, match="contextual is a number of tokens from 0 on, or a fraction"):
            VisionZip(contextual=wrong)  # type: ignore[arg-type]
    from pdrop import SCOPE, FasterVLM, HiRED, PruMerge, VisPruner

    for method in (FasterVLM, VisPruner, HiRED, SCOPE, PruMerge):
        for own in (method(positions="original"), twin_of(method(positions="original"))):
            with pytest.raises(ValueError, match="makes one token of several patches: its authors have no rule"):
                attach(build("qwen3_vl"), own, Schedule((Stage(0, 0.5),)))
