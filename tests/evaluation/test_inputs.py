"""What is handed to a model on a GPU travels in the model's dtype, from pinned memory, and nobody waits for it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BatchFeature

from pdrop import FastV, Method, PyramidDrop, Schedule, Stage
from pdrop.evaluation import generation
from pdrop.evaluation.answers import Question
from pdrop.evaluation.generation import Generator
from pdrop.models.checkpoint import load
from tests.support.pretended_cuda import CUDA, moved, pretended
from tests.support.saved_checkpoints import save_llava, save_qwen2_5_vl
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture


def test_pixels_are_cast_before_they_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*given: Any) -> BatchFeature:
        return BatchFeature({"input_ids": torch.arange(4)[None], "pixel_values": torch.rand(1, 3, 2, 2), "other": [1]})

    model = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    generator: Any = SimpleNamespace(builder=SimpleNamespace(encode_rows=encode), cache=None, pixels=1.0, model=model)
    generator._generate = lambda part, trace: part.inputs
    row: Any = SimpleNamespace(videos=(), sizes=[])
    with pretended(monkeypatch) as seen:
        part = Generator._prepared(generator, [Question("t", 0, 0, "a", list)], ["a"], [row])
        inputs: Any = Generator.ask(generator, part, SimpleNamespace())
        assert {x.dtype for x in seen.pinned} == {torch.int64, torch.bfloat16}
        assert not seen.waits
    assert inputs["pixel_values"].device == CUDA and inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].device == CUDA and inputs["input_ids"].dtype == torch.int64
    assert inputs["other"] == [1]


@pytest.mark.product(2)
@pytest.mark.parametrize(
    ("save", "method", "schedule"),
    [
        (save_llava, PyramidDrop(), Schedule((Stage(1, 0.5), Stage(2, 0.25)))),
        (save_llava, PyramidDrop(), Schedule((Stage(1, 1.0), Stage(2, 1.0)))),
        (save_qwen2_5_vl, FastV(), Schedule((Stage(2, 0.5),))),
    ],
    ids=["drops", "studies attention", "pictures of any size"],
)
@pytest.mark.parametrize("scored", [False, True], ids=["generated", "scored"])
def test_answering_a_batch_waits_as_often_whatever_its_size(
    save: Any, method: Method, schedule: Schedule, scored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of it on a pretended device: the same answers, all that is read back at once, pixels in bfloat16."""
    folder, found = save(tmp_path / "model"), []

    def inference(mode: bool = True) -> Any:  # its tensors cannot pretend
        return torch.no_grad() if mode else nullcontext()

    monkeypatch.setattr(generation, "accelerator", lambda device: {"device_name": None})
    for count in (2, 4):
        images = [partial(list, [picture(number, (56, 56))]) for number in range(count)]
        said = {"continuation": "yes"} if scored else {}
        questions = [Question("task", number, 0, "What?", image, **said) for number, image in enumerate(images)]
        checkpoint = load(str(folder), name="tiny", dtype="bfloat16")
        spec = spec_of(max_new_tokens=3, batch_size=count)
        want = Generator(checkpoint, method, schedule, spec).answer(questions).answers
        moved(checkpoint.model)
        with monkeypatch.context() as patch, pretended(patch) as seen:
            patch.setattr(torch, "inference_mode", inference)
            got = Generator(checkpoint, method, schedule, spec).answer(questions).answers
        assert [(one.text, one.kept, one.visual_per_layer) for one in got] == [
            (one.text, one.kept, one.visual_per_layer) for one in want
        ]
        assert not seen.mixed
        pixels = [x for x in seen.pinned if x.ndim > 1 and x.is_floating_point()]
        assert [x.dtype for x in pixels] == [torch.bfloat16], "nothing else that is large travels"
        found.append(seen.waits["own"] + seen.waits["model"])
    models_own = 9 if save is save_qwen2_5_vl else 0  # it makes the positions of each prompt by itself
    assert found[1] - found[0] == 2 * models_own, found
