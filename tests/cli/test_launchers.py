"""Launchers start a sweep's jobs in processes of their own; the store is the same."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5"]}


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=pytest.mark.exhaustive),
        pytest.param("submitit_local", marks=pytest.mark.exhaustive),
    ],
)
def test_a_launcher_does_a_sweep(launcher: str, tmp_path: Path) -> None:
    plugin = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed: pip install 'pdrop[launchers]'")
    command = [sys.executable, "run.py", "-m", f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    command += ["model=llava_1_5_7b", "tasks=none", "latency=off", "ratio=0.4,0.6", f"results={tmp_path / 'results'}"]
    command += ["experiment=launched", f"hydra.sweep.dir={tmp_path / 'multirun'}"]
    environment = os.environ | {"PDROP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(path.read_text()) for path in (tmp_path / "results/runs").glob("*/record.json")]
    assert [record["status"] for record in records] == ["done", "done"] and "2 done in" in done.stdout
    noted = list((tmp_path / "results/experiments/launched").iterdir())
    assert len(noted) == 2, "the jobs know their experiment"
