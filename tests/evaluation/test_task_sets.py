"""The sets of conf/task_sets/ offline: every task on synthetic data in the real columns, and what is ours of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pdrop.cli.compose import CONF, settings, task_names
from pdrop.evaluation.lmms import evaluate, import_lmms_eval, load_tasks
from pdrop.evaluation.metrics import score_of
from pdrop.evaluation.task_index import find
from pdrop.samples import read_samples
from tests.support.answering import scored
from tests.support.saved_checkpoints import (
    save_internvl,
    save_llava,
    save_llava_onevision,
    save_qwen,
    save_video_llava,
)
from tests.support.synthetic_sets import members, write_films, write_set

SETS = ("core", "documents", "grounding", "multi_image", "paper", "video")
CHEAP = {"core": "scienceqa_img", "documents": "ocrbench", "grounding": "refcoco_rec_testA", "multi_image": "muirbench",
         "paper": "mmbench_cn_dev_static", "video": "mlvu_dev"}  # fmt: skip
# models by how they are shown a video: how a small one is saved, and how many frames of 4 s it is shown
WATCHING: dict[str, tuple[Callable[[Path], Path], int]] = {
    "video_llava_7b": (save_video_llava, 8),
    "llava_onevision_7b": (save_llava_onevision, 32),
    "llava_video_7b": (save_llava_onevision, 64),
    "internvl3_8b": (save_internvl, 16),
    "qwen2_5_vl_7b": (partial(save_qwen, family="Qwen2_5_VL", patch=14), 8),
    "qwen3_vl_8b": (partial(save_qwen, family="Qwen3VL", patch=16), 8),
    "llava_1_5_7b": (save_llava, 8),
}


def run(name, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # where lmms-eval's video tasks look
    if name == "video":
        import_lmms_eval()
        write_films(tmp_path)
    own = write_set(tmp_path, tasks)
    boxes = "llava" if name == "grounding" else None
    return scored(tmp_path / "run", tasks, own, boxes=boxes)


def check(evaluation, folder):
    for task, result in evaluation.results.items():
        samples, main = read_samples(folder, task), result.scores[result.main_metric]
        numbers = [sample["scores"].get(result.main_metric) for sample in samples]
        assert sum(number is not None for number in numbers) == main.n > 0, task
        if any(result.main_metric in sample.get("parts", {}) for sample in samples):
            found = score_of([sample.get("parts", {}).get(result.main_metric) for sample in samples])
        else:
            found = sum(number for number in numbers if number is not None) / main.n
        assert found == pytest.approx(main.value, abs=2e-5 * max(1, main.value)), f"{task}: no interval"
        assert result.invalid is not None and 0 <= result.invalid <= result.n


def test_every_set_is_here_and_names_tasks_that_there_are():
    there = {path.stem for path in (CONF / "task_sets").glob("*.yaml")} - {"embedded", "none"}
    assert there == set(SETS)
    for name in SETS:
        assert task_names(name) == tuple(members(name))
    assert len(find(["blink_groups"])["blink_groups"]) == 14


@pytest.mark.parametrize("name", SETS)
def test_a_task_of_each_set_is_scored_offline(name, tmp_path, monkeypatch):
    found = run(name, [CHEAP[name]], tmp_path, monkeypatch)
    check(found, tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SETS)
def test_every_task_of_a_set_is_scored_offline(name, tmp_path, monkeypatch):
    found = run(name, members(name), tmp_path, monkeypatch)
    assert len(found.results) >= len(members(name))
    check(found, tmp_path / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in SETS if name != "video"])
def test_a_model_answers_every_task_of_a_set(name, tmp_path):
    """As a user runs it: LLaVA-1.5 by its official protocol, tokens dropped."""
    folder, names = save_llava(tmp_path / "llava", positions=8192), members(name)
    own = write_set(tmp_path, names)
    dials = {"model": "llava_1_5_7b", "model.path": str(folder), "tasks": names, "task_folders": [str(own)], "limit": 1,
             "latency": "off", "device": "cpu", "method": "pyramiddrop"}  # fmt: skip
    made = settings(dials)
    assert made.spec.protocol == "official"
    found = evaluate(made.load(), made.method, made.schedule, made.spec, tmp_path / "run", task_dirs=[own])
    assert len(found.results) >= len(names)
    for task, result in found.results.items():
        sample = read_samples(tmp_path / "run", task)[0]
        assert sample["prompt"].startswith("A chat between a curious user"), task
        assert sample["visual_per_layer"][-1] < sample["visual_tokens"] or sample["visual_tokens"] == 0
        assert result.boxes == ("llava" if name == "grounding" else None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", WATCHING)
def test_a_model_watches_every_video_benchmark(model, tmp_path, monkeypatch):
    """As a user runs it, by its official protocol, tokens dropped: VideoMME, MVBench's families, MLVU, EgoSchema."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import_lmms_eval()
    write_films(tmp_path)
    names, (save, frames) = members("video"), WATCHING[model]
    own, folder = write_set(tmp_path, names), save(tmp_path / "model")
    dials = {"model": model, "model.path": str(folder), "tasks": names, "task_folders": [str(own)], "limit": 1,
             "latency": "off", "device": "cpu", "method": "pyramiddrop", "positions": "original",
             "max_new_tokens": 4}  # fmt: skip
    made = settings(dials)
    assert made.spec.protocol == "official" and made.spec.frames in (frames, 512, 768)
    found = evaluate(made.load(), made.method, made.schedule, made.spec, tmp_path / "run", task_dirs=[own])
    assert len(found.results) == 23, "three, and MVBench's twenty"
    for task, result in found.results.items():
        (sample,) = read_samples(tmp_path / "run", task)
        assert result.n == 1 and sample["visual_per_layer"][-1] < sample["visual_tokens"], task
        shown = len([one for one in sample["layout"] if one])  # each, or by twos, or with a newline; of 12 stills all
        assert shown in (frames, frames // 2, frames + 1, min(frames, 12)), task


def test_textvqa_has_its_ocr_tokens_and_mmbench_cn_its_circles(tmp_path):
    names = ["textvqa_val_ocr", "mmbench_cn_dev_static"]
    own = write_set(tmp_path, names)
    found = scored(tmp_path / "run", names, own, ["A", "12"]).results
    asked = read_samples(tmp_path / "run", names[0])[0]["question"]
    assert asked == (
        "what does sign 0 say?\nReference OCR token: 12, red\nAnswer the question using a single word or phrase."
    )
    chinese = read_samples(tmp_path / "run", names[1])
    assert chinese[4]["question"].startswith("提示\nWhich letter") and "\nA. choice A\n" in chinese[4]["question"]
    assert {sample["group"] for sample in chinese} == {"0", "1"}
    scores = found[names[1]].scores
    assert scores["circular_accuracy"].value == scores["gpt_eval_score"].value == 0, "one letter is no circle"
    assert {"single_pass_accuracy", "circular_accuracy"} <= set(scores)


def test_a_row_of_refcoco_is_a_sentence(tmp_path):
    own = write_set(tmp_path, ["refcoco_rec_testB"], count=4)
    docs = load_tasks(["refcoco_rec_testB"], [own])["refcoco_rec_testB"].eval_docs
    assert len(docs) == 8 and docs[1]["sentence"] == "the other 0" and docs[1]["width"] == 64
    assert docs["image_id"] == [f"COCO_train2014_{n // 4:012d}.jpg" for n in range(8)], "objects of a picture share it"
    assert docs[7]["image"].size == (64, 48) and docs[7]["bbox"] == [8.0, 6.0, 16.0, 24.0]
