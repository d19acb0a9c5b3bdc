"""A release: one version, and a wheel that works from anywhere with configuration, tasks, data and model inside.

PDROP_WHEEL names a wheel that was built already (make release-check); else one is built.
"""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import pdrop
from pdrop.record import read_records

ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def test_the_version_has_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "pdrop.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", pdrop.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pdrop.__version__, "CITATION.cff repeats pdrop.__version__"
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in project["project"]["authors"]]


def test_the_papers_of_the_readme_and_of_every_method_can_be_cited():
    cited = set(re.findall(r"arXiv:([\d.]+\d)", (ROOT / "CITATION.cff").read_text()))
    papers = set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", (ROOT / "README.md").read_text()))
    heads = [path.read_text().split("\n\n")[0] for path in (ROOT / "pdrop/methods").glob("*.py")]
    methods = {paper for head in heads for paper in re.findall(r"\(arXiv ([\d.]+\d)", head)}
    assert len(papers) >= 3 and len(methods) >= 16 and papers | methods <= cited, (papers | methods) - cited


def test_the_changelog_has_a_place_for_what_comes_and_what_came():
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "Unreleased" and heads[1] == pdrop.__version__


def call(*command: str, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, made without a network."""
    if made := os.environ.get("PDROP_WHEEL"):
        return Path(made).resolve()
    folder = tmp_path_factory.mktemp("wheel")
    options = folder / "setup.cfg"
    options.write_text(f"[build]\nbuild_base = {folder / 'build'}\n")  # what an older build left is not packed again
    elsewhere = os.environ | {"DIST_EXTRA_CONFIG": str(options)}
    make = [sys.executable, *PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    call(*make, env=elsewhere)
    (found,) = folder.glob("pdrop-*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    call(sys.executable, *PIP, "install", str(wheel), "--no-deps", "--no-index", "--target", str(folder))
    return folder


@pytest.fixture
def here(site, tmp_path) -> dict:
    """An empty folder, with the installed pdrop on the import path."""
    return {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}


@pytest.mark.slow
def test_a_wheel_runs_far_from_the_checkout(wheel, site, here, tmp_path):
    assert wheel.name.startswith(f"pdrop-{pdrop.__version__}-py3-none-any")
    held = zipfile.ZipFile(wheel).namelist()
    assert "pdrop/py.typed" in held and "pdrop/conf/run.yaml" in held and "pdrop/embedded/data/test.parquet" in held
    assert not [name for name in held if name.startswith(("tests", "docs", "results"))]
    shipped = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert shipped == {"pdrop", "bin"}, "nothing else than pdrop is on the import path"
    where = "import importlib.metadata, pdrop.cli.compose as c; print(c.CONF, importlib.metadata.version('pdrop'))"
    assert call(sys.executable, "-c", where, **here).split() == [str(site / "pdrop/conf"), pdrop.__version__]
    run = ["experiments=demo", "hydra.sweeper.params=null", "hydra.mode=RUN", "method=fastv", "latency=off"]
    call(str(site / "bin/pdrop"), *run, "model=llava_1_5_7b", "tasks=none", **here)  # counted: no weights, no torch
    (record,) = read_records(tmp_path / "results/runs")
    assert record.status == "done" and record.spec.method == "fastv"
    assert (tmp_path / "results/experiments/demo" / record.spec.folder).exists()
    assert "== Dials" in call(str(site / "bin/pdrop-train"), "--help", **here)
    assert "pdrop-analysis" in call(sys.executable, "-m", "pdrop.analysis", "--help", **here)
    page = call(str(site / "bin/pdrop-analysis"), "tables", "demo", **here)
    assert "FastV" in page and (tmp_path / "results/tables/demo.csv").is_file()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_wheel_scores_far_from_the_checkout(site, here, tmp_path):
    run = ["experiments=demo", "hydra.sweeper.params=null", "method=fastv", "limit=2", "latency=off"]
    call(sys.executable, "-m", "pdrop", *run, "tasks=embedded_chart", "hydra.mode=RUN", **here)
    (record,) = read_records(tmp_path / "results/runs")
    assert record.status == "done" and record.spec.method == "fastv"
    assert (tmp_path / "results/experiments/demo" / record.spec.folder).exists()
    for command in (["tables", "demo"], ["repro"], ["report"], ["figures", "demo"]):
        call(sys.executable, "-m", "pdrop.analysis", *command, **here)
