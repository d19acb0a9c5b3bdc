"""What may not stand in one table is refused, by name; what is only doubtful is said loudly.

python -m pytest tests/analysis/test_refusals.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.comparison.comparable import refuse_mixtures
from analysis.store.load import load_experiment, load_runs
from tests.support.records import rewrite, run_of, standard, table_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that tests only read."""
    return standard(tmp_path_factory.mktemp("store"))


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """A results folder that a test may change."""
    return Path(shutil.copytree(store, tmp_path / "results"))


FRESH = "To mend it, delete"  # and run again with one setting
AGAIN = "  python run.py method="
FORCE = " force=true"


@pytest.mark.parametrize(
    ("change", "named", "remedy"),
    [
        ({"limit": 10}, "limit: ", FRESH),
        ({"dtype": "bfloat16"}, "dtype: ", FRESH),
        ({"attn_implementation": "eager"}, "attn_implementation: ", FRESH),
        ({"batch_size": 1}, "batch_size: ", FRESH),
        ({"device": "cuda"}, "device: ", FRESH),
        ({"versions": '{"torch":"2.14.0"}'}, "versions: ", AGAIN),
        ({"model_fingerprint": "e" * 64}, "model_fingerprint of toy: ", AGAIN),
        ({"processor": "Other CPU"}, "processor: ", FORCE),
        ({"device_name": "Some GPU"}, "device_name: ", FORCE),
        ({"data_hash": "other"}, "data_hash of toy_exist: ", FORCE),
        ({"prompt_hash": "other"}, "prompt_hash of toy_exist: ", FORCE),
        ({"git_commit": "fedcba9876543210"}, "git_commit (times are shown): ", FORCE),
        ({"threads": 2}, "threads (times are shown): ", FORCE),
    ],
)
def test_mixtures_are_refused_by_name(
    copied: Path, change: dict[str, Any], named: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run_of(copied, "pyramiddrop", "0.5"), **change)
    odd = run_of(copied, "pyramiddrop", "0.5").folder
    experiment = load_experiment(copied, "demo")
    with pytest.raises(ValueError) as error:
        refuse_mixtures(experiment, experiment.runs)
    line = next(line for line in str(error.value).splitlines() if line.strip().startswith(named))
    assert f"{next(iter(change.values()))} in {odd}" in line and run_of(copied, "fastv").folder in line
    assert remedy in str(error.value)
    assert main(["tables", "demo", "--results", str(copied)]) == 1
    assert named in capsys.readouterr().err and not (copied / "tables").exists()


def test_commits_may_differ_where_no_time_is_shown(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run_of(copied, "fastv", "0.5"), git_commit="fedcba9876543210")
    assert main(["tables", "--no-times", "--results", str(copied)]) == 0
    page = (copied / "tables" / "demo.md").read_text()
    assert "SEVERAL COMMITS: 0123456789, fedcba9876" in page and "time %" not in page
    assert "! SEVERAL COMMITS" in capsys.readouterr().out


def test_uncommitted_changes_are_loud_and_refused_when_strict(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(copied, "fastv", "0.5")
    rewrite(run, git_dirty=True)
    assert main(["tables", "--results", str(copied)]) == 0
    assert "UNCOMMITTED CHANGES: 1 of 9 runs" in (copied / "tables" / "demo.md").read_text()
    capsys.readouterr()
    assert main(["tables", "--strict", "--results", str(copied)]) == 1
    assert run.folder in capsys.readouterr().err


def test_runs_of_different_uncommitted_sources_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run for run in load_runs(copied) if run.done]
    for run in runs:
        rewrite(run, sources="one")
    odd = run_of(copied, "fastv", "0.5")
    rewrite(odd, sources="two")
    assert main(["tables", "--results", str(copied)]) == 0  # both committed: the digests are told, not refused
    rewrite(odd, git_dirty=True)
    capsys.readouterr()
    assert main(["tables", "--results", str(copied)]) == 1
    error = capsys.readouterr().err
    assert f"two in {odd.folder}" in error and all(run.folder in error for run in runs)
    assert "force=true" in error and "--no-times" not in error


