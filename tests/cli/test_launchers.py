"""Launchers start a sweep's jobs in processes of their own; the store is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdrop.cli import run
from tests.support.command_line import called

ROOT = Path(__file__).resolve().parents[2]
RAY_PYTHON = "PDROP_RAY_LAUNCHER_PYTHON"  # of an environment with Hydra's launcher for Ray: make ray-launcher
CARDS = ("2", "5")  # that the command sees; none is used
LAUNCHERS = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5"]}


def words(launcher: str, folder: Path) -> list[str]:
    """A sweep of two jobs."""
    found = ["-m", f"hydra/launcher={launcher}", "model=llava_1_5_7b", "tasks=none", "latency=off", "ratio=0.4,0.6"]
    return [*found, f"results={folder / 'results'}", "experiment=launched", f"hydra.sweep.dir={folder / 'multirun'}"]


def needs(launcher: str) -> None:
    """Skips where the launcher is not installed."""
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install 'pdrop[launchers]'")


@pytest.mark.exhaustive
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_does_a_sweep_in_processes_of_its_own(launcher: str, tmp_path: Path) -> None:
    needs(launcher)
    started(sys.executable, [*words(launcher, tmp_path), *LAUNCHERS[launcher]], tmp_path)
    logs = [path.read_text() for path in (tmp_path / "multirun").glob("*/run.log")]
    taken = [line.split()[1] for log in logs for line in log.splitlines() if line.startswith("card ")]
    assert taken and set(taken) <= set(CARDS), "each process took one of them"
    assert len(taken) == 2 or launcher == "joblib", "a process of joblib's may do both jobs"


@pytest.mark.exhaustive
def test_the_launcher_for_ray_does_a_sweep_in_an_environment_of_its_own(tmp_path: Path) -> None:
    if (python := os.environ.get(RAY_PYTHON)) is None:
        pytest.skip(f"it pins a cloudpickle that joblib's cannot share: make ray-launcher, or {RAY_PYTHON}=its Python")
    there = [f"+hydra.launcher.ray.init.{name}=2" for name in ("num_cpus", "num_gpus")]
    started(python, [*words("ray_gpu", tmp_path), "device=cpu", *there], tmp_path)
    logs = [path.read_text() for path in (tmp_path / "multirun").glob("*/run.log")]
    assert not any(line.startswith("card ") for log in logs for line in log.splitlines()), "Ray shows each job but one"


def started(python: str, given: list[str], folder: Path) -> None:
    """The command in a process of its own; what came of it is checked."""
    environment = os.environ | {"PDROP_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ",".join(CARDS)}
    done = subprocess.run([python, "run.py", *given], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check(done.stdout, folder)


def test_a_launcher_does_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """One job at a time, which joblib does here: a process more would import torch again."""
    needs("joblib")
    monkeypatch.chdir(tmp_path)
    given = (*words("joblib", tmp_path), "hydra.launcher.n_jobs=1")
    code, said = called(run.main, "run.py", given, monkeypatch, capfd)
    assert code == 0, said
    check(said, tmp_path)


def check(said: str, tmp_path: Path) -> None:
    records = [json.loads(path.read_text()) for path in (tmp_path / "results/runs").glob("*/record.json")]
    assert [record["status"] for record in records] == ["done", "done"] and "2 done in" in said
    noted = list((tmp_path / "results/experiments/launched").iterdir())
    assert len(noted) == 2, "the jobs know their experiment"
