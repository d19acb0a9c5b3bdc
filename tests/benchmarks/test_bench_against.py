"""Two checkouts in turns: a line per case with the ratio this / other, and an error that names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_against import HERE, main

# another checkout, as far as it is called: its prefills take no time, its decoding steps take long
OTHER = {
    "pdrop/__init__.py": "",
    "pdrop/timing/__init__.py": "",
    "benchmarks/__init__.py": "",
    "torch.py": "def set_num_threads(count): pass",
    "pdrop/engine.py": "def attach(*given): raise AssertionError",
    "pdrop/timing/clock.py": """
from types import SimpleNamespace
def model_device(model): return "cpu"
def time_call(call, device): return SimpleNamespace(cpu_ms=call())
""",
    "pdrop/timing/paired.py": "def prefill(model, inputs): return inputs",
    "benchmarks/bench.py": """
from types import SimpleNamespace
def build(layers, hidden): return SimpleNamespace(parameters=list)
def cases(layers): return []
def prompt(model, visual): return 1e-9
def decoding_side(model, visual): return lambda: SimpleNamespace(cpu_ms=1e9)
""",
}


def test_each_side_is_its_own_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in OTHER.items():
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    small = ["--visual", "16", "--rounds", "2", "--layers", "24", "--hidden", "64", "--only", "none", "FastV"]
    main([str(tmp_path), *small])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "prefill 16 none", "prefill 16 FastV K=2 .5", "decode 16 none", "decode 16 FastV K=2 .5",
    ]  # fmt: skip
    ratios = [float(line[32:].split()[0]) for line in lines]
    assert all(ratio > 1e6 for ratio in ratios[:2]) and all(ratio < 1e-3 for ratio in ratios[2:])


@pytest.mark.exhaustive
def test_a_checkout_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(HERE), "--visual", "16", "--rounds", "2", "--layers", "24", "--hidden", "64", "--only", "none", "FastV"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(0.1 < float(line[32:39]) < 10 for line in lines)


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is no checkout of pdrop" in capsys.readouterr().err
