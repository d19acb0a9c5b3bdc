"""make torture: fifty damaged stores, 0 tracebacks, 0 accepted in silence, 0 other runs hidden."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from tests.analysis.test_proof import DAMAGES, in_record, store
from tests.support.records import run_of

pytestmark = pytest.mark.torture
Damage = Callable[[Path], None]


def truncated(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def zeroed(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        data = path.read_bytes()
        cut = int(share * len(data))
        path.write_bytes(data[:cut] + b"\0" * (len(data) - cut))

    return damage


def flipped(name: str, seed: int) -> Damage:
    def damage(folder: Path) -> None:
        path, draw = folder / name, random.Random(seed)
        data = bytearray(path.read_bytes())
        place = draw.randrange(len(data))
        if name == "record.json":  # a flip of a blank between words changes nothing that is read
            place = draw.choice([n for n, byte in enumerate(data) if chr(byte).isalnum()])
        data[place] ^= 1 << draw.randrange(7)
        path.write_bytes(bytes(data))

    return damage


def holding(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def without(*keys: str) -> Damage:
    def change(data: dict[str, Any]) -> None:
        place = data
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return in_record(change)


def wrong(*keys: str, value: Any) -> Damage:
    def change(data: dict[str, Any]) -> None:
        place = data
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return in_record(change)


STORES: dict[str, Damage] = {name: damage for name, (damage, _) in DAMAGES.items()}
for file in ("record.json", "samples.zip"):
    STORES |= {f"{file} cut at {share}": truncated(file, share) for share in (0, 0.01, 0.5, 0.99)}
    STORES |= {f"{file} zeros from {share}": zeroed(file, share) for share in (0, 0.3, 0.8)}
    STORES |= {f"{file} bit flip {seed}": flipped(file, seed) for seed in range(6)}
    STORES |= {f"{file} is a folder": a_folder(file)}
    words = (b"null", b"[]", b"\xff\xfe\x00", b"[" * 20_000, b'{"spec": 1}')
    STORES |= {f"{file} holds {content[:12]!r}": holding(file, content) for content in words}
STORES |= {
    "no samples": gone("samples.zip"),
    "no spec": without("spec"),
    "no scores": without("results", "toy_exist", "scores"),
    "a run id of another": wrong("run_id", value="0" * 12),
    "results are a list": wrong("results", value=[]),
    "a score is text": wrong("results", "toy_exist", "scores", "acc", "value", value="x"),
    "a cost is null": wrong("cost", "prefill_flops_ratio", value=None),
    "a name is a path": wrong("spec", "method", value="../x"),
}


def test_there_are_fifty() -> None:
    assert len(STORES) >= 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store(tmp_path_factory.mktemp("whole") / "results")


@pytest.mark.parametrize("name", STORES)
def test_a_damaged_store(name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(shutil.copytree(whole, tmp_path / "results"))
    folder, other = run_of(results, "fastv").path, run_of(results, "pyramiddrop")
    STORES[name](folder)
    told, codes = "", []
    for words in (["list"], ["status"], ["tables"], ["report"], ["samples", folder.name, "toy_exist"]):
        codes.append(main([*words, "--results", str(results)]))
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        told += said.err + (said.out if words == ["status"] else "")
        if words[0] in ("list", "status"):
            assert words[0] == "status" or other.record.run_id in said.out, "the others are shown"
    assert 1 in codes and folder.name.rpartition("-")[2] in told, f"{name} was accepted in silence: {codes} {told}"
    page = (results / "report.html").read_text()
    assert other.folder in page
    record = json.loads((other.path / "record.json").read_text())
    assert record["run_id"] == other.record.run_id, "nothing is lost"
