"""An installed pdrop works from anywhere: configuration, experiments, tasks, data and the embedded model inside."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdrop.record import read_records

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_runs_far_from_the_checkout(tmp_path):
    def call(*command: str, **options) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    call(*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("pdrop-*.whl")
    call(*pip, "install", str(wheel), "--no-deps", "--no-index", "--target", str(tmp_path / "site"))
    shipped = {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"}
    assert shipped == {"pdrop", "bin"}, "nothing else than pdrop is on the import path"
    away = tmp_path / "away"
    away.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = call("-c", "import pdrop.compose; print(pdrop.compose.CONF)", cwd=away, env=environment).strip()
    assert where == str(tmp_path / "site/pdrop/conf")
    run = ["experiments=demo", "hydra.sweeper.params=null", "method=fastv", "limit=2", "latency=off"]
    call("-m", "pdrop", *run, "tasks=embedded_chart", "hydra.mode=RUN", cwd=away, env=environment)
    (record,) = read_records(away / "results/runs")
    assert record.status == "done" and record.spec.method == "fastv"
    assert (away / "results/experiments/demo" / record.spec.folder).exists()
    page = call(str(tmp_path / "site/bin/pdrop-analysis"), "tables", "demo", cwd=away, env=environment)
    assert "FastV" in page and (away / "results/tables/demo.csv").is_file()
    assert "pdrop-analysis" in call("-m", "pdrop.analysis", "--help", cwd=away, env=environment)
    call("-m", "pdrop.analysis", "repro", cwd=away, env=environment)
    call("-m", "pdrop.analysis", "report", cwd=away, env=environment)
    call("-m", "pdrop.analysis", "figures", "demo", cwd=away, env=environment)
