"""Every task of the sets in conf/task_sets/ on a few made-up documents in the real columns: no network, no model.

    folder = write_set(tmp_path, "video")
    scored(tmp_path / "run", members("video"), folder)

Each task is lmms-eval's own YAML, or ours, with another `dataset_path`. Videos lie where lmms-eval looks for them:
below HF_HOME, which a test sets to `tmp_path` before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image

from pdrop.cli.compose import CONF
from pdrop.evaluation import task_index
from pdrop.evaluation.generation_arguments import read_config
from tests.support.films import write_film
from tests.support.synthetic_tasks import LETTERS, TASKS, on_documents, picture

SIZE = (64, 48)  # of RefCOCO's pictures
Row = dict[str, Any]


def _ocrbench(i: int) -> Row:
    kinds = ("Regular Text Recognition", "Scene Text-centric VQA", "Handwritten Mathematical Expression Recognition")
    dataset = ("IIIT5K", "STVQA", "HME100k")[i % 3]
    return {"dataset": dataset, "question": "What is written?", "question_type": kinds[i % 3], "answer": ["12", "red"],
            "image": picture(i)}  # fmt: skip


def _mmmu(i: int) -> Row:
    images = {f"image_{n}": picture(i + n) if n < 3 else None for n in range(1, 8)}
    open_ended = i % 4 == 3
    options = [] if open_ended else ["one <image 2>", "two", "three", "four"]
    return images | {
        "id": f"validation_{('Math', 'Art')[i % 2]}_{i}",
        "question": f"What is <image 1> of {i}?",
        "options": str(options),
        "question_type": "open" if open_ended else "multiple-choice",
        "answer": "12" if open_ended else LETTERS[i % 4],
        "explanation": "", "topic_difficulty": "Easy", "img_type": "['Chart']", "subfield": "Algebra",
    }  # fmt: skip


def _muirbench(i: int) -> Row:
    return {
        "idx": str(i), "task": ("Counting", "Ordering")[i % 2], "image_relation": "Ordered", "image_type": "Photo",
        "question": f"Which one of <image> and <image> is number {i}?", "options": [f"the {n}" for n in LETTERS],
        "answer": LETTERS[i % 4], "image_list": [picture(i), picture(i + 1)], "counterpart_idx": "",
    }  # fmt: skip


def _blink(i: int) -> Row:
    images = {f"image_{n}": picture(i + n) if n < 3 else None for n in range(1, 5)}
    return images | {
        "idx": f"val_{i}", "question": f"Which is nearer in {i}?", "sub_task": "Counting", "choices": ["left", "right"],
        "answer": f"({LETTERS[i % 2]})", "prompt": f"Which is nearer in {i}?\n(A) left\n(B) right", "explanation": "",
    }  # fmt: skip


def _videomme(i: int) -> Row:
    return {
        "video_id": f"{i:03d}", "duration": ("short", "medium")[i % 2], "domain": "Knowledge",
        "sub_category": ("Astronomy", "Law")[i % 2], "url": "", "videoID": "film", "question_id": f"{i:03d}-1",
        "task_type": "Counting Problem", "question": f"How many of {i}?", "answer": LETTERS[i % 4],
        "options": [f"{letter}. {n}" for n, letter in enumerate(LETTERS)],
    }  # fmt: skip


def _mvbench(i: int) -> Row:
    candidates = [f"thing {letter}" for letter in LETTERS]
    return {
        "video": "film.mp4",
        "question": f"What moves in {i}?",
        "candidates": candidates,
        "answer": candidates[i % 4],
    }


def _mlvu(i: int) -> Row:
    kinds = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
    options = "\n".join(f"({letter}) {n}" for n, letter in enumerate(LETTERS))
    return {"video_name": "film.mp4", "duration": "4", "question": f"What of {i}?\n{options}", "answer": LETTERS[i % 4],
            "task_type": kinds[i % 7]}  # fmt: skip


def _egoschema(i: int) -> Row:
    return {"question_idx": str(i), "question": f"Why {i}?", "video_idx": "film", "answer": str(i % 5),
            "option": [f"{letter}. because {letter}" for letter in "ABCDE"]}  # fmt: skip


def _textvqa_ocr(i: int) -> Row:
    return TASKS["textvqa_val"][2](i)


def _mmbench_cn(i: int) -> Row:
    """Rotation i % 4 of question i // 4, whose options move with it."""
    turn, question = i % 4, i // 4
    letters = LETTERS[turn:] + LETTERS[:turn]
    row = TASKS["mmbench_en_dev_static"][2](question)
    return row | {
        "index": question + turn * 10**6,
        "answer": letters[question % 4],
        "hint": ("nan", "提示")[question % 2],
    }


