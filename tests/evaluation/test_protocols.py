"""What a protocol sets, by family; and lmms-eval's own wrapper and `protocol=lmms_eval` ask the same, to the bit."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from pdrop.cli.compose import CONF, settings
from pdrop.evaluation.lmms import evaluate, import_lmms_eval
from pdrop.evaluation.prompts import PromptBuilder, first_marks
from pdrop.evaluation.protocols import FamilySettings, of_family
from pdrop.models.checkpoint import load
from pdrop.record import RunRecord, RunSpec
from pdrop.samples import read_samples
from pdrop.schedule import Schedule
from tests.support.saved_checkpoints import (
    save_internvl,
    save_llava,
    save_llava_next,
    save_llava_onevision,
    save_qwen2_5_vl,
)
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture

PROTOCOLS = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "protocol").glob("*.yaml")}
PLAIN = {"tasks": [], "latency": "off", "device": "cpu"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_family_of_every_protocol_can_be_read(name: str) -> None:
    for family in PROTOCOLS[name]:
        kind, _, text = family.partition("/")
        assert isinstance(of_family(name, PROTOCOLS[name], kind, text), FamilySettings)


def test_a_model_is_asked_as_its_published_numbers_were_made_unless_a_dial_says_otherwise() -> None:
    def spec(model: str, **dials: Any) -> RunSpec:
        return settings({**PLAIN, "model": model, **dials}).spec

    llava = spec("llava_1_5_7b")
    assert (llava.protocol, llava.prompt, llava.image_mode) == ("official", "vicuna_v1", "pad")
    assert [llava.answer_tokens(task) for task in ("pope", "mmbench_en_dev", "scienceqa_img")] == [128, 1024, 1024]
    assert spec("llava_next_7b").prompt == "vicuna_v1" and spec("llava_onevision_7b").prompt == "qwen_1_5"
    internvl = spec("internvl3_8b")
    assert internvl.max_tiles == 6 and "书生·万象" in str(internvl.system) and internvl.answer_tokens("gqa") == 10
    assert [spec("qwen2_5_vl_7b", protocol=name).min_pixels for name in ("official", "lmms_eval", "checkpoint")] == [
        1003520,
        200704,
        None,
    ]
    assert spec("embedded").protocol == "checkpoint" and spec("embedded").max_new_tokens == 16
    turned = spec("llava_1_5_7b", max_new_tokens=64, **{"model.image_mode": "crop"})
    assert (turned.prompt, turned.image_mode) == ("vicuna_v1", "crop")
    made = settings({**PLAIN, "model": "llava_1_5_7b", "max_new_tokens": 128, "model.image_mode": "crop"})
    assert made.turned == ("image_mode",), "what is set as it would be anyway is not turned"
    assert turned.answer_tokens("mmbench_en_dev") == turned.answer_tokens("pope") == 64, "who says it means all tasks"
    assert len({spec("llava_1_5_7b", protocol=name).run_id for name in PROTOCOLS}) == 3


def test_a_family_that_a_protocol_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = save_llava_next(tmp_path / "next")
    dials = {"model": "folder", "model.name": "mine", "model.path": str(folder), "protocol": "lmms_eval"}
    assert settings({**PLAIN, **dials}).spec.wrapper == "llava_hf"
    with pytest.raises(
        ValueError, match=r"protocol=official says nothing of fuyu with persimmon .*protocol=checkpoint"
    ):
        of_family("official", PROTOCOLS["official"], "fuyu", "persimmon")


@pytest.mark.parametrize(
    ("dials", "told"),
    [
        ({"max_pixels": 100}, "max_pixels=100: leave it out for models of llava, whose pictures, or tiles of them"),
        ({"max_tiles": 3}, "max_tiles=3: leave it out for models of llava, whose processor has no limit of tiles"),
        ({"model": "qwen2_5_vl_7b", "min_pixels": 900, "max_pixels": 100}, "min_pixels=900 is more than max_pixels"),
        ({"wrapper": "llava_hff"}, "wrapper=llava_hff is no model of lmms-eval, did you mean llava_hf?"),
    ],
)
def test_limits_and_wrappers_that_are_not_are_refused_before_loading(dials: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("?", r"\?")):
        settings({**PLAIN, "model": "llava_1_5_7b", **dials})


def test_what_was_sampled_when_it_was_published_is_said() -> None:
    made = settings({**PLAIN, "model": "qwen3_vl_8b"})
    assert "temperature 0.7" in str(made.published_sampling)
    assert settings({**PLAIN, "model": "qwen2_5_vl_7b"}).published_sampling is None


def test_older_records_keep_their_identity_and_read_as_the_checkpoints_protocol() -> None:
    from tests.contracts.test_record import record

    kept = record()
    older = json.loads(kept.to_json())
    del older["checksum"]
    for name in ("protocol", "system", "image_backend", "min_pixels", "max_pixels", "max_tiles", "wrapper", "lengths"):
        del older["spec"][name]
    read = RunRecord.from_json(json.dumps(older))
    assert read.run_id == kept.run_id and read.spec.protocol == "checkpoint"


def test_pixels_of_a_picture_are_those_that_are_asked_for(tmp_path: Path) -> None:
    checkpoint = load(str(save_qwen2_5_vl(tmp_path / "qwen")), name="tiny")

    def tokens(**limits: Any) -> int:
        builder = PromptBuilder.of(checkpoint, spec_of(**limits))
        ids = builder.encode([builder.render("What?", 1)], [[picture(1)]])["input_ids"]
        return int((ids == checkpoint.model.config.image_token_id).sum())

    plain = tokens()
    assert tokens(max_pixels=320) < plain < tokens(min_pixels=4000)
    assert tokens() == plain, "the checkpoint's own processor is as it was"
    with pytest.raises(ValueError, match=r"min_pixels=900 is more than max_pixels=100"):
        tokens(min_pixels=900, max_pixels=100)
    with pytest.raises(ValueError, match="no limit of tiles to set"):
        tokens(max_tiles=3)


def test_styles_and_system_messages(tmp_path: Path) -> None:
    checkpoint = load(str(save_llava(tmp_path / "llava")), name="tiny")
    qwen = PromptBuilder.of(checkpoint, spec_of(prompt="qwen_1_5")).render("What?", 1)
    assert qwen == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert PromptBuilder.of(checkpoint, spec_of(system="Be brief.")).render("What?", 0).startswith("USER: Be brief.")
    with pytest.raises(ValueError, match="scales every picture to the same size"):
        PromptBuilder.of(checkpoint, spec_of(max_pixels=100))


def test_numbered_marks_place_pictures() -> None:
    text = "Compare <image 1> with <image 2>. Is <image 1> red?"
    assert first_marks(text, 2) == "Compare <image> with <image>. Is <image 1> red?"
    assert first_marks(text, 1) == text and first_marks("no marks", 1) == "no marks"


# ------------------------------------------------------------------------------------------------ parity with lmms-eval


def wrapper(place: str, **more: Any) -> Callable[[Path], Any]:
    """Makes a model of lmms-eval's own, by its class's place in lmms_eval.models."""

    def make(folder: Path) -> Any:
        module, _, name = place.rpartition(".")
        kind = getattr(importlib.import_module(f"lmms_eval.models.{module}"), name)
        return kind(pretrained=str(folder), device="cpu", device_map="cpu", **more)

    return make


LLAVA_HF = wrapper("chat.llava_hf.LlavaHf", dtype="float32")
# how a tiny checkpoint is saved, lmms-eval's model, the name tasks know it by, what it computes in
FAMILIES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], str, str]] = {
    "llava": (save_llava, LLAVA_HF, "llava_hf", "float32"),
    "llava_next": (save_llava_next, LLAVA_HF, "llava_hf", "float32"),
    "llava_onevision": (save_llava_onevision, LLAVA_HF, "llava_hf", "float32"),
    "internvl": (save_internvl, wrapper("chat.internvl_hf.InternVLHf"), "internvl_hf", "bfloat16"),
}


@pytest.fixture
def without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that wrappers import for videos, which are not asked about here."""
    stand_in = types.ModuleType("decord")
    stand_in.VideoReader = stand_in.cpu = None  # type: ignore[attr-defined]
    if "decord" not in sys.modules:
        monkeypatch.setitem(sys.modules, "decord", stand_in)


