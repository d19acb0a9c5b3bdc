"""Methods that look at the vision tower, on videos: a row for each token where there is one, a refusal where not.

pytest tests/engine/test_video_towers.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop.conformance.families import VIDEO, build
from pdrop.conformance.prompts import collate, sample, single
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.engine import attach
from pdrop.engine.tower import UnknownTower
from pdrop.methods.divprune import DivPrune
from pdrop.methods.fastervlm import FasterVLM
from pdrop.methods.visionzip import VisionZip
from pdrop.schedule import single as at
from pdrop.shapes import ModelSizes, PromptSize

GREEDY: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}


@torch.no_grad()
def test_class_tokens_of_frames_rank_their_patches() -> None:
    """8 frames of 16 patches and a class token, which is a visual token itself and the first to go."""
    model = build("video_llava", "eager")
    batch = collate("video_llava", [sample("video_llava", model, texts, n, video=True) for n, texts in enumerate(TWO)])
    with attach(model, FasterVLM(), at(layer=0, keep=0.5)) as trace:
        logits = model(**batch).logits[:, -1]
        kept = [row.tolist() for row in trace.kept[0]]
        decoded = model.generate(**batch, **GREEDY, output_logits=True)  # runs the tower by itself
        assert kept == [row.tolist() for row in trace.kept[0]]
    torch.testing.assert_close(decoded.logits[0].double(), logits.double(), rtol=0, atol=5e-5)
    for number, found in enumerate(kept):
        frames = batch["pixel_values_videos"][number]
        attention = model.model.video_tower(frames, output_attentions=True).attentions[-2]
        said = attention[:, :, 0, 1:].mean(1)  # [frames, patches]
        wanted = [
            17 * frame + 1 + patch for frame in range(8) for patch in sorted(said[frame].topk(8).indices.tolist())
        ]
        assert found == wanted, "half of 136 tokens: 8 of each frame's 17"


TWO = ((3, 5), (2, 4))


@torch.no_grad()
@pytest.mark.parametrize("method", [FasterVLM(), DivPrune()])
def test_what_choosing_of_a_video_takes_is_counted(method: Any) -> None:
    model = build("video_llava")
    inputs = single("video_llava", sample("video_llava", model, (3, 5), video=True))
    del inputs["attention_mask"]
    schedule, sizes = at(layer=0, keep=0.5), ModelSizes.from_config(model.config)
    with attach(model, method, schedule) as trace:
        counted = counted_prefill_flops(model, inputs)["total"]
    text, entering = inputs["input_ids"].shape[1] - trace.visual[0], tuple(row[0] for row in trace.visual_tokens)
    prompt = PromptSize(text, trace.visual[0], entering, images=8)
    assert prompt == PromptSize(text, 136, images=8).under(method, schedule, sizes.layers)
    closed = prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))["total"]
    assert counted == pytest.approx(closed, rel=1e-9)


@torch.no_grad()
def test_pooled_frames_and_mixed_calls_are_refused() -> None:
    model = build("llava_onevision")
    one = single("llava_onevision", sample("llava_onevision", model, (3, 5), video=True))
    with (
        attach(model, VisionZip(), at(layer=0, keep=0.5)),
        pytest.raises(
            UnknownTower, match=r"33 tokens of videos are not rows of their 8 frames, .*VisionZip needs a row"
        ),
    ):
        model(**one)
    model = build("video_llava")
    both = [sample("video_llava", model, (3, 5), 1, video=n == 0) for n in range(2)]
    mixed = collate("video_llava", both)
    assert (mixed["input_ids"] == VIDEO).any()
    with (
        attach(model, VisionZip(), at(layer=0, keep=0.5)),
        pytest.raises(UnknownTower, match="pictures and videos come in one call"),
    ):
        model(**mixed)
    with attach(model, VisionZip(), at(layer=0, keep=0.5)) as trace:  # each by itself, one after the other
        for sort in both:
            model(**single("video_llava", sort))
            assert trace.visual_tokens[0][0] == {136: 64, 16: 8}[trace.visual[0]]