def _refcoco(i: int) -> Row:
    """Two objects a picture, two sentences an object."""
    return {
        "question_id": str(i), "image": picture(i // 2, SIZE), "question": "", "iscrowd": 0, "segmentation": [0.0],
        "answer": [f"thing {i}", f"the other {i}"], "bbox": [8.0, 6.0, 16.0 + 8 * (i % 3), 24.0],
        "file_name": f"COCO_train2014_{i // 2:012d}_{i}.jpg",
    }  # fmt: skip


def _naturalbench(i: int) -> Row:
    """Row i % 4 of group i // 4: two questions, each about two pictures."""
    words = ("No", "Yes") if i // 4 % 2 else ("B", "A")
    return {
        "Index": i, "Image": picture(i // 4 * 2 + i % 2), "Question": f"Is it {i // 2}?", "Source": "",
        "Answer": words[i % 4 in (0, 3)], "Question_Type": ("multiple_choice", "yes_no")[i // 4 % 2],
    }  # fmt: skip


# by the beginning of a task's name, the longest that fits
ROWS: dict[str, Callable[[int], Row]] = {name: made for name, (_, _, made) in TASKS.items()} | {
    "infovqa_val": TASKS["docvqa_val"][2], "ocrbench": _ocrbench, "mmmu_val": _mmmu, "muirbench": _muirbench,
    "blink_": _blink, "videomme": _videomme, "mvbench_": _mvbench, "mlvu_dev": _mlvu, "egoschema_subset": _egoschema,
    "textvqa_val_ocr": _textvqa_ocr, "mmbench_cn_dev_static": _mmbench_cn, "refcoco": _refcoco,
    "naturalbench": _naturalbench,
}  # fmt: skip
FILMS = ("videomme/data", "mlvu", "egoschema/videos")


def members(name: str) -> list[str]:
    """The names that a set lists."""
    return list(yaml.safe_load((CONF / "task_sets" / f"{name}.yaml").read_text())["tasks"])


def write_set(folder: Path, names: list[str], count: int = 8) -> Path:
    """Write data and task files of these names, groups with all their members.

    Returns:
        The folder for `task_dirs`.
    """
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for name, paths in task_index.find(names).items():
        found = [str(path) for path in paths]
        configs = {path: read_config(Path(path)) for path in found}
        alone = {path: config for path, config in configs.items() if isinstance(config.get("task"), str)}
        for path, config in alone.items():
            write_member(tasks, config, path, count)
        if len(alone) < len(configs):  # a group's file of its own: its members are these
            listed = {"group": name, "task": [config["task"] for config in alone.values()]}
            (tasks / f"{name}.yaml").write_text(yaml.safe_dump(listed))
    return tasks


def write_member(tasks: Path, config: Row, path: str, count: int) -> None:
    """One task of a set."""
    name, split = config["task"], config.get("test_split") or config["validation_split"]
    row = ROWS[max((start for start in ROWS if name.startswith(start)), key=len)]
    rows = [row(i) for i in range(count)]
    if name == "gqa":  # its own process_docs goes to the Hub for the pictures: give them with the questions
        rows = [one | {"image": picture(int(one["imageId"][1:]))} for one in rows]
    on_documents(tasks, name, path, split, typed(rows))


def typed(rows: list[Row]) -> datasets.Dataset:
    """A dataset whose columns of pictures, or of lists of pictures, have the type that real datasets give them."""
    features: dict[str, Any] = {}
    for column in rows[0]:
        found = next((one[column] for one in rows if one[column] is not None), None)
        if isinstance(found, Image.Image) or (found is None and column.startswith("image_")):
            features[column] = datasets.Image()
        elif isinstance(found, list) and found and isinstance(found[0], Image.Image):
            features[column] = datasets.List(datasets.Image())
    plain = datasets.Dataset.from_list([{k: v for k, v in one.items() if k not in features} for one in rows])
    return datasets.Dataset.from_list(rows, features=datasets.Features({**plain.features, **features}))


def write_films(home: Path) -> None:
    """One film of 16 frames in every folder where a video task looks for it; for one task, its frames as pictures."""
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    film = write_film(home / "film.mp4", 16, rate=4)
    for place in (*FILMS, *(f"mvbench_video/{folder}" for folder in DATA_LIST.values())):
        there = home / place
        there.mkdir(parents=True, exist_ok=True)
        if "tvqa" in place:
            (there / "film.mp4").mkdir(exist_ok=True)
            for number in range(12):
                picture(number).save(there / "film.mp4" / f"{number}.png")
        elif not (there / "film.mp4").exists():
            (there / "film.mp4").write_bytes(film.read_bytes())
