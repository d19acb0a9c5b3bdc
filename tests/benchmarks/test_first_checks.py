"""The checks for a GPU run on a CPU as a dry run, say what fails, and need neither Hydra nor lmms-eval."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import first_checks
from benchmarks.first_checks import Card, main, tried

ROOT = Path(__file__).resolve().parents[2]
DOORS = {"hydra", "omegaconf", "lmms_eval"}


def test_a_dry_run_runs_and_counts_what_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--tiny", "--only", "1", "4", "7", "9"]) == 0
    said = capsys.readouterr().out
    assert all(f" 1 waits, {name}: " in said for name in ("PyramidDrop", *first_checks.WAITING))
    assert "7 the same tokens: {'twice': True" in said and said.count("  holds") == 3 and "FAILS" not in said
    assert "11 checks, 0 failed" in said
    assert not list(tmp_path.iterdir()), "a dry run leaves no record"

    def broken(card: Card) -> None:
        raise ZeroDivisionError("no kernel\nof this kind")

    monkeypatch.setattr(first_checks, "same_tokens", broken)
    assert main(["--tiny", "--only", "7"]) == 1
    assert "7 the same tokens: ZeroDivisionError: no kernel | expected: twice" in capsys.readouterr().out
    assert tried(1, "a rule", lambda: ("3", False), "less").holds is False


def test_without_a_gpu_the_dry_run_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "--tiny is a dry run on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["first_checks", "bench", "bench_training"])
def test_a_bare_machine_can_run_it(name: str) -> None:
    """Nothing that it imports, however far down, imports Hydra or lmms-eval when it is imported."""
    waiting, seen = [ROOT / "benchmarks" / f"{name}.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {one.split(".")[0] for one in names} & DOORS, path
        waiting += [other for other in at_import(tree) if other not in seen and other not in waiting]
    assert len(seen) > 20


def at_import(tree: ast.Module) -> set[Path]:
    """The package's files that are imported with this one, rather than later by its functions."""
    now = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
    told = {node.module for node in now.body if isinstance(node, ast.ImportFrom) and node.module}
    told |= {alias.name for node in now.body if isinstance(node, ast.Import) for alias in node.names}
    told |= {f"{n.module}.{a.name}" for n in now.body if isinstance(n, ast.ImportFrom) for a in n.names}
    files = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in told}
    return {file for file in files if file.is_file()}
