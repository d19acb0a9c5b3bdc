"""The embedded model's training on a GPU. (Needs pictures: not for a bare machine, as tests/engine/test_gpu.py is.)

So that what is skipped without a GPU stays true, the same is done on a pretended card, and compiled on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.embedded.stage import TrainingPhase
from recipes.embedded.train import train
from recipes.embedded.trainer import Trainer
from tests.support.pretended_card import card

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
AT_ONCE = (
    TrainingPhase(
        "all at once", images=4, batch=2, blocks=2, character_weight=0.3, tower_rate=0.1, patch_weight=1.0, hinted=True
    ),
)
STAGES = (
    TrainingPhase("tower", images=8, batch=4, trains_decoder=False, tower_rate=1.0, patch_weight=1.0),
    TrainingPhase("answers", images=8, batch=4, blocks=2, character_weight=0.3, hinted=True),
)


def loss_of(device: str) -> float:
    """The mean loss of two steps, uncompiled."""
    trainer = Trainer(AT_ONCE, compiled=False, device=device)
    for _ in range(2):
        trainer.step(trainer.batch())
    assert trainer.finished
    return trainer.window.take()["loss"]


@pytest.mark.parametrize("real", [pytest.param(True, marks=ON_A_GPU), False], ids=["GPU", "pretended"])
def test_the_embedded_model_learns_as_on_the_cpu(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    want = loss_of("cpu")
    if real:
        assert loss_of("cuda") == pytest.approx(want, rel=0.02), "bfloat16 there"
        return
    with card(monkeypatch) as seen:
        assert loss_of("cuda") == pytest.approx(want, rel=0.02)
    assert not seen.mixed


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=ON_A_GPU), pytest.param("cpu", marks=pytest.mark.exhaustive)]
)
def test_the_embedded_model_trains_compiled_on_images_that_others_compose(device: str, tmp_path: Path) -> None:
    train(tmp_path / "work", tmp_path / "model", device, loader_workers=2, recipe=STAGES, window=1)
    assert (tmp_path / "model/model.safetensors").exists()
    assert (tmp_path / "model/curve.csv").read_text().count("\n") == 5
