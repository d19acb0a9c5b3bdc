"""Batches by tokens, prepared ahead, from pictures that are kept: the same inputs to the bit, however they came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pdrop.evaluation.answers import Question, QuestionError
from pdrop.evaluation.batching import batches, prompt_tokens
from pdrop.evaluation.generation import Generator
from pdrop.evaluation.picture_cache import PictureCache
from pdrop.evaluation.prefetch import Preparation, ahead
from pdrop.evaluation.prompts import PromptBuilder
from pdrop.evaluation.rows import PromptPictures
from pdrop.models.checkpoint import load
from pdrop.schedule import Schedule
from tests.support import saved_checkpoints as saved
from tests.support.specs import spec_of

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": saved.save_llava,
    "llava_next": saved.save_llava_next,
    "llava_onevision": saved.save_llava_onevision,
    "internvl": saved.save_internvl,
    "qwen2_5_vl": saved.save_qwen2_5_vl,
}
SIZES = [[(60, 44)], [(28, 90)], [(60, 44), (33, 20)], [(100, 30)], [(60, 44)]]


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB") if size[0] != 60 else Image.new("RGB", size, (9, 99, 199))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(str(FAMILIES[request.param](tmp_path_factory.mktemp("tiny"))), name=request.param)


def asked(rows: list[list[Image.Image]]) -> list[Question]:
    return [
        Question("t", n, 0, f"Question {n}" + "?" * n, lambda row=row: row, data=str(n)) for n, row in enumerate(rows)
    ]


@pytest.mark.parametrize("pixels", [1.0, 0.5])
def test_pictures_processed_by_rows_and_kept_are_the_batch_to_the_bit(checkpoint: Any, pixels: float) -> None:
    builder, cache = PromptBuilder(checkpoint.processor), PictureCache(1 << 20)
    rows = [[picture(size) for size in row] for row in SIZES]
    questions = asked(rows)
    prompts = [builder.render(question.text, len(row)) for question, row in zip(questions, rows)]
    whole = builder.encode(prompts, rows, pixels)
    for _ in range(2):  # at first they are processed, then taken from the cache
        found = builder.encode_rows(
            prompts, [PromptPictures.of(one, "", cache, builder.videos) for one in questions], cache, pixels
        )
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert (
        cache.hits == len(SIZES) + 1
        and len({row.contents for row in (PromptPictures.of(q, "", cache, builder.videos) for q in questions)}) == 4
    )


def test_tokens_by_arithmetic_are_those_of_the_processor(checkpoint: Any) -> None:
    builder, cache = PromptBuilder(checkpoint.processor), PictureCache(0)
    rows = [[picture(size) for size in row] for row in SIZES if len(row) == 1] + [[]]
    questions = asked(rows)
    exact = [
        int(builder.encode([builder.render(question.text, len(row))], [row])["input_ids"].shape[1])
        for question, row in zip(questions, rows)
    ]
    assert prompt_tokens(questions, builder, "", cache) == exact


def test_batches_are_made_of_prompts_of_about_one_length_whatever_the_order_of_questions() -> None:
    questions = asked([[]] * 7)
    tokens = {q.doc_id: length for q, length in zip(questions, [5, 900, 6, 880, 5, 7, 6])}
    for order in (questions, questions[::-1]):
        made = [[q.doc_id for q in batch] for batch in batches(order, 2, [tokens[q.doc_id] for q in order])]
        assert made == [[1, 3], [5, 2], [6, 0], [4]]


def test_other_settings_and_other_pixels_share_nothing(tmp_path: Path) -> None:
    processor = load(str(saved.save_llava(tmp_path / "llava")), name="llava").processor
    cache = PictureCache(1 << 20)
    shown, hidden = picture((60, 44)), Image.new("RGB", (60, 44))
    for image, mode, pixels in ((shown, "crop", 1.0), (shown, "pad", 1.0), (shown, "crop", 0.5), (hidden, "crop", 1.0)):
        builder = PromptBuilder(processor, image_mode=mode)  # type: ignore[arg-type]
        question = asked([[image]])[0]
        prompt = builder.render(question.text, 1)
        found = builder.encode_rows([prompt], [PromptPictures.of(question, "", cache, builder.videos)], cache, pixels)
        assert torch.equal(found["pixel_values"], builder.encode([prompt], [[image]], pixels)["pixel_values"])
    assert cache.hits == 0


def test_the_cache_is_bounded_in_bytes_and_lets_go_what_was_used_longest_ago() -> None:
    cache = PictureCache(3000)
    for key in "abc":
        cache.put(key, key.upper(), 1000)
    assert cache.get("a") == "A"
    cache.put("d", "D", 1000)
    assert cache.get("b") is None and [cache.get(key) for key in "acd"] == ["A", "C", "D"] and cache.used == 3000
    cache.put("huge", "H", 3001)
    assert cache.get("huge") is None and cache.get("a") == "A"
    cache.resize(0)
    assert cache.used == 0 and cache.get("a") is None


def test_a_few_are_prepared_ahead_in_order_and_no_thread_is_left() -> None:
    begun: list[int] = []
    used: list[int] = []
    room = threading.Semaphore(0)

    def prepare(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ValueError("picture 5 is broken")
        if number == 2:
            room.release()
        return number

    def use(prepare: Callable[[int], int], last: BaseException | None = None) -> None:
        with closing(ahead(prepare, range(9), 2)) as ready:
            for number in ready:
                assert number > 0 or prepare is abs or room.acquire(timeout=30), "2 is prepared while 0 is used"
                assert not begun or max(begun) <= number + 2
                used.append(number)
                if last is not None:
                    raise last

    before = threading.active_count()
    with pytest.raises(ValueError, match="picture 5"):
        use(prepare)
    assert used == [0, 1, 2, 3, 4] and threading.active_count() == before
    begun.clear()
    for stop in (KeyboardInterrupt, GeneratorExit):
        with pytest.raises(stop):
            use(abs, stop())
        assert threading.active_count() == before


def test_answers_are_the_same_with_and_without_threads_and_a_broken_picture_is_named(tmp_path: Path) -> None:
    checkpoint = load(str(saved.save_llava(tmp_path / "llava")), name="llava")
    questions = asked([[picture((60, 44))] for _ in range(7)])
    spec = spec_of(batch_size=2, max_new_tokens=3)
    answers = [
        Generator(checkpoint, None, Schedule(), spec, Preparation(depth, gib)).answer(questions).answers
        for depth, gib in ((0, 0.0), (0, 1.0), (2, 0.0), (2, 1.0))
    ]
    assert all(found == answers[0] for found in answers)

    def broken() -> list[Image.Image]:
        raise OSError("image file is truncated")

    # the shortest prompt comes last: the pictures of the others are looked at before, and all are measured at first
    looks = iter([[picture((60, 44))]])
    questions[0] = Question("t", 0, 0, "Question 0", lambda: next(looks, None) or broken(), data="0")
    before = threading.active_count()
    with pytest.raises(QuestionError, match=r"^task t, doc_id 0: OSError: image file is truncated"):
        Generator(checkpoint, None, Schedule(), spec, Preparation(2, 0.0)).answer(questions)
    assert threading.active_count() == before
