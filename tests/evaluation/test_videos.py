"""Videos are given to a processor as videos where it takes them: how many tokens, where they lie, what that costs.

pytest tests/evaluation/test_videos.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.evaluation.answers import Answer, Question
from pdrop.evaluation.batching import prompt_tokens
from pdrop.evaluation.frames import Film, Sampling
from pdrop.evaluation.generation import Generator
from pdrop.evaluation.picture_cache import PictureCache
from pdrop.evaluation.pictures import pictures_of, tower_of
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.models.checkpoint import Checkpoint, load
from pdrop.schedule import single
from pdrop.shapes import ModelSizes, PromptSize
from tests.support import saved_checkpoints
from tests.support.films import write_film
from tests.support.specs import spec_of

BOX, MIDDLE, LOW = [0, 0, 1, 1], [0.1875, 0, 0.8125, 1], [0, 0.214286, 1, 0.785714]
NOWHERE = [1, 1, 0, 0, 0, 0, 0]
# of a film of 64 x 40 pixels and one of 32 x 56, 8 frames of each: tokens, what goes through the tower, the blocks of
# the first and of the last frame
FAMILIES: dict[str, list[tuple[int, Any, Any, Any]]] = {
    "llava": [(128, 8, [[4, 4, 0, *MIDDLE]], [[4, 4, 0, *MIDDLE]]), (128, 8, [[4, 4, 0, *LOW]], [[4, 4, 0, *LOW]])],
    "llava_onevision": [(33, 8, [[2, 2, 0, *BOX]], [[2, 2, 0, *BOX], NOWHERE])] * 2,
    "video_llava": [
        (136, 8, [NOWHERE, [4, 4, 0, *MIDDLE]], [NOWHERE, [4, 4, 0, *MIDDLE]]),
        (136, 8, [NOWHERE, [4, 4, 0, *LOW]], [NOWHERE, [4, 4, 0, *LOW]]),
    ],
    "internvl": [(32, 8, [[2, 2, 0, *BOX]], [[2, 2, 0, *BOX]])] * 2,
    "qwen2_5_vl": [
        (160, [[4, 10, 16]], [[5, 8, 0, *BOX]], [[5, 8, 0, *BOX]]),
        (112, [[4, 14, 8]], [[7, 4, 0, *BOX]], [[7, 4, 0, *BOX]]),
    ],
    "qwen3_vl": [
        (160, [[4, 10, 16]], [[5, 8, 0, *BOX]], [[5, 8, 0, *BOX]]),
        (112, [[4, 14, 8]], [[7, 4, 0, *BOX]], [[7, 4, 0, *BOX]]),
    ],
}
CHEAP = ("llava_onevision", "qwen2_5_vl", "video_llava")
IN_TURN = [name if name in CHEAP else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]


@functools.cache
def checkpoint(family: str, folder: Path) -> Checkpoint:
    save: Callable[[Path], Path] = getattr(saved_checkpoints, f"save_{family}")
    return load(str(save(folder / family)), name="tiny")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films, and the checkpoints."""
    folder = tmp_path_factory.mktemp("videos")
    write_film(folder / "wide.mp4", 24, (64, 40), noise=True)
    write_film(folder / "high.mp4", 12, (32, 56), noise=True)
    return folder


def builder(family: str, there: Path, **dials: Any) -> PromptBuilder:
    return PromptBuilder.of(checkpoint(family, there), spec_of(**dials))


def ask(made: PromptBuilder, question: str, visuals: list[Any], pixels: float = 1.0) -> tuple[str, list[Any], Any]:
    """A question's prompt, its pictures and its videos."""
    pictures, videos = made.videos.show(visuals, pixels)
    return made.render(question, len(pictures), videos), pictures, videos


def inputs(made: PromptBuilder, question: str, visuals: list[Any], pixels: float = 1.0) -> Any:
    """What the processor makes of a question."""
    prompt, pictures, videos = ask(made, question, visuals, pixels)
    return made.encode([prompt], [pictures], pixels, videos)


