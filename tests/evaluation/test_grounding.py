"""Boxes: each family's prompt, frame and reading, scored in pixels of the original picture."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch

from pdrop.cli import compose
from pdrop.cli.lmms_command import from_arguments
from pdrop.evaluation.answers import Answer
from pdrop.evaluation.grounding import (
    FAMILIES,
    Sight,
    asked,
    asks_boxes,
    family_of,
    in_pixels,
    iou,
    parted,
    read_box,
    with_sight,
)
from pdrop.evaluation.lmms import evaluate
from pdrop.evaluation.pictures import seen_box
from pdrop.record import RunRecord
from pdrop.runs.rescore import rescore
from pdrop.samples import read_samples
from tests.support.answering import made_up, scored, spec
from tests.support.lmms_evals_command import lmms_evals_command
from tests.support.saved_checkpoints import save_llava, tokenizer
from tests.support.synthetic_sets import write_set

WIDTH, HEIGHT = 640, 480
TRUE = (160.0, 120.0, 480.0, 360.0)


def seen(family, **changes) -> Sight:
    return replace(Sight(family, layout=[[[4, 4, 0, 0, 0, 1, 1]]], images=1), **changes)


def test_boxes_are_read_in_every_spelling():
    for text in (
        *("[0.1, 0.2, 0.3, 0.4]", "(.1,.2,.3,.4)", "[[0.1, 0.2, 0.3, 0.4]]", "(0.1,0.2),(0.3,0.4)"),
        *('```json\n[{"bbox_2d": [0.1, 0.2, 0.3, 0.4], "label": "x"}]\n```', "0.1 0.2 0.3 0.4", "0.1, 0.2 0.3;0.4"),
        "<box>[[0.1, 0.2, 0.3, 0.4]]</box> and [0.5, 0.5, 0.6, 0.6]",
    ):  # fmt: skip
        assert read_box(text) == (0.1, 0.2, 0.3, 0.4), text
    assert read_box("[0.1, 0.2, 0.3") is None and read_box('"bbox_2d": [1, 2, 3') is None and read_box("") is None


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_llavas_box_is_of_the_square_that_the_tower_sees(mode):
    left, top, right, bottom = seen_box(WIDTH, HEIGHT, mode, cropped=True)
    sight = seen("llava", layout=[[[24, 24, 0, left, top, right, bottom]]])
    side, margin = (640, (0, 80)) if mode == "pad" else (480, (-80, 0))
    box = [(value + margin[n % 2]) / side for n, value in enumerate(TRUE)]
    assert in_pixels(tuple(box), sight, WIDTH, HEIGHT) == pytest.approx(TRUE, abs=0.01)
    with pytest.raises(ValueError, match="what the tower saw"):
        in_pixels(tuple(box), seen("llava", layout=None), WIDTH, HEIGHT)


def test_qwens_and_internvls_frames():
    small = seen("qwen2_5_vl", images=[[1, 20, 28]])  # 280 x 392 pixels of a picture of 300 x 400
    assert in_pixels((0, 0, 392, 280), small, 400, 300) == pytest.approx((0, 0, 400, 300))
    assert in_pixels((98, 70, 196, 140), small, 400, 300) == pytest.approx((100, 75, 200, 150))
    with pytest.raises(ValueError, match="how the processor resized"):
        in_pixels((0, 0, 1, 1), seen("qwen2_5_vl"), 400, 300)
    for family in ("qwen3_vl", "internvl"):
        assert in_pixels((250, 250, 750, 750), seen(family), WIDTH, HEIGHT) == pytest.approx(TRUE)
    assert in_pixels((0.25, 0.25, 0.75, 0.75), seen("internvl"), WIDTH, HEIGHT) == pytest.approx(TRUE)
    assert in_pixels((750, 750, 250, 250), seen("qwen3_vl"), WIDTH, HEIGHT) == pytest.approx(TRUE), "swapped corners"
    assert in_pixels((-10, 0, 2000, 500), seen("qwen3_vl"), WIDTH, HEIGHT) == (0, 0, WIDTH, 240), "cut to the picture"


def test_an_answers_text_can_carry_how_the_picture_was_seen():
    where = {"images": [[1, 2, 2]], "layout": [[[4, 4, 0, 0, 0, 1, 1]]]}
    answer = Answer("", "I\n<sight> [0.5, 0.5]", 1, 16, 1, [16], [], **where)
    words, sight = parted(with_sight(answer, "qwen3_vl").text)
    assert (words, sight) == (answer.text, Sight.of(answer, "qwen3_vl")) and sight.images == [[1, 2, 2]]
    assert parted("[0.1, 0.2, 0.3, 0.4]") == ("[0.1, 0.2, 0.3, 0.4]", None)


def test_iou_of_nothing_is_nothing():
    assert iou(TRUE, TRUE) == 1 and iou(TRUE, (0, 0, 0, 0)) == 0 == iou((5, 5, 5, 5), (5, 5, 5, 5))
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)


def test_each_family_is_asked_in_its_words_and_others_are_refused_before_anything_is_loaded():
    assert [asks_boxes(task) for task in ("refcoco_rec_testA", "refcocog_rec_val", "refcoco_bbox_rec_val", "pope")] == [
        True, True, False, False,
    ]  # fmt: skip
    assert family_of(["pope"], "unheard_of") is None
    with pytest.raises(ValueError, match="task refcoco_rec_testA: how a llava_next model is asked for a box"):
        family_of(["pope", "refcoco_rec_testA"], "llava_next")
    assert compose.settings({"tasks": ["refcoco_rec_testA"], "device": "cpu"}).spec.tasks == ("refcoco_rec_testA",)
    for family, words in FAMILIES.items():
        assert "the cat" in words.prompt.format("the cat") and family_of(["refcoco_rec_val"], family) == family


@pytest.fixture
def tasks(tmp_path):
    return write_set(tmp_path, ["refcoco_rec_testA"], count=3)


def test_scores_are_of_the_original_picture(tasks, tmp_path):
    task = "refcoco_rec_testA"
    whole = scored(tmp_path / "run", [task], tasks, ["[0.125, 0.125, 0.375, 0.625]"], boxes="llava").results[task]
    samples = read_samples(tmp_path / "run", task)
    assert samples[1]["prompt"].endswith("this sentence describes: the other 0")
    # true boxes are 16, 24 and 32 pixels wide; the answer's is 16 x 24 of 64 x 48 pixels, which is the first
    assert [round(sample["scores"]["mean_iou"], 3) for sample in samples] == [1, 1, 0.667, 0.667, 0.5, 0.5]
    assert (whole.main_metric, whole.scores["acc_0.5"].value, whole.boxes) == ("acc_0.5", 1.0, "llava")
    assert whole.scores["unreadable"].higher_is_better is False and whole.invalid == 0
    none = scored(tmp_path / "none", [task], tasks, ["I see a cat"], boxes="llava").results[task]
    assert (none.scores["acc_0.5"].value, none.scores["unreadable"].value, none.invalid) == (0.0, 1.0, 6)


def test_stored_boxes_are_scored_anew_in_the_familys_frame(tasks, tmp_path):
    run = spec(["refcoco_rec_testA"])
    folder = tmp_path / "runs" / run.folder
    results = scored(folder, run.tasks, tasks, ["[125, 125, 375, 625]"], boxes="qwen3_vl").results
    RunRecord(run, "done", "2026-01-02T03:04:05Z", results=results).write(folder)
    assert results["refcoco_rec_testA"].scores["acc_0.5"].value == 1
    assert rescore(folder, [tasks]) == [] and RunRecord.read(folder).results == results


def test_other_questions_keep_their_text():
    from pdrop.evaluation.answers import Question

    question = Question("pope", 0, 0, "Is it?", list)
    assert asked(question, "llava") is question and asked(question, None) is question
    box = replace(question, task="refcoco_rec_val", text="the cat")
    assert asked(box, "internvl").text.endswith("describes: <ref>the cat</ref>") and asked(box, None) is box
    assert asked(box, "internvl").key != box.key and made_up(box, ["x"]).text == "x"


def save_that_says_numbers(folder: Path) -> Path:
    """A tiny LLaVA whose answers hold boxes: it can say only points and four digits, points more readily."""
    path, vocabulary = save_llava(folder) / "model.safetensors", tokenizer().get_vocab()
    weights = safetensors.torch.load_file(path)
    head = weights["language_model.lm_head.weight"]
    head[[number for token, number in vocabulary.items() if token not in tuple(".1246")]] = 0
    head[vocabulary["."]] *= 2
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_lmms_evals_own_command_line_scores_boxes_alike(tasks, tmp_path):
    task, folder = "refcoco_rec_testA", save_that_says_numbers(tmp_path / "llava")
    file = tasks / f"{task}.yaml"
    file.write_text(file.read_text().replace("max_new_tokens: 8", "max_new_tokens: 24"))
    words = {"method": "fastv", "ratio": 0.5, "device": "cpu", "image_mode": "pad"}
    generator = from_arguments(str(folder), **words)
    asked_of, how = replace(generator.spec, tasks=(task,)), {"generator": generator, "boxes": "llava"}
    here = evaluate(None, None, generator.schedule, asked_of, tmp_path / "run", task_dirs=[tasks], **how).results[task]
    arguments = ",".join([f"pretrained={folder}", *(f"{name}={value}" for name, value in words.items())])
    scores, lines = lmms_evals_command(tmp_path, arguments, task, tasks)
    assert {name: scores[f"{name},none"] for name in here.scores} == {n: s.value for n, s in here.scores.items()}
    assert 0 < here.scores["acc_0.5"].value < 1 and here.scores["unreadable"].value < 1, "there are boxes of both kinds"
    samples = read_samples(tmp_path / "run", task)
    given = {line["doc_id"]: parted(line["filtered_resps"]) for line in lines}
    assert {n: words for n, (words, _) in given.items()} == {sample["doc_id"]: sample["answer"] for sample in samples}
    assert {n: sight.layout for n, (_, sight) in given.items()} == {one["doc_id"]: one["layout"] for one in samples}
