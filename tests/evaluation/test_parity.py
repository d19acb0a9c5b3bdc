"""lmms-eval's own wrappers and `protocol=lmms_eval`, on one tiny checkpoint and the same documents: token ids, pixels,
generation arguments, output ids, answers and scores are equal, one by one, but for the exceptions that a test names.

pytest tests/evaluation/test_parity.py        (make parity)
"""

from __future__ import annotations

import base64
import importlib
import io
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from pdrop.cli.compose import settings
from pdrop.evaluation.lmms import evaluate, import_lmms_eval
from pdrop.models.checkpoint import load
from pdrop.samples import read_samples
from pdrop.schedule import Schedule
from tests.support.saved_checkpoints import (
    save_internvl,
    save_llava,
    save_llava_next,
    save_llava_onevision,
    save_qwen,
)
from tests.support.synthetic_sets import write_set
from tests.support.synthetic_tasks import picture, write_own_task

NEW = 12  # tokens that a random model is let answer
SIZES = ((40, 28), (28, 28), (90, 30), (20, 64))
LARGE = ((600, 400), (1500, 1200))  # beyond Qwen2-VL's largest, and beyond Qwen2.5-VL's
# tasks in their own words, some of them in words of their own for a wrapper; of ScienceQA some have no picture
TASKS = ("mme", "pope", "gqa", "textvqa_val", "mmbench_en_dev_static", "scienceqa_img", "mmstar", "ai2d", "chartqa")


@dataclass(frozen=True)
class Family:
    """How a tiny checkpoint is saved, and the model of lmms-eval that stands beside it.

    Attributes:
        save: Saves it.
        place: Of the class in lmms_eval.models; its module's name is the one that tasks know it by.
        dtype: What the class computes in.
        given: What it is made with, besides the checkpoint.
        several: Whether it is asked about several pictures in the same way.
    """

    save: Callable[[Path], Path]
    place: str
    dtype: str
    given: Mapping[str, Any]
    several: bool = True

    @property
    def wrapper(self) -> str:
        return self.place.split(".")[1]

    def make(self, folder: Path) -> Any:
        module, _, name = self.place.rpartition(".")
        kind = getattr(importlib.import_module(f"lmms_eval.models.{module}"), name)
        return kind(**{"pretrained": str(folder), "device": "cpu", "device_map": "cpu", **self.given})


HF = {"dtype": "float32"}
CHAT = "chat.llava_hf.LlavaHf"
FAMILIES = {
    "llava": Family(partial(save_llava, positions=4096), CHAT, "float32", HF),
    "llava_next": Family(save_llava_next, CHAT, "float32", HF),
    # several pictures: the wrapper's processor cuts each into tiles, which the model was not trained on
    "llava_onevision": Family(save_llava_onevision, CHAT, "float32", HF, several=False),
    "qwen2_vl": Family(partial(save_qwen, family="Qwen2VL", patch=14), "simple.qwen2_vl.Qwen2_VL", "float32", {}),
    "qwen2_5_vl": Family(
        partial(save_qwen, family="Qwen2_5_VL", patch=14), "chat.qwen2_5_vl.Qwen2_5_VL", "bfloat16", {}
    ),
    "qwen3_vl": Family(partial(save_qwen, family="Qwen3VL", patch=16), "chat.qwen3_vl.Qwen3_VL", "bfloat16", {}),
    "internvl": Family(save_internvl, "chat.internvl_hf.InternVLHf", "bfloat16", {}),
}
IN_CI = ("llava", "qwen2_5_vl")
each_family = pytest.mark.parametrize(
    "family", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]
)
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that wrappers import for videos, which are not asked about here."""
    stand_in = types.ModuleType("decord")
    stand_in.VideoReader = stand_in.cpu = None  # type: ignore[attr-defined]
    if "decord" not in sys.modules:
        monkeypatch.setitem(sys.modules, "decord", stand_in)


@dataclass
class Side:
    """What one of the two asked and got.

    Attributes:
        calls: Of `generate`: its tensors, its arguments, and the new tokens; by their prompts.
        answers: By task and document.
        scores: By task and metric.
    """

    calls: list[dict[str, Any]]
    answers: dict[tuple[str, int], str]
    scores: dict[tuple[str, str], float]


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a model's `generate` is given and gives, call by call."""
    seen: list[dict[str, Any]] = []
    real = model.generate

    def generate(**given: Any) -> Any:
        out = real(**given | {"max_new_tokens": min(NEW, given["max_new_tokens"])})
        tensors = {name: value.cpu() for name, value in given.items() if isinstance(value, torch.Tensor)}
        new = out[:, tensors["input_ids"].shape[1] :]
        seen.append({**tensors, "new": new.cpu(), "arguments": meant(given, model)})
        return out

    monkeypatch.setattr(model, "generate", generate)
    return seen


