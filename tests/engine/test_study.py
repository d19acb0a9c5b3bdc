"""The study of attention: what is noted equals the model's own attention, nothing moves, tokens find their pictures.

pytest tests/engine/test_study.py
"""

from __future__ import annotations

import base64
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pdrop import PyramidDrop, attach, pyramid
from pdrop.conformance.families import LAYERS, build
from pdrop.conformance.prompts import collate, sample
from pdrop.engine.pictures import SeenPicture
from pdrop.evaluation.answers import AnswerStore, Question
from pdrop.evaluation.generation import Generator
from pdrop.evaluation.pictures import layout_of
from pdrop.methods.layout import TokenGrid
from pdrop.models.checkpoint import load
from tests.support.saved_checkpoints import save_llava, save_llava_next, save_qwen2_5_vl
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import picture

EVERYWHERE = pyramid(LAYERS, stages=LAYERS, ratio=1.0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_what_is_noted_is_the_models_own_attention(family: str, backend: str) -> None:
    model, reference = build(family, backend, torch.float32), build(family, "eager", torch.float32)
    reference.load_state_dict(model.state_dict())
    batch = collate(family, [sample(family, model, (3, 5)), sample(family, model, (2, 4, 6))])
    truth = reference(**batch, output_attentions=True)
    plain = model(**batch).logits
    with attach(model, PyramidDrop(positions="original"), EVERYWHERE) as trace:
        trace.study = True
        assert torch.equal(model(**batch).logits, plain), "to the bit"
    assert [[entry.layer for entry in row] for row in trace.attention] == [list(range(LAYERS))] * 2
    visual = batch["input_ids"] == 190
    for row, noted in enumerate(trace.attention):
        for entry in noted:
            heads = truth.attentions[entry.layer][row, :, -1][:, visual[row]].float()
            assert torch.allclose(torch.tensor(entry.mass), heads.sum(1), atol=2e-5)
            assert torch.allclose(entry.weights, heads.mean(0), atol=2e-6)
            share = heads / heads.sum(1, keepdim=True)
            entropy = -(share * share.log()).sum(1) / math.log(share.shape[1])
            assert torch.allclose(torch.tensor(entry.entropy), entropy, atol=2e-4)
            best = math.ceil(0.1 * share.shape[1])
            assert torch.allclose(torch.tensor(entry.top), share.topk(best).values.sum(1), atol=2e-4)


@torch.no_grad()
def test_nothing_is_noted_unless_asked_for_and_nothing_is_dropped() -> None:
    model = build("llava")
    batch = collate("llava", [sample("llava", model, (3, 5))])
    for study, schedule in ((False, EVERYWHERE), (True, pyramid(LAYERS, ratio=0.5))):
        with attach(model, PyramidDrop(), schedule) as trace:
            trace.study = study
            model(**batch)
        assert trace.attention == [[]]
    with attach(model, PyramidDrop(), EVERYWHERE) as trace:
        trace.study = True
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(trace.attention[0]) == LAYERS, "a decoding step is not a prefill"


SIZES = [[(640, 480)], [(28, 28), (40, 28)]]
CASES: list[tuple[Any, list[Any]]] = [
    (
        save_llava,
        [
            [[[4, 4, 0, 0.125, 0.0, 0.875, 1.0]]],
            [[[4, 4, 0, 0.0, 0.0, 1.0, 1.0]], [[4, 4, 0, 0.15, 0.0, 0.85, 1.0]]],
        ],
    ),
    (
        save_llava_next,
        [
            [[[4, 4, 0, 0.0, 0.0, 1.0, 1.0], [6, 8, 1, 0.0, 0.0, 1.0, 1.0]]],
            [
                [[4, 4, 0, 0.0, 0.0, 1.0, 1.0], [4, 4, 1, 0.0, 0.0, 1.0, 1.0]],
                [[4, 4, 0, 0.0, 0.0, 1.0, 1.0], [4, 6, 1, 0.0, 0.0, 1.0, 1.0]],
            ],
        ],
    ),
    (save_qwen2_5_vl, [None, None]),
]


@pytest.mark.parametrize(("save", "expected"), CASES, ids=["llava", "llava_next", "qwen2_5_vl"])
def test_every_visual_token_has_its_place(save: Any, expected: list[Any], tmp_path: Path) -> None:
    checkpoint = load(str(save(tmp_path / "model")), name="tiny")
    layers = checkpoint.model.config.get_text_config().num_hidden_layers
    method, schedule = PyramidDrop(positions="original"), pyramid(layers, stages=layers, ratio=1.0)
    questions = [
        Question(
            "task", number, 0, "What is it?", functools.partial(list, [picture(n, size) for n, size in enumerate(row)])
        )
        for number, row in enumerate(SIZES)
    ]
    generator = Generator(checkpoint, method, schedule, spec_of(batch_size=2, max_new_tokens=1))
    store = AnswerStore(tmp_path / "answers.jsonl")
    for answer, row, wanted in zip(generator.answer(questions, store).answers, SIZES, expected):
        assert answer.layout is not None and len(answer.layout) == len(row)
        sizes = [rows * (columns + newline) for blocks in answer.layout for rows, columns, newline, *_ in blocks]
        assert sum(sizes) == answer.visual_tokens
        if wanted is not None:
            assert answer.layout[0][0][:3] == wanted[0][0][:3]
            assert [[block[:3] for block in blocks] for blocks in answer.layout] == [
                [block[:3] for block in blocks] for blocks in wanted
            ]
            assert np.allclose([b[3:] for p in answer.layout for b in p], [b[3:] for p in wanted for b in p], atol=1e-3)
        assert answer.attention is not None and answer.attention["layers"] == list(range(layers))
        for packed, mass in zip(answer.attention["map"], answer.attention["mass"]):
            weights = np.frombuffer(base64.b64decode(packed), dtype="<f2")
            assert len(weights) == answer.visual_tokens and weights.max() == 1
            assert all(0 <= value <= 1 for value in mass)
    again = AnswerStore(tmp_path / "answers.jsonl")
    assert all(again[question] == store[question] for question in questions)


def test_what_blocks_cannot_say_is_unknown() -> None:
    image = (30, 10)
    square = TokenGrid(0, 4, 4, 4)
    assert layout_of([SeenPicture(16, [square])], [image], "pad", True) == [[[4, 4, 0, 0.0, -1.0, 1.0, 2.0]]]
    assert layout_of([SeenPicture(16, [square])], [image], "crop", False) == [[[4, 4, 0, 0.0, 0.0, 1.0, 1.0]]]
    rows = [square, TokenGrid(16, 3, 5, 6), TokenGrid(21, 3, 1, 6)]
    boxes = [[4, 4, 0, 0.0, 0.0, 1.0, 1.0], [3, 5, 1, 0.0, 0.0, 1.0, 1.0]]
    assert layout_of([SeenPicture(34, rows, 5)], [image], "crop", False) == [boxes]
    with_class_token = [TokenGrid(0, 1, 1, 1), TokenGrid(1, 4, 4, 4)]
    assert layout_of([SeenPicture(17, with_class_token)], [image], "crop", False) is None
    assert layout_of([SeenPicture(16, [square])] * 2, [image], "crop", False) is None, "tiles that were not joined"