def watched(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a model's `generate` is given and gives, call by call."""
    seen: list[dict[str, Any]] = []
    real = model.generate

    def generate(**given: Any) -> Any:
        out = real(**given | {"max_new_tokens": min(12, given["max_new_tokens"])})
        tensors = {name: value.cpu() for name, value in given.items() if isinstance(value, torch.Tensor)}
        new = out[:, tensors["input_ids"].shape[1] :]
        seen.append({**tensors, "new": new.cpu(), "max_new_tokens": given["max_new_tokens"]})
        return out

    monkeypatch.setattr(model, "generate", generate)
    return seen


def in_order(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls by their prompts: each side asks in an order of its own."""
    return sorted(calls, key=lambda call: call["input_ids"].tolist())


def own_task(folder: Path) -> Path:
    """Pictures of several sizes; no length is set, and the right answer is a word."""
    folder.mkdir()
    rows = [
        {"picture": picture(n, size), "question": f"What is number {n}?", "answer": "yes"}
        for n, size in enumerate(SIZES)
    ]
    datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image()).to_parquet(str(folder / "rows.parquet"))
    (folder / "looking.py").write_text("def pictures(row):\n    return [row['picture'].convert('RGB')]\n")
    (folder / "looking.yaml").write_text(
        yaml.safe_dump({
            "task": "looking", "dataset_path": "parquet", "test_split": "test", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.parquet")}},
            "doc_to_text": "question", "doc_to_target": "answer",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }) + "doc_to_visual: !function looking.pictures\n"
    )  # fmt: skip
    return folder


SIZES = ((40, 28), (28, 28), (90, 30), (20, 64))


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("llava", "llava_next") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in FAMILIES
    ],
)
def test_lmms_evals_own_wrapper_asks_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_decord: None
) -> None:
    save, make, name, dtype = FAMILIES[family]
    folder, tasks = save(tmp_path / family), own_task(tmp_path / "tasks")
    evaluator = import_lmms_eval()
    theirs = make(folder)
    their_calls = watched(theirs.model, monkeypatch)
    manager = evaluator.TaskManager(include_defaults=False, include_path=[str(tasks)], model_name=name)
    task = evaluator.get_task_dict(["looking"], manager, "simple" if theirs.is_simple else "chat")
    output = evaluator.simple_evaluate(
        model=theirs,
        tasks=list(task.values()),
        task_manager=object(),
        bootstrap_iters=0,
        log_samples=True,
        cli_args=types.SimpleNamespace(
            process_with_media=False, reasoning_tags=None, output_path=str(tmp_path), agentic_trace_mode="basic"
        ),
        verbosity="WARNING",
    )
    checkpoint = load(str(folder), name="tiny", dtype=dtype)
    our_calls = watched(checkpoint.model, monkeypatch)
    dials = {"model": "folder", "model.name": "tiny", "model.path": str(folder), "protocol": "lmms_eval"}
    dials |= {"tasks": ["looking"], "task_folders": [str(tasks)], "latency": "off", "method": "none", "device": "cpu"}
    spec = settings({**dials, "dtype": dtype}).spec
    ours = evaluate(checkpoint, None, Schedule(), spec, tmp_path / "run", task_dirs=[tasks])
    assert len(their_calls) == len(our_calls) == len(SIZES)
    for one, other in zip(in_order(their_calls), in_order(our_calls), strict=True):
        assert one["max_new_tokens"] == other["max_new_tokens"] == spec.max_new_tokens
        for tensor in ("input_ids", "pixel_values", "new"):
            assert torch.equal(one[tensor].to(other[tensor].dtype), other[tensor]), tensor
    said = {sample["doc_id"]: sample["filtered_resps"][0] for sample in output["samples"]["looking"]}
    assert said == {sample["doc_id"]: sample["answer"] for sample in read_samples(tmp_path / "run", "looking")}
    theirs_scored = output["results"]["looking"]["exact_match,none"]
    assert theirs_scored == ours.results["looking"].scores["exact_match"].value