def test_a_method_edited_without_a_commit_is_refused_beside_its_older_self(copied: Path) -> None:
    for run in [run for run in load_runs(copied) if run.done]:
        rewrite(run, sources="one", git_dirty=True)
    for ratio in ("0.3", "0.5"):
        rewrite(run_of(copied, "fastv", ratio), code="own file, as it was")
    assert main(["tables", "--results", str(copied)]) == 0  # a method's own file counts for its runs alone
    rewrite(run_of(copied, "fastv", "0.5"), code="own file, edited")
    changed, kept = run_of(copied, "fastv", "0.5"), run_of(copied, "fastv", "0.3")
    experiment = load_experiment(copied, "demo")
    with pytest.raises(ValueError, match="sources of fastv") as error:
        refuse_mixtures(experiment, experiment.runs)
    assert f"edited in {changed.folder}" in str(error.value) and f"as it was in {kept.folder}" in str(error.value)


def test_a_run_that_devices_of_two_models_answered_is_alone(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with a run of the same mixture, whose devices answered other questions; the store's tables part them."""
    both = [{"device": "Test CPU", "documents": {"toy_exist": "5"}}, {"device": "Other CPU", "documents": {}}]
    mixed = [run_of(copied, "fastv", "0.5"), run_of(copied, "pyramiddrop", "0.5")]
    for run in mixed:
        rewrite(run, answered_by=both, device_name="Other CPU + Test CPU")
    experiment = load_experiment(copied, "demo")
    with pytest.raises(ValueError, match="answered by devices of several models: Other CPU \\+ Test CPU in") as error:
        refuse_mixtures(experiment, experiment.runs)
    said = str(error.value)
    assert all(run.folder in said and f"method={run.record.spec.method}" in said for run in mixed)
    assert said.count(FORCE) == 2, "the others are not to be made again"
    with pytest.raises(ValueError, match="answered by devices of several models"):
        refuse_mixtures(experiment, mixed)
    refuse_mixtures(experiment, mixed[:1])
    assert main(["tables", "all", "--results", str(copied)]) == 0
    page = (copied / "tables" / "all.md").read_text()
    assert page.count("Hardware: Other CPU + Test CPU, Test CPU, 2 cores") == 2 and "all, 3 of 3: " in page
    assert all(f"answered by several devices, {run.path.name[-12:]}" in page for run in mixed)


def test_an_older_record_on_the_cpu_names_no_device(copied: Path) -> None:
    rewrite(run_of(copied, "fastv", "0.5"), device_name="Test CPU")
    experiment = load_experiment(copied, "demo")
    refuse_mixtures(experiment, experiment.runs)


def test_a_failed_run_elsewhere_is_no_mixture(copied: Path) -> None:
    failed = next(run for run in load_runs(copied) if not run.done)
    failed.record.environment["processor"] = "Other CPU"
    failed.record.write(failed.path)
    assert main(["tables", "--results", str(copied)]) == 0


def test_lost_or_swapped_samples_are_refused(copied: Path) -> None:
    path = run_of(copied, "fastv", "0.5").path / "samples" / "toy_ocr.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"59 different samples in 59 lines, but the record scored 60"):
        table_of(copied)
    path.write_text("\n".join([*lines[:-1], lines[-1].replace('"doc_id": 59', '"doc_id": 77')]) + "\n")
    with pytest.raises(ValueError, match="answered different samples"):
        table_of(copied)
    path.write_text("\n".join([*lines[:-1], "{half a line"]) + "\n")
    with pytest.raises(ValueError, match="line 60 is not a sample"):
        table_of(copied)
    path.unlink()
    with pytest.raises(ValueError, match=r"toy_ocr.jsonl is missing"):
        table_of(copied)


def test_unknown_experiment_lists_the_known(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "dmeo", "--results", str(copied)]) == 1
    assert "there are: demo, all" in capsys.readouterr().err
