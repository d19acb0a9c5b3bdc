"""Prompts and pictures: what the model is shown in each style and mode, and on other families than LLaVA-1.5."""

import json
from functools import partial

import datasets
import pytest
import torch
from PIL import Image

from pdrop.evaluation.lmms import evaluate
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.models.checkpoint import load
from pdrop.samples import read_samples, sample_lines
from pdrop.schedule import pyramid
from tests.support.saved_checkpoints import (
    LAYERS,
    VISUAL_TOKENS,
    save_internvl,
    save_llava,
    save_llava_next,
    save_llava_onevision,
    save_qwen,
    save_qwen2_5_vl,
)
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture, write_tasks

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load(str(save_llava(tmp_path_factory.mktemp("prompts") / "llava")), name="tiny").processor


def test_styles(processor):
    chat, vicuna = PromptBuilder(processor), PromptBuilder(processor, "vicuna_v1")
    assert chat.render("What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert chat.render("What?", 0) == "USER: What? ASSISTANT:"
    assert vicuna.render("What?", 1) == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    assert vicuna.render("What?", 2) == f"{SYSTEM} USER: <image> <image>\nWhat? ASSISTANT:"
    assert vicuna.render("What?", 0) == f"{SYSTEM} USER: What? ASSISTANT:"


def test_a_question_may_say_where_its_pictures_stand(processor):
    text = "Is <image> like <image>?"
    assert PromptBuilder(processor, "vicuna_v1").render(text, 2) == f"{SYSTEM} USER: {text} ASSISTANT:"
    assert PromptBuilder(processor).render(text, 2).replace("\n", "") == f"USER: {text} ASSISTANT:"
    with pytest.raises(ValueError, match="marks 2 images with <image>, but has 1"):
        PromptBuilder(processor).render(text, 1)


def test_what_a_checkpoint_lacks_is_said(processor, tmp_path):
    bare = load(str(save_llava(tmp_path / "bare", template=False)), name="bare").processor
    with pytest.raises(ValueError, match="no chat template: use prompt=vicuna_v1"):
        PromptBuilder(bare)
    with pytest.raises(ValueError, match="unknown prompt style 'vicuna'"):
        PromptBuilder(processor, "vicuna")
    with pytest.raises(ValueError, match="unknown image mode 'square'"):
        PromptBuilder(processor, image_mode="square")
    with pytest.raises(ValueError, match="a visual of type str: only images"):
        PromptBuilder(processor).encode(["USER: <image>"], [["video.mp4"]])


def test_a_smaller_picture_makes_fewer_tokens_or_loses_detail(processor, tmp_path):
    image = Image.effect_noise((112, 112), 80)
    ids, pixels = (PromptBuilder(processor).encode(["USER: <image>\nWhat?"], [[image]], share) for share in (1.0, 0.25))
    assert torch.equal(ids["input_ids"], pixels["input_ids"]), "a fixed tower's processor scales it up again"
    assert not torch.equal(ids["pixel_values"], pixels["pixel_values"])
    small = image.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    by_hand = PromptBuilder(processor).encode(["USER: <image>\nWhat?"], [[small]])
    assert torch.equal(pixels["pixel_values"], by_hand["pixel_values"])
    qwen = PromptBuilder(load(str(save_qwen2_5_vl(tmp_path / "qwen")), name="tiny").processor)
    grids = [qwen.encode([qwen.render("What?", 1)], [[image]], share)["image_grid_thw"] for share in (1.0, 0.25)]
    assert grids[1].prod() < grids[0].prod()


def test_pad_shows_what_crop_cuts_off(processor):
    wide = Image.new("RGB", (84, 28), (0, 0, 0))
    wide.paste((255, 255, 255), (0, 0, 20, 28))  # white on the left, which cropping the middle loses
    crop, pad = (
        PromptBuilder(processor, image_mode=mode).encode(["USER: <image>"], [[wide]])["pixel_values"]
        for mode in ("crop", "pad")
    )
    assert crop.shape == pad.shape == (1, 3, 28, 28)
    assert crop[0, 0].max() == crop[0, 0].min() and pad[0, 0].max() > crop[0, 0].max()
    mean, deviation = (torch.tensor(getattr(processor.image_processor, f"image_{name}")) for name in ("mean", "std"))
    grey = ((255 * mean).int() / 255 - mean) / deviation
    assert torch.allclose(pad[0, :, 0, 0], grey, atol=1e-5), "the border has the processor's mean colour"


def test_batches_are_padded_on_the_left_and_start_once(processor):
    builder = PromptBuilder(processor)
    prompts = [builder.render(text, 1) for text in ("What?", "What is it that is shown here?")]
    inputs = builder.encode(prompts, [[picture(0)], [picture(1)]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask[0, 0] == 0 and mask[:, -1].all() and (ids == 1).sum(1).tolist() == [1, 1]
    assert (ids == processor.image_token_id).sum(1).tolist() == [VISUAL_TOKENS, VISUAL_TOKENS]
    spelled_out = builder.encode([f"<s>{prompt}" for prompt in prompts], [[picture(0)], [picture(1)]])
    assert torch.equal(spelled_out["input_ids"], ids), "a template that spells <s> out gets no second one"


@pytest.mark.parametrize(
    ("save", "positions"),
    [
        (save_llava_next, "compact"),
        (save_llava_onevision, "compact"),
        (partial(save_qwen, family="Qwen3VL", patch=4), "original"),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                (save_internvl, "compact"),
                (save_qwen2_5_vl, "original"),
                (partial(save_qwen, family="Qwen2VL", patch=4), "original"),
            )
        ),
    ],
)
def test_other_families(save, positions, tmp_path):
    """One picture, two, and none; alone and in batches."""
    datasets.disable_progress_bars()
    tasks = write_tasks(tmp_path, ["scienceqa_img", "seedbench"])
    checkpoint, method = load(str(save(tmp_path / "model")), name="other"), PyramidDrop(positions=positions)
    seen = []
    for size in (1, 5):
        spec = spec_of(tasks=("scienceqa_img", "seedbench"), max_new_tokens=4, batch_size=size)
        evaluate(checkpoint, method, pyramid(LAYERS), spec, tmp_path / str(size), task_dirs=[tasks])
        seen.append([sample_lines(read_samples(tmp_path / str(size), task)) for task in spec.tasks])
    assert seen[0] == seen[1]
    for text in seen[0]:
        for line in map(json.loads, text.splitlines()):
            visual = line["visual_tokens"]
            assert (visual > 0) == (line["image"] is not None)
            assert line["visual_per_layer"] == [visual, *(int(visual * keep) for keep in (0.5, 0.25, 0.125))]
    if save is save_llava_onevision:
        tokens = {line["visual_tokens"] for line in map(json.loads, seen[0][1].splitlines())}
        assert tokens == {16 + 28, 2 * (16 + 1)}, "tiles of one picture; of two the whole alone, each with a newline"
