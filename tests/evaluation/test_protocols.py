"""What a protocol sets, by family; and lmms-eval's own wrapper and `protocol=lmms_eval` ask the same, to the bit."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pdrop.cli.compose import CONF, settings
from pdrop.evaluation.lmms import evaluate, import_lmms_eval
from pdrop.evaluation.prompts import PromptBuilder, first_marks
from pdrop.evaluation.protocols import FamilySettings, of_family
from pdrop.models.checkpoint import load
from pdrop.record import RunRecord, RunSpec
from pdrop.schedule import Schedule
from tests.support.saved_checkpoints import save_llava, save_llava_next, save_qwen2_5_vl
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture, write_tasks

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


def llava_hf(folder: Path) -> Any:
    from lmms_eval.models.chat.llava_hf import LlavaHf

    return LlavaHf(pretrained=str(folder), device="cpu", device_map="cpu", dtype="float32")


FAMILIES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], dict[str, Any]]] = {
    "llava": (save_llava, llava_hf, {}),
    "llava_next": (save_llava_next, llava_hf, {}),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_lmms_evals_own_wrapper_asks_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_decord: None
) -> None:
    save, wrapper, more = FAMILIES[family]
    folder, tasks = save(tmp_path / family), write_tasks(tmp_path / "tasks", ["pope"])
    evaluator = import_lmms_eval()
    theirs = wrapper(folder)
    their_calls = watched(theirs.model, monkeypatch)
    manager = evaluator.TaskManager(include_defaults=False, include_path=[str(tasks)], model_name="llava_hf")
    task = evaluator.get_task_dict(["pope"], manager, "chat" if theirs.is_simple is False else "simple")
    output = evaluator.simple_evaluate(
        model=theirs,
        tasks=list(task.values()),
        task_manager=object(),
        limit=6,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=types.SimpleNamespace(
            process_with_media=False, reasoning_tags=None, output_path=str(tmp_path), agentic_trace_mode="basic"
        ),
        verbosity="WARNING",
    )
    checkpoint = load(str(folder), name="tiny")
    our_calls = watched(checkpoint.model, monkeypatch)
    dials = {"model": "folder", "model.name": "tiny", "model.path": str(folder), "protocol": "lmms_eval", **more}
    spec = settings({**dials, "tasks": ["pope"], "task_folders": [str(tasks)], "limit": 6, "latency": "off",
                     "method": "none", "device": "cpu"}).spec  # fmt: skip
    ours = evaluate(checkpoint, None, Schedule(), spec, tmp_path / "run", task_dirs=[tasks])
    assert len(their_calls) == len(our_calls) == 6
    for one, other in zip(in_order(their_calls), in_order(our_calls), strict=True):
        assert one["max_new_tokens"] == other["max_new_tokens"]
        for name in ("input_ids", "pixel_values", "new"):
            assert torch.equal(one[name], other[name]), name
    assert output["results"]["pope"]["pope_accuracy,none"] == ours.results["pope"].scores["pope_accuracy"].value