@pytest.mark.parametrize("family", IN_TURN)
def test_films_are_answered_in_batches_as_alone(family: str, there: Path) -> None:
    films = [Film(there / "wide.mp4"), Film(there / "high.mp4")]
    shown: list[list[Any]] = [[films[0]], [films[1]], [], [Image.new("RGB", (28, 28), "red")], [films[0]]]
    questions = [
        Question("task", number, 0, f"What is {'very ' * number}new?", functools.partial(list, images))
        for number, images in enumerate(shown)
    ]

    def answers(batch: int) -> list[Answer]:
        spec = spec_of(batch_size=batch, max_new_tokens=6)
        method = PyramidDrop(positions="original")
        return Generator(checkpoint(family, there), method, single(layer=2, keep=0.5), spec).answer(questions).answers

    alone, together = answers(1), answers(5)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.kept, one.visual_per_layer, one.layout) == (
            other.text,
            other.kept,
            other.visual_per_layer,
            other.layout,
        )
    assert alone[2].visual_tokens == 0 < alone[3].visual_tokens
    for number, (tokens, tower, first, last) in ((0, FAMILIES[family][0]), (1, FAMILIES[family][1])):
        seen = alone[number]
        assert (seen.visual_tokens, seen.images) == (tokens, tower)
        assert seen.visual_per_layer == [tokens, tokens, tokens // 2, tokens // 2]
        assert seen.layout is not None
        assert seen.layout[0] == first and seen.layout[-1] == last
        assert sum(rows * (columns + more) for frame in seen.layout for rows, columns, more, *_ in frame) == tokens


@pytest.mark.parametrize("family", IN_TURN)
def test_closed_form_is_what_torch_counts_of_a_video(family: str, there: Path) -> None:
    model = checkpoint(family, there).model
    for picture in (False, True):
        if picture and family != "qwen2_5_vl":
            continue
        visuals = [Film(there / "wide.mp4"), *([Image.new("RGB", (40, 28))] if picture else [])]
        made = inputs(builder(family, there), "What?", visuals)
        (seen,) = pictures_of(model, made) or [[]]
        visual, sizes = sum(one.tokens for one in seen), ModelSizes.from_config(model.config)
        prompt = PromptSize(made["input_ids"].shape[1] - visual, visual, images=tower_of(seen))  # type: ignore[arg-type]
        flops = prefill_flops(sizes, prompt.undropped(sizes.layers))
        counted = counted_prefill_flops(model, {k: v for k, v in made.items() if k != "attention_mask"})
        assert flops["total"] == pytest.approx(counted["total"], rel=1e-9)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_film_of_one_frame_is_shown_twice_to_models_that_take_pairs(family: str, there: Path, tmp_path: Path) -> None:
    """Qwen3-VL's processor refuses a single frame if it resizes it itself; qwen-vl-utils repeats it."""
    from qwen_vl_utils import fetch_video

    film = write_film(tmp_path / "one.mp4", 1, (84, 56), noise=True)
    (frame,) = Film(film).show(Sampling()).frames
    for dials in ({}, {"min_frame_pixels": 3136, "max_frame_pixels": 602112}):
        made = inputs(builder(family, there, **dials), "What?", [Film(film)])
        assert made["video_grid_thw"].tolist()[0][0] == 1
        pair = made["pixel_values_videos"].unflatten(1, (3, 2, -1))  # colour, frame, place
        assert torch.equal(pair[:, :, 0], pair[:, :, 1]) and pair.std() > 0
    assert len(fetch_video({"video": [frame]}, return_video_sample_fps=False)) == 2, "as theirs does"


def test_qwen_knows_when_frames_are_shown(there: Path) -> None:
    film = Film(there / "wide.mp4")  # 24 frames, 8 a second
    made = inputs(builder("qwen2_5_vl", there, frames=4, frame_sampling="nearest"), "What?", [film])
    assert made["video_grid_thw"].tolist() == [[2, 10, 16]]
    assert list(map(float, made["second_per_grid_ts"])) == [pytest.approx(2 / (4 / 24 * 8))]


@pytest.mark.exhaustive
def test_qwen3_reads_when_frames_are_shown(there: Path) -> None:
    made = builder("qwen3_vl", there, frames=4, frame_sampling="nearest")
    found = inputs(made, "What?", [Film(there / "wide.mp4")])
    said = made.processor.tokenizer.decode(found["input_ids"][0], skip_special_tokens=True)
    # frames 0 and 8, 15 and 23 of 8 a second
    assert "<0.5 seconds>" in said and "<2.4 seconds>" in said


def test_frames_by_time_and_by_pixels(there: Path) -> None:
    film, made = Film(there / "wide.mp4"), functools.partial(builder, "qwen2_5_vl", there)

    def grid(pixels: float = 1.0, **dials: Any) -> list[int]:
        found = inputs(made(**dials), "What?", [film], pixels=pixels)["video_grid_thw"].tolist()
        return list(found[0])

    assert grid() == [4, 10, 16]
    assert grid(fps=2, frames=100) == [3, 10, 16], "three seconds"
    assert grid(max_frame_pixels=1280) == [4, 6, 10], "half of 64 x 40, in squares of 8 x 8"
    assert grid(min_frame_pixels=9216, max_frame_pixels=99999) == [4, 20, 32]
    assert grid(max_video_pixels=4 * 1280, min_frame_pixels=64) == [4, 6, 10], "four pairs of frames"
    assert grid(pixels=0.25) == [4, 4, 8], "shown a quarter of the pixels"
    with pytest.raises(ValueError, match=r"scales every frame to the same size: leave out min_frame_pixels"):
        builder("llava_onevision", there, max_frame_pixels=1280)


def test_a_film_of_a_model_without_videos_is_pictures(there: Path) -> None:
    made = builder("llava", there, frames=3)
    prompt, pictures, videos = ask(made, "What?", [Film(there / "wide.mp4")])
    assert prompt.count("<image>") == 3 == len(pictures) and not videos
    assert made.videos.outline([Film(there / "wide.mp4")]) == ([(64, 40)] * 3, [])


def test_templates_and_styles_have_a_place_for_videos(there: Path) -> None:
    film = Film(there / "wide.mp4")
    asked = ask(builder("llava_onevision", there, prompt="qwen_1_5"), "What?", [film])[0]
    assert asked.endswith("<|im_start|>user\n<video>\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    asked = ask(builder("video_llava", there, prompt="vicuna_v1", system="S."), "What?", [film])[0]
    assert asked == "S. USER: <video>\nWhat? ASSISTANT:"
    asked = ask(builder("llava_onevision", there, frames=2, frame_times=True), "What?", [film])[0]
    assert asked == (
        "USER: <video>\nThe video lasts for 3.00 seconds, and 2 frames are uniformly sampled from it. These frames are "
        "located at 0.75s,2.25s.Please answer the following questions related to this video.\nWhat? ASSISTANT:"
    )
    blind = builder("llava_onevision", there)
    template, blind.processor.chat_template = blind.processor.chat_template, "{{ 'no videos' }}"
    try:
        with pytest.raises(ValueError, match=r"1 videos, and 0 places for them .*another model.prompt"):
            ask(blind, "What?", [film])
    finally:
        blind.processor.chat_template = template


def test_only_films_with_as_many_frames_share_a_batch_that_stacks_them(there: Path) -> None:
    write_film(there / "short.mp4", 3, (64, 40))
    asked = [Film(there / "wide.mp4")], [Film(there / "short.mp4")], [Image.new("RGB", (9, 9))], []

    def kinds(family: str) -> list[tuple[int, ...]]:
        made = builder(family, there).videos
        shown = [made.show(visuals) for visuals in asked]
        return [made.kind(len(pictures), videos) for pictures, videos in shown]

    stacked, in_rows = kinds("llava_onevision"), kinds("qwen2_5_vl")
    assert len(set(stacked)) == 4 and sorted(stacked) == [stacked[2], stacked[1], stacked[0], stacked[3]]
    assert in_rows[0] == in_rows[1] and len(set(in_rows)) == 3
    assert Film(there / "short.mp4").show(Sampling(8, "ends")).places == (0, 0, 0, 0, 1, 1, 1, 2)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_batches_are_made_by_the_tokens_of_videos(family: str, there: Path) -> None:
    """Without decoding a frame; one token stands for each video in a prompt that is rendered."""
    made, film = builder(family, there, frames=4), Film(there / "wide.mp4")
    questions = [Question("task", 0, 0, "What?", lambda: [film]), Question("task", 1, 0, "What?", list)]
    tokens = prompt_tokens(questions, made, "", PictureCache(0))
    encoded = inputs(made, "What?", [film])["input_ids"].shape[1]
    assert tokens == [encoded, made.text_tokens([made.render("What?", 0)])[0]]


def test_pixels_of_frames_within_the_limits_are_left_alone(there: Path) -> None:
    film = Film(there / "wide.mp4")
    plain = inputs(builder("qwen2_5_vl", there), "What?", [film])
    limited = inputs(builder("qwen2_5_vl", there, max_frame_pixels=4096, min_frame_pixels=64), "What?", [film])
    assert torch.equal(plain["pixel_values_videos"], limited["pixel_values_videos"])
