"""A run's spec as conf/run.yaml's defaults have it, for tests that ask without a run around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from pdrop.cli.compose import compose
from pdrop.record import RunSpec
from pdrop.runs.settings import read_dials


def spec_of(**changes: Any) -> RunSpec:
    """The defaults for a model of float32 on a CPU, one prompt at once, no tasks; with these fields changed."""
    cfg, _ = compose({"model": "folder", "model.name": "test", "model.path": "test", "device": "cpu", "tasks": []})
    return replace(read_dials(OmegaConf.to_container(cfg, resolve=True)), **changes)
