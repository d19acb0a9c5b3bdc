"""Two checkouts in turns: a line per case, about 1 where they are the same, and an error that names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_against import HERE, main


def test_a_checkout_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(HERE), "--visual", "16", "--rounds", "2", "--layers", "24", "--hidden", "64", "--only", "none", "FastV"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "prefill 16 none", "prefill 16 FastV K=2 .5", "decode 16 none", "decode 16 FastV K=2 .5",
    ]  # fmt: skip
    assert all(0.1 < float(line[32:39]) < 10 for line in lines)


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "is no checkout of pdrop" in capsys.readouterr().err
