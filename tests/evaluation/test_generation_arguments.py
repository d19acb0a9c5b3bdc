"""Tasks' generation arguments: what each does, and what is refused before anything is loaded.

pytest tests/evaluation/test_generation_arguments.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pdrop.evaluation.generation_arguments import READERS, GenerationArguments, check
from pdrop.evaluation.lmms import check_tasks

GREEDY = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
SAMPLED = {"max_new_tokens": 16, "num_beams": 1, "do_sample": True, "temperature": 0.7}

# what lmms-eval's models do: temperature alone decides; what a task leaves open is the checkpoint's
HONOURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, GREEDY),
    ({"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False}, GREEDY),
    ({"do_sample": True, "temperature": 0}, GREEDY),
    ({"do_sample": True}, GREEDY),
    ({"temperature": 0.0, "top_k": 5}, GREEDY),
    ({"temperature": 0.7}, SAMPLED),
    ({"temperature": "7e-1", "do_sample": False}, SAMPLED),
    ({"temperature": 0.7, "do_sample": True, "top_p": 0.9, "top_k": 0}, {**SAMPLED, "top_p": 0.9, "top_k": 0}),
    ({"max_new_tokens": None, "num_beams": None}, GREEDY),
    ({"max_new_tokens": 5, "num_beams": 3}, {**GREEDY, "max_new_tokens": 5, "num_beams": 3}),
    ({"length_penalty": 0}, {**GREEDY, "length_penalty": 0.0}),
    ({"repetition_penalty": 1.2, "min_new_tokens": 2}, {**GREEDY, "repetition_penalty": 1.2, "min_new_tokens": 2}),
    ({"no_repeat_ngram_size": 3, "seed": 7}, {**GREEDY, "no_repeat_ngram_size": 3}),
    ({"until": "\n", "image_aspect_ratio": "original"}, GREEDY),
    ({"num_return_sequences": 1, "skip_special_tokens": False}, GREEDY),
]  # fmt: skip

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_gen_toks": 3}, "max_gen_toks is not known: write max_new_tokens"),
    ({"stop_sequences": ["\n"]}, "stop_sequences is not known: write until"),
    ({"temprature": 1}, "temprature is not known: write temperature"),
    ({"visual_cot": True}, "visual_cot is not known: known are max_new_tokens, "),
    ({"num_return_sequences": 2}, "num_return_sequences is 1, not 2: one answer of a request is scored"),
    ({"max_new_tokens": 0}, "max_new_tokens is a whole number from 1 on, not 0"),
    ({"max_new_tokens": True}, "max_new_tokens is a whole number from 1 on, not True"),
    ({"max_new_tokens": "16"}, "max_new_tokens is a whole number from 1 on, not '16'"),
    ({"num_beams": 0}, "num_beams is a whole number from 1 on, not 0"),
    ({"top_k": -1}, "top_k is a whole number from 0 on, not -1"),
    ({"top_p": 1.5}, "top_p is a number from 0 to 1, not 1.5"),
    ({"temperature": None}, "temperature is a number, not None"),
    ({"temperature": "warm"}, "temperature is a number, not 'warm'"),
    ({"temperature": float("inf")}, "temperature is a number, not inf"),
    ({"repetition_penalty": 0}, "repetition_penalty is a number above 0, not 0"),
    ({"do_sample": "no"}, "do_sample is true or false, not 'no'"),
    ({"until": [1]}, "until is a text or a list of texts, not [1]"),
    ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens 9 is more than max_new_tokens 3"),
]


@pytest.mark.parametrize(("given", "options"), HONOURED)
def test_known_arguments_reach_the_model(given: dict[str, Any], options: dict[str, Any]) -> None:
    arguments = GenerationArguments.parse(given)
    assert arguments.options(16) == options
    said = given.get("do_sample")
    assert (arguments.contradiction is None) == (said is None or said == options["do_sample"])


def test_every_argument_is_tried() -> None:
    assert {name for given, _ in HONOURED for name in given} == set(READERS)


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_others_are_refused_by_name_before_anything_is_loaded(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        GenerationArguments.parse(given)
    assert f"generation_kwargs: {says}" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"task": "mine", "generation_kwargs": given}))
    with pytest.raises(ValueError, match=r"^task mine: generation_kwargs: ") as error:
        check_tasks(["mine"], [tmp_path])
    assert says in str(error.value)


def test_yaml_is_read_as_lmms_eval_reads_it(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.yaml").write_text(text)

    base = "doc_to_visual: !function nowhere.visual\ngeneration_kwargs: {temperature: 0.5, visual_cot: true}\n"
    (tmp_path / "base_yaml").write_text(base)
    write("inherits", "include: base_yaml\ntask: inherits\n")
    write("replaces", "include: base_yaml\ntask: replaces\ngeneration_kwargs: {max_new_tokens: 5}\n")
    write("draws", "task: draws\ngeneration_kwargs: {temperature: 0.5}\n")
    write("special", "task: special\ngeneration_kwargs: {top_k: 1}\n"
          "model_specific_generation_kwargs: {qwen: {visual_cot: true}, default: {temperature: 1}}\n")  # fmt: skip
    write("compares", "include: base_yaml\ntask: compares\noutput_type: multiple_choice\n")
    write("both", "group: both\ntask: [replaces, draws]\n")
    write("members", "group: members\ntask:\n  - task: replaces\n    generation_kwargs: {max_gen_toks: 4}\n")
    write("gone", "include: gone_yaml\ntask: gone\n")
    with pytest.raises(ValueError, match="task inherits: generation_kwargs: visual_cot is not known"):
        check(["inherits"], [tmp_path])
    with pytest.raises(ValueError, match="task replaces: generation_kwargs: max_gen_toks is not known"):
        check(["members"], [tmp_path])
    with pytest.raises(ValueError, match=r"gone\.yaml includes gone_yaml, which is not there"):
        check(["gone"], [tmp_path])
    samples = {name: check([name], [tmp_path]) for name in ("replaces", "draws", "special", "compares", "both")}
    assert samples == {"replaces": False, "draws": True, "special": True, "compares": False, "both": True}


def test_the_papers_tasks_are_answered_greedily_and_mmvet_is_not() -> None:
    assert not check(["mme", "pope", "gqa", "seedbench", "mmbench_en_dev_static", "mmmu_val", "scienceqa_img"])
    assert check(["mmvet"]), "temperature 0.2, and do_sample: false, which lmms-eval's models do not look at"


def test_an_answer_that_must_be_longer_than_the_runs_longest_is_refused(tmp_path: Path) -> None:
    for name, given in (("long", {"min_new_tokens": 50}), ("fits", {"min_new_tokens": 50, "max_new_tokens": 60})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "generation_kwargs": given}))
    with pytest.raises(
        ValueError, match=r"^task long: .* 50 is more than the run's max_new_tokens 16, .*: max_new_tok"
    ):
        check(["long"], [tmp_path], lambda task: 16)
    assert not check(["long"], [tmp_path], lambda task: 50) and not check(["fits"], [tmp_path], lambda task: 16)
