"""A record proves itself, files go where they may be written, and one unreadable record hides no other.

python -m pytest tests/analysis/test_proof.py
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import arguments
from analysis.__main__ import main
from analysis.store import publish as publishing
from pdrop.record import RunRecord
from pdrop.samples import FILE, condense, digest
from tests.support.records import make_record, put, run_of


def store(results: Path) -> Path:
    """Three finished runs of one task in the compact form, as a run leaves them."""
    for method in ("none", "pyramiddrop", "fastv"):
        folder = put(results, make_record(method, 1.0 if method == "none" else 0.5, tasks=("toy_exist",)), n=20)
        condense(folder)
        record = RunRecord.read(folder)
        record.samples_digest = digest(folder)
        for result in record.results.values():
            result.scores["acc"].mean = True
        record.write(folder)
    return results


def other_answer(folder: Path) -> None:
    """Change one answer in a samples file, as somebody who can zip would."""
    with zipfile.ZipFile(folder / FILE) as file:
        held = {name: file.read(name) for name in file.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in held.items():
            file.writestr(name, content.replace(b'"acc": 0.0', b'"acc": 1.0', 1))
    (folder / FILE).write_bytes(buffer.getvalue())


def in_record(change: Callable[[dict], None], proof: bool = True) -> Callable[[Path], None]:
    """Change record.json by hand; without `proof` its checksum is taken out as well."""

    def changed(folder: Path) -> None:
        path = folder / "record.json"
        data = json.loads(path.read_text())
        change(data)
        if not proof:
            del data["checksum"]
        path.write_text(json.dumps(data))

    return changed


def forged(folder: Path) -> None:
    """Change an answer and its checksum: the mean tells."""
    other_answer(folder)
    in_record(lambda data: data.update(samples_digest=digest(folder)), proof=False)(folder)


def cost(data: dict) -> None:
    data["cost"]["prefill_flops"] *= 10


def score(data: dict) -> None:
    data["results"]["toy_exist"]["scores"]["acc"]["value"] = 0.999


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a cost ten times too large": (in_record(cost), "does not hold what was written"),
    "a score edited by hand": (in_record(score), "does not hold what was written"),
    "a score and no checksum": (in_record(score, proof=False), "but the mean of its samples is"),
    "an answer edited by hand": (other_answer, "does not hold what the run wrote"),
    "an answer and its checksum": (forged, "but the mean of its samples is"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_named_and_not_trusted(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = store(tmp_path / "results")
    assert main(["tables", "--results", str(results)]) == 0
    folder = run_of(results, "fastv").path
    change, said = DAMAGES[damage]
    change(folder)
    capsys.readouterr()
    assert main(["tables", "--results", str(results)]) == 1
    told = capsys.readouterr().err
    assert said in told and folder.name in told and len(told.splitlines()) == 1


def test_one_unreadable_record_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = store(tmp_path / "results")
    folder, other = run_of(results, "fastv").path, run_of(results, "pyramiddrop")
    (folder / "record.json").write_text("{")
    for command in (["list"], ["explain", other.record.run_id], ["status"], ["report"]):
        code = main([*command, "--results", str(results)])
        said = capsys.readouterr()
        assert folder.name in said.err + said.out
        if command[0] != "status":
            assert code == 1 and (command[0] == "report" or other.record.run_id in said.out)
    page = (results / "report.html").read_text()
    assert other.folder in page and "is not a record that this version reads" in page


def test_records_of_older_versions_still_read(tmp_path: Path) -> None:
    folder = put(tmp_path, make_record("none", 1.0), n=4)
    data = json.loads((folder / "record.json").read_text())
    for name in ("checksum", "samples_digest", "rescored"):
        del data[name]
    for result in data["results"].values():
        for one in result["scores"].values():
            del one["mean"], one["full"]
    (folder / "record.json").write_text(json.dumps(data))
    assert RunRecord.read(folder).results["toy_exist"].scores["acc"].mean is None
    assert main(["tables", "--results", str(tmp_path)]) == 0


def test_the_shipped_store_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = store(tmp_path / "shipped")
    before = sorted(path for path in shipped.rglob("*"))
    monkeypatch.setattr(arguments, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    for command in (["tables"], ["report"], ["hard", "demo", "--control", "fastv"], ["repro"]):
        assert main([*command, "--results", str(shipped)]) == 0
    assert sorted(path for path in shipped.rglob("*")) == before
    assert (tmp_path / "results" / "report.html").is_file() and (tmp_path / "results/tables/demo.md").is_file()
    assert main(["tables", "--results", str(shipped), "--out", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine/tables/demo.md").is_file()


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = store(tmp_path / "results")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(publishing, "write_atomically", full)
    for command in (["tables"], ["report"], ["figures"], ["repro"], ["hard", "demo", "--control", "fastv"]):
        assert main([*command, "--results", str(results)]) == 1
        told = capsys.readouterr().err
        assert "No space left on device" in told and "--out DIR" in told and len(told.splitlines()) == 1, command