def meant(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Generation arguments with what they leave to the checkpoint, or to transformers."""
    config = model.generation_config
    names = ("max_new_tokens", "num_beams", "do_sample", "eos_token_id", "repetition_penalty", "no_repeat_ngram_size")
    found = {name: getattr(config, name) if given.get(name) is None else given[name] for name in names}
    found |= {"num_beams": found["num_beams"] or 1, "do_sample": bool(found["do_sample"])}
    drawn = ("temperature", "top_p", "top_k") if found["do_sample"] else ()
    return found | {name: given.get(name) for name in drawn}


def in_order(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls by their prompts: each side asks in an order of its own."""
    return sorted(calls, key=lambda call: call["input_ids"].tolist())


def theirs(
    family: Family,
    folder: Path,
    tasks: Path,
    names: Sequence[str],
    patch: pytest.MonkeyPatch,
    at: Path,
    as_shipped: bool = False,
) -> Side:
    """lmms-eval's wrapper on tasks; unless as it is shipped, Qwen2-VL's without loss of its pictures."""
    evaluator, model = import_lmms_eval(), family.make(folder)
    if family.wrapper == "qwen2_vl" and not as_shipped:
        patch.setattr(model, "_encode_image_data_url", unharmed)
    calls, found = watched(model.model, patch), Side([], {}, {})
    model.clean = lambda: None  # it would be deleted after the first task
    for name in names:
        manager = evaluator.TaskManager(include_defaults=False, include_path=[str(tasks)], model_name=family.wrapper)
        task = evaluator.get_task_dict([name], manager, "simple" if model.is_simple else "chat")
        output = evaluator.simple_evaluate(
            model=model,
            tasks=list(task.values()),
            task_manager=object(),
            bootstrap_iters=0,
            log_samples=True,
            cli_args=types.SimpleNamespace(
                process_with_media=False, reasoning_tags=None, output_path=str(at), agentic_trace_mode="basic"
            ),
            verbosity="WARNING",
        )
        found.answers |= {(name, one["doc_id"]): one["filtered_resps"][0] for one in output["samples"][name]}
        scores = {key.partition(",")[0]: value for key, value in output["results"][name].items() if "stderr" not in key}
        found.scores |= {(name, key): value for key, value in scores.items() if isinstance(value, float)}
    found.calls = in_order(calls)
    return found


def ours(family: Family, folder: Path, tasks: Path, names: Sequence[str], patch: pytest.MonkeyPatch, at: Path) -> Side:
    """`protocol=lmms_eval` on the same."""
    checkpoint = load(str(folder), name="tiny", dtype=family.dtype)  # type: ignore[arg-type]
    calls = watched(checkpoint.model, patch)
    dials = {"model": "folder", "model.name": "tiny", "model.path": str(folder), "protocol": "lmms_eval"}
    dials |= {"tasks": list(names), "task_folders": [str(tasks)], "latency": "off", "method": "none", "device": "cpu"}
    made = settings({**dials, "dtype": family.dtype})
    assert made.spec.wrapper == family.wrapper and not made.turned
    found = evaluate(checkpoint, None, Schedule(), made.spec, at, task_dirs=[tasks])
    return Side(
        in_order(calls),
        {(name, one["doc_id"]): one["answer"] for name in names for one in read_samples(at, name)},
        {(name, key): score.value for name in names for key, score in found.results[name].scores.items()},
    )


def both(name: str, tasks: Path, names: Sequence[str], patch: pytest.MonkeyPatch, at: Path) -> tuple[Side, Side]:
    family = FAMILIES[name]
    folder = family.save(at / name)
    return (
        theirs(family, folder, tasks, names, patch, at),
        ours(family, folder, tasks, names, patch, at / "run"),
    )


def held(one: Side, other: Side, exact: bool = True) -> None:
    """Hold two sides against each other.

    Args:
        one: lmms-eval's.
        other: Ours.
        exact: Whether pixels are equal to the bit, or to a rounding of the last digit.
    """
    assert len(one.calls) == len(other.calls) > 0
    for mine, yours in zip(other.calls, one.calls, strict=True):
        assert mine["arguments"] == yours["arguments"]
        assert set(mine) == set(yours), "the same tensors"
        for tensor in sorted(set(mine) - {"arguments"}):
            given = yours[tensor].to(mine[tensor].dtype)
            if exact or tensor != "pixel_values":
                assert torch.equal(given, mine[tensor]), tensor
            else:
                torch.testing.assert_close(given, mine[tensor], atol=1e-6, rtol=0)
    assert one.answers == other.answers
    shared = one.scores.keys() & other.scores.keys()
    assert {task for task, _ in shared} == {task for task, _ in one.answers}
    ahead = ("pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")  # lmms-eval's are mistaken
    for task, metric in shared:
        if metric not in ahead:
            assert one.scores[task, metric] == pytest.approx(other.scores[task, metric], abs=1e-9), (task, metric)


def own_task(
    folder: Path, sizes: Sequence[tuple[int, int]] = SIZES, pictures: int = 1, question: str = "What is number {}?"
) -> Path:
    """Pictures of several sizes; no length is set, and the right answer is a word."""
    rows = [
        {
            "pictures": [picture(n + extra, size) for extra in range(pictures)],
            "question": question.format(n),
            "answer": "yes",
        }
        for n, size in enumerate(sizes)
    ]
    shown = datasets.List(datasets.Image())
    words = dict.fromkeys(("question", "answer"), datasets.Value("string"))
    documents = datasets.Dataset.from_list(rows, features=datasets.Features({"pictures": shown, **words}))
    return write_own_task(folder, "looking", documents, "[one.convert('RGB') for one in row['pictures']]")


def unharmed(image: Any) -> str:
    """A picture as the wrapper hands it on, but without loss: an exception of its own test."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def exactly(family: str) -> bool:
    """Whether pixels are equal to the bit: Qwen2-VL's are normalised by torchvision there, and by NumPy here."""
    return family != "qwen2_vl"


@each_family
def test_lmms_evals_own_wrapper_asks_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = own_task(tmp_path / "tasks")
    one, other = both(family, tasks, ["looking"], monkeypatch, tmp_path)
    held(one, other, exactly(family))
    assert len(one.calls) == len(SIZES)


@every_family
@pytest.mark.exhaustive
def test_the_benchmarks_own_words_and_scores(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [task for task in TASKS if task != "scienceqa_img" or FAMILIES[family].wrapper != "llava_hf"]
    tasks = write_set(tmp_path, names, count=4)
    one, other = both(family, tasks, names, monkeypatch, tmp_path)
    if family == "qwen2_vl":  # its class takes the blanks at an answer's ends away, as tasks do themselves
        other.answers = {place: text.strip() for place, text in other.answers.items()}
    held(one, other, exactly(family))
    assert len(one.answers) == 4 * len(names)


@pytest.mark.parametrize("family", [name for name, one in FAMILIES.items() if one.several])
@pytest.mark.exhaustive
def test_several_pictures(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = both(family, own_task(tmp_path / "tasks", pictures=2), ["looking"], monkeypatch, tmp_path)
    held(one, other, exactly(family))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.exhaustive
def test_large_pictures(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the limits bind: Qwen2.5-VL's are resized twice, by Pillow and then by the processor."""
    one, other = both(family, own_task(tmp_path / "tasks", LARGE), ["looking"], monkeypatch, tmp_path)
    held(one, other, exactly(family))


# ---------------------------------------------------------------------------------------------------------- exceptions


@pytest.mark.exhaustive
def test_qwen2_vls_wrapper_saves_each_picture_as_a_jpeg_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels are another picture's: not copied. All else is equal, and with pictures saved without loss so are
    pixels (above)."""
    family, tasks = FAMILIES["qwen2_vl"], own_task(tmp_path / "tasks")
    folder = family.save(tmp_path / "qwen2_vl")
    one = theirs(family, folder, tasks, ["looking"], monkeypatch, tmp_path, as_shipped=True)
    other = ours(family, folder, tasks, ["looking"], monkeypatch, tmp_path / "run")
    far = 0.0
    for mine, yours in zip(other.calls, one.calls, strict=True):
        for tensor in ("input_ids", "image_grid_thw"):
            assert torch.equal(mine[tensor], yours[tensor])
        assert mine["arguments"] == yours["arguments"]
        far = max(far, float((mine["pixel_values"] - yours["pixel_values"]).abs().max()))
    assert far > 0.1, "of a standard deviation"


@pytest.mark.exhaustive
def test_onevisions_several_pictures_are_cut_into_tiles_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model was trained on one tile of each (LLaVA-NeXT's docs/LLaVA_OneVision.md): not copied."""
    one, other = both("llava_onevision", own_task(tmp_path / "tasks", pictures=2), ["looking"], monkeypatch, tmp_path)
    lengths = [[call["input_ids"].shape[1] for call in side.calls] for side in (one, other)]
    assert all(theirs > ours for theirs, ours in zip(*map(sorted, lengths), strict=True))
    crops = [call["pixel_values"].shape[:2].numel() for call in other.calls]
    assert crops == [2] * len(SIZES), "one of each picture"


@pytest.mark.exhaustive
def test_marks_of_pictures_stay_words_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures stand at their marks here; LLaVA's wrapper takes the words for more pictures, and fails."""
    marked = own_task(tmp_path / "tasks", pictures=2, question="Is <image> {} like <image>?")
    words, said = [], FAMILIES["qwen3_vl"].save(tmp_path / "qwen3_vl")
    for side in both("qwen3_vl", marked, ["looking"], monkeypatch, tmp_path):
        tokenizer = load(str(said), name="tiny").processor.tokenizer
        words.append(tokenizer.decode(side.calls[0]["input_ids"][0].tolist()).replace("<|image_pad|>", ""))
    pictures = re.escape("<|vision_start|><|vision_end|>")
    assert re.search(rf"{pictures}{pictures}Is <image> \d like <image>\?", words[0])
    assert re.search(rf"\nIs {pictures} \d like {pictures}\?", words[1])
    with pytest.raises((IndexError, ValueError)):
        theirs(
            FAMILIES["llava"], FAMILIES["llava"].save(tmp_path / "llava"), marked, ["looking"], monkeypatch, tmp_path
        )


@pytest.mark.parametrize(
    ("family", "fails"),
    [("llava", True), ("llava_next", True), ("qwen2_5_vl", False), ("qwen3_vl", False), ("internvl", False)],
)
@pytest.mark.exhaustive
def test_llava_hf_fails_without_a_picture(
    family: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = own_task(tmp_path / "tasks", pictures=0)
    if not fails:
        held(*both(family, tasks, ["looking"], monkeypatch, tmp_path))
        return
    folder = FAMILIES[family].save(tmp_path / family)
    with pytest.raises((IndexError, ValueError)):
        theirs(FAMILIES[family], folder, tasks, ["looking"], monkeypatch, tmp_path)
    assert ours(FAMILIES[family], folder, tasks, ["looking"], monkeypatch, tmp_path / "run").answers
