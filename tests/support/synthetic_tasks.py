"""The paper's lmms-eval tasks on a few made-up documents in the real datasets' columns: no network, real prompts,
real scoring.

    folder = write_tasks(tmp_path, ["mme", "pope"])
    evaluate(..., tasks=["mme", "pope"], task_dirs=[folder])

Each task is lmms-eval's own YAML with another `dataset_path`, which is also how one points it to a local copy, and
with shorter answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from PIL import Image

LETTERS = "ABCD"
LONGEST = 8  # tokens of an answer
ANSWERS = ("yes", "no", "A", "B", "12", "red")


@functools.cache
def picture(number: int, size: tuple[int, int] = (40, 28)) -> Image.Image:
    """A picture of noise, not square, so that padding and cropping differ."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _mme(i: int) -> dict[str, Any]:
    pair = i // 2  # two questions per picture, scored together
    category = ("existence", "count", "code_reasoning")[pair % 3]
    return {
        "question_id": f"{category}/{pair:04d}.png",
        "image": picture(pair),
        "question": f"Is thing {i} in the picture? Please answer yes or no.",
        "answer": ("Yes", "No")[i % 2],
        "category": category,
    }


def _pope(i: int) -> dict[str, Any]:
    return {
        "id": str(i),
        "question_id": str(i),
        "question": f"Is there a thing number {i} in the image?",
        "answer": ("yes", "no")[i % 2],
        "image_source": f"COCO_val2014_{i // 3:012d}",
        "image": picture(i // 3),
        "category": "adversarial",
    }


def _gqa(i: int) -> dict[str, Any]:
    return {"id": str(i), "imageId": f"n{i // 2}", "question": f"What is left of {i}?", "answer": ANSWERS[i % 6]}


def _scienceqa(i: int) -> dict[str, Any]:
    return {
        "image": picture(i) if i % 3 else None,  # a third of ScienceQA has no picture
        "question": f"Which of these is number {i}?",
        "choices": [f"choice {letter}" for letter in LETTERS],
        "answer": i % 4,
        "hint": "A hint." if i % 2 else "",
        "task": "closed choice",
        "grade": "grade7",
        "subject": "natural science",
        "topic": "physics",
        "category": "Magnets",
        "skill": "Compare",
        "lecture": "",
        "solution": "",
    }


def _textvqa(i: int) -> dict[str, Any]:
    return {
        "image_id": f"i{i // 2}",
        "question_id": i,
        "question": f"what does sign {i} say?",
        "question_tokens": [],
        "image": picture(i // 2),
        "answers": [ANSWERS[i % 6]] * 10,
        "ocr_tokens": ["12", "red"],
    }


def _vqav2(i: int) -> dict[str, Any]:
    answers = [{"answer": ANSWERS[i % 6], "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    return {
        "question_type": "what",
        "multiple_choice_answer": ANSWERS[i % 6],
        "answers": answers,
        "image_id": i // 2,
        "answer_type": "other",
        "question_id": i,
        "question": f"What is thing {i}?",
        "image": picture(i // 2),
    }


def _mmbench(i: int) -> dict[str, Any]:
    return {
        "index": i,
        "question": f"Which letter is number {i}?",
        "hint": "nan",
        "answer": LETTERS[i % 4],
        **{letter: f"choice {letter}" for letter in LETTERS},
        "category": "identity_reasoning",
        "image": picture(i),
        "source": "made up",
        "L2-category": "attribute_reasoning",
        "comment": "nan",
        "split": "dev",
    }


def _seedbench(i: int) -> dict[str, Any]:
    return {
        "answer": LETTERS[i % 4],
        **{f"choice_{letter.lower()}": f"choice {letter}" for letter in LETTERS},
        "data_id": str(i),
        "data_type": "image",
        "question": f"Which of these is in picture {i}?",
        "question_id": str(i),
        "question_type_id": 1,
        "image": [picture(i)] if i % 4 else [picture(i), picture(i + 1)],
        "segment": [],
    }


def _chartqa(i: int) -> dict[str, Any]:
    kind = ("human_test", "augmented_test")[i % 2]
    return {"type": kind, "question": f"How high is bar {i}?", "answer": "12", "image": picture(i)}


def _docvqa(i: int) -> dict[str, Any]:
    return {
        "questionId": str(i),
        "question": f"What is the total of line {i}?",
        "question_types": ["form"],
        "image": picture(i // 2, (28, 40)),
        "docId": i // 2,
        "answers": ["12", "twelve"],
        "data_split": "val",
    }


def _ai2d(i: int) -> dict[str, Any]:
    return {
        "question": f"What is part {i}?",
        "options": [f"part {letter}" for letter in LETTERS],
        "answer": str(i % 4),
        "image": picture(i),
    }


def _mmstar(i: int) -> dict[str, Any]:
    return {
        "index": i,
        "question": f"Which is thing {i}?\nOptions: A: one, B: two, C: three, D: four",
        "image": picture(i),
        "answer": LETTERS[i % 4],
        "category": "math",
        "l2_category": "geometry",
        "meta_info": {"source": "made up", "split": "val", "image_path": f"{i}.jpg"},
    }


def _realworldqa(i: int) -> dict[str, Any]:
    return {"image": picture(i), "question": f"Where is car {i}? A. here B. there C. away D. near", "answer": "A"}


def _vizwiz(i: int) -> dict[str, Any]:
    return {
        "question_id": f"VizWiz_val_{i:08d}.jpg",
        "image": picture(i),
        "question": f"what is this number {i}",
        "answers": ["red"] * 10,
        "category": "other",
    }


# task: YAML inside lmms_eval/tasks, split, document
TASKS: dict[str, tuple[str, str, Callable[[int], dict[str, Any]]]] = {
    "mme": ("mme/mme.yaml", "test", _mme),
    "pope": ("pope/pope.yaml", "test", _pope),
    "gqa": ("gqa/gqa.yaml", "testdev", _gqa),
    "scienceqa_img": ("scienceqa/scienceqa_img.yaml", "test", _scienceqa),
    "textvqa_val": ("textvqa/textvqa_val.yaml", "validation", _textvqa),
    "vqav2_val": ("vqav2/vqav2_val.yaml", "validation", _vqav2),
    "mmbench_en_dev_static": ("mmbench/mmbench_en_dev_static.yaml", "dev", _mmbench),
    "seedbench": ("seedbench/seedbench.yaml", "test", _seedbench),
    "seedbench_ppl": ("seedbench/seedbench_ppl.yaml", "test", _seedbench),
    "chartqa": ("chartqa/chartqa.yaml", "test", _chartqa),
    "docvqa_val": ("docvqa/docvqa_val.yaml", "validation", _docvqa),
    "ai2d": ("ai2d/ai2d.yaml", "test", _ai2d),
    "mmstar": ("mmstar/mmstar.yaml", "val", _mmstar),
    "realworldqa": ("realworldqa/realworldqa.yaml", "test", _realworldqa),
    "vizwiz_vqa_val": ("vizwiz_vqa/vizwiz_vqa_val.yaml", "val", _vizwiz),
}


def write_tasks(folder: Path, names: list[str] | tuple[str, ...] = tuple(TASKS), count: int = 8) -> Path:
    """Write data and task files of `count` documents each.

    Returns:
        The folder for `task_dirs`.
    """
    for name in names:
        document = TASKS[name][2]
        rows = [document(i) for i in range(count)]
        if name == "gqa":  # its own process_docs goes to the Hub for the pictures: give them with the questions
            rows = [row | {"image": picture(int(row["imageId"][1:]))} for row in rows]
        tasks = write_task(folder, name, rows)
    return tasks


def write_task(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write the data and the file of one task.

    Returns:
        The folder for `task_dirs`.
    """
    package = find_spec("lmms_eval")
    assert package is not None and package.submodule_search_locations
    builtin = Path(package.submodule_search_locations[0]) / "tasks"
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    source, split, _ = TASKS[name]
    on_documents(tasks, name, str(builtin / source), split, with_image_features(rows))
    return tasks


def on_documents(tasks: Path, name: str, source: str, split: str, documents: datasets.Dataset) -> None:
    """lmms-eval's own task on other documents, which lie beside its folder.

    Args:
        tasks: Where its YAML goes.
        name: The task's.
        source: lmms-eval's YAML.
        split: That it evaluates.
        documents: In the columns of the real ones.
    """
    from lmms_eval.utils import load_yaml_config  # takes long; some want a picture alone

    data = tasks.parent / f"{name}.parquet"
    documents.to_parquet(data)
    task: dict[str, Any] = {
        "include": source,
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}},
    }
    if name == "gqa":  # its own process_docs goes to the Hub for the pictures
        task["process_docs"] = None
    asked = load_yaml_config(source, mode="simple").get("generation_kwargs") or {}
    if asked.get("max_new_tokens", 0) > LONGEST:  # no model of the tests ends an answer: each would have 128 or 1024
        task["generation_kwargs"] = asked | {"max_new_tokens": LONGEST}
    (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_own_task(folder: Path, name: str, documents: datasets.Dataset, visual: str) -> Path:
    """A task of one's own on documents with the columns question and answer, in a folder of its own.

    Args:
        folder: Made here.
        name: The task's.
        documents: Its test split.
        visual: Python expression of a document `row`, for its pictures or videos.

    Returns:
        The folder for `task_dirs`.
    """
    folder.mkdir(exist_ok=True)
    documents.to_parquet(str(folder / "rows.parquet"))
    (folder / f"{name}.py").write_text(f"def visual(row):\n    return {visual}\n")
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({
            "task": name, "dataset_path": "parquet", "test_split": "test", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.parquet")}},
            "doc_to_text": "question", "doc_to_target": "answer",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }) + f"doc_to_visual: !function {name}.visual\n"
    )  # fmt: skip
    return folder


def with_image_features(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """A dataset whose picture columns (one picture or a list of them) have the type that real datasets give them."""
    plain = datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "image"} for row in rows])
    several = isinstance(rows[0]["image"], list)
    image = datasets.List(datasets.Image()) if several else datasets.Image()
    return datasets.Dataset.from_list(rows, features=datasets.Features({**plain.features, "image": image}))
