"""The embedded model's training on a GPU. (Needs pictures: not for a bare machine, as tests/engine/test_gpu.py is.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.embedded.stage import TrainingPhase
from recipes.embedded.train import train
from recipes.embedded.trainer import Trainer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_embedded_model_learns_as_on_the_cpu() -> None:
    recipe = (TrainingPhase("all at once", images=8, batch=4, blocks=2, spell=0.3, tower_rate=0.1, patch_weight=1.0),)
    losses = []
    for device in ("cpu", DEVICE):
        trainer = Trainer(recipe, compiled=False, device=device)
        for _ in range(2):
            trainer.step(trainer.batch())
        losses.append(trainer.window.take()["loss"])
        assert trainer.finished
    assert losses[1] == pytest.approx(losses[0], rel=0.02), "bfloat16 there"


def test_the_embedded_model_trains_compiled_on_images_that_others_compose(tmp_path: Path) -> None:
    recipe = (
        TrainingPhase("tower", images=8, batch=4, asks=False, tower_rate=1.0, patch_weight=1.0),
        TrainingPhase("answers", images=8, batch=4, blocks=2, spell=0.3, hinted=True),
    )
    train(tmp_path / "work", tmp_path / "model", DEVICE, loader_workers=2, recipe=recipe, window=1)
    assert (tmp_path / "model/model.safetensors").exists()
    assert (tmp_path / "model/curve.csv").read_text().count("\n") == 5
