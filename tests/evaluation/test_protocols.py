"""What a protocol sets, by family, and what each of its settings does; test_parity.py holds it against lmms-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdrop.cli.compose import CONF, settings
from pdrop.evaluation.prompts import PromptBuilder, first_marks
from pdrop.evaluation.protocols import SETTINGS, FamilySettings, of_family
from pdrop.models.checkpoint import load
from pdrop.record import LATER, RunRecord, RunSpec
from tests.support.saved_checkpoints import save_llava, save_llava_next, save_qwen, save_qwen2_5_vl
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture

PROTOCOLS = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "protocols").glob("*.yaml")}
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
    made = settings({**PLAIN, "model": "internvl3_8b", "max_tiles": 6, "model.image_mode": "pad"})
    assert made.turned == ("image_mode",), "what is set as it would be anyway is not turned"
    made = settings({**PLAIN, "model": "llava_1_5_7b", "max_new_tokens": 128})
    assert made.turned == ("lengths",), "MMBench's answers would have been longer"
    assert turned.answer_tokens("mmbench_en_dev") == turned.answer_tokens("pope") == 64, "who says it means all tasks"
    assert len({spec("llava_1_5_7b", protocol=name).run_id for name in PROTOCOLS}) == 3


def test_lengths_are_of_tasks_by_name_not_by_how_a_name_begins() -> None:
    def tokens(model: str, *tasks: str) -> list[int]:
        spec = settings({**PLAIN, "model": model}).spec
        return [spec.answer_tokens(task) for task in tasks]

    names = ("mme", "mme_sci", "mmerealworld", "mmvet", "mmvetv2", "gqa", "textvqa_val_ocr", "vqav2_val", "pope")
    assert tokens("internvl3_8b", *names) == [20, 100, 100, 1000, 100, 10, 10, 10, 100]
    assert tokens("llava_1_5_7b", "mmbench_cn_dev_static", "scienceqa_img", "sciencemm") == [1024, 1024, 128]
    assert spec_of(max_new_tokens=9, lengths='{"a*":1,"a_long_*":2,"a_long_one":3}').answer_tokens("a_long_one") == 3


def test_every_setting_of_a_protocol_is_a_dial_by_itself() -> None:
    family = {"model": "qwen2_5_vl_7b", "protocol": "lmms_eval"}
    turns: dict[str, Any] = {
        "prompt": "vicuna_v1", "image_mode": "pad", "max_new_tokens": 7, "system": "Be brief.", "image_backend": "pil",
        "min_pixels": 3136, "max_pixels": 400000, "wrapper": "none", "stop": "task", "image_placing": "front",
        "frames": 4, "frame_sampling": "ends", "fps": 1.5, "frame_times": True, "min_frame_pixels": 9216,
        "max_frame_pixels": 401408, "max_video_pixels": 4014080,
    }  # fmt: skip
    assert set(turns) == set(SETTINGS) - {"max_tiles"}, "a family with pixels has no tiles"
    for name, value in turns.items():
        dial = f"model.{name}" if name in ("prompt", "image_mode") else name
        made = settings({**PLAIN, **family, dial: value})
        assert made.turned == (name,), name
        assert getattr(made.spec, name) == (None if value == "none" else value)
    assert settings({**PLAIN, "model": "internvl3_8b", "max_tiles": 12}).turned == ("max_tiles",)
    assert settings({**PLAIN, "model": "internvl3_8b", "system": "none"}).spec.system is None


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
        ({"image_backend": "qwen_vl_utils"}, "image_backend=qwen_vl_utils: models of llava take pictures, or tiles of"),
        ({"image_placing": "behind"}, "image_placing is marked or front, not 'behind'"),
        ({"frame_sampling": "random"}, "frame_sampling is ends, nearest or middles, not 'random'"),
        ({"frames": 0}, "frames is a whole number from 1 on, not 0"),
        ({"fps": 0}, "fps is a number of frames a second, above 0, or null, not 0.0"),
        ({"max_frame_pixels": 100}, "max_frame_pixels=100: leave it out for models of llava, whose pictures, or tiles"),
        ({"model": "qwen2_5_vl_7b", "min_frame_pixels": 900, "max_frame_pixels": 100}, "min_frame_pixels=900 is more"),
        ({"stop": "eos"}, "stop is task or model, not 'eos'"),
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
    for name in set(LATER) - {"sdpa_kernel"}:
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


def test_pictures_stand_where_they_are_marked_or_in_front(tmp_path: Path) -> None:
    checkpoint = load(str(save_llava(tmp_path / "llava")), name="tiny")
    text = "Is <image> left of <image>?"
    marked, front = (
        PromptBuilder.of(checkpoint, spec_of(prompt="vicuna_v1", image_placing=place)).render(text, 2)
        for place in ("marked", "front")
    )
    assert marked.endswith(" USER: Is <image> left of <image>? ASSISTANT:")
    assert front.endswith(" USER: <image> <image>\nIs  left of ? ASSISTANT:")


def test_the_official_template_of_vicuna_is_for_vicunas(tmp_path: Path) -> None:
    """LLaVA-NeXT's 34B and Llama 3 have text models of Llama's kind, too, and other templates."""
    checkpoint = load(str(save_llava_next(tmp_path / "next")), name="tiny")
    official = spec_of(protocol="official", prompt="vicuna_v1")
    assert PromptBuilder.of(checkpoint, official).style == "vicuna_v1"
    checkpoint.processor.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"
    with pytest.raises(
        ValueError, match=r"its text model is no Vicuna\. Use protocol=checkpoint, or model\.prompt=chat"
    ):
        PromptBuilder.of(checkpoint, official)
    assert PromptBuilder.of(checkpoint, spec_of(protocol="official", prompt="chat")).style == "chat"


def test_one_picture_has_three_published_numbers_of_tokens(tmp_path: Path) -> None:
    folder = save_qwen(tmp_path / "qwen", "Qwen2_5_VL", 14, limits=(3136, 12845056))  # as its own processor has them
    checkpoint = load(str(folder), name="tiny")
    found = {}
    for protocol in PROTOCOLS:
        dials = {"model": "folder", "model.name": "mine", "model.path": str(folder), "protocol": protocol}
        with pytest.raises(ValueError, match=r"positions of time, height and width.* set positions=original"):
            settings({**PLAIN, **dials})
        builder = PromptBuilder.of(checkpoint, settings({**PLAIN, **dials, "positions": "original"}).spec)
        ids = builder.encode([builder.render("What?", 1)], [[picture(0, (336, 252))]])["input_ids"]
        found[protocol] = int((ids == checkpoint.model.config.image_token_id).sum())
    assert found == {"checkpoint": 108, "lmms_eval": 266, "official": 1302}


def test_qwen_vl_utils_resizes_before_the_processor_does(tmp_path: Path) -> None:
    checkpoint = load(str(save_qwen(tmp_path / "qwen", "Qwen2_5_VL", 14)), name="tiny")
    builder = PromptBuilder.of(checkpoint, spec_of(image_backend="qwen_vl_utils", max_pixels=3136))
    assert [builder.prepare(picture(0, size)).size for size in ((300, 100), (9, 200))] == [(308, 112), (28, 196)]
    ids = builder.encode([builder.render("What?", 1)], [[picture(0, (300, 100))]])["input_ids"]
    assert (ids == checkpoint.model.config.image_token_id).sum() <= 4, "then the processor, within the run's limits"
