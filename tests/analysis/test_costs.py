"""Costs in tables, the break-even page and figure, the benchmark's page: what is shown of measurements, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.store.load import load_experiment
from analysis.studies import bench, break_even
from pdrop.record import EQUAL_CONDITIONS, RunRecord
from pdrop.timing.measure import BOUND
from tests.support.records import fill, make_record, put, table_of

CONDITIONS = {name: None for name in EQUAL_CONDITIONS} | {"device": "cpu", "threads": 1, "load": 0.3}


def lane(ratio: float, values: int = 5) -> dict[str, Any]:
    """Times of both sides, with a ratio of so much."""

    def described(value: float, unit: str) -> dict[str, Any]:
        spread = 0.02 * value
        return {"unit": unit, "median": value, "iqr": spread, "low": value - spread, "high": value + spread} | {
            "values": [value] * values,
            "p90": value,
        }

    return {"this": described(10 * ratio, "ms"), "none": described(10.0, "ms"), "ratio": described(ratio, "ratio")}


def timed(method: str, batch: int, images: int, ratios: dict[int, float], **timing: Any) -> RunRecord:
    """A run without tasks that timed answers."""
    record = make_record(method, 0.5, (), batch_size=batch, latency=f"mine images {images}")
    assert record.cost is not None
    record.cost.timing = {
        "stages": {"prefill": lane(ratios[1]), "decode": lane(0.97), "selection": {"this": lane(0.1)["this"]}},
        "end_to_end": {str(n): lane(ratio) for n, ratio in ratios.items()},
        "conditions": {"before": CONDITIONS, "after": CONDITIONS},
        "invalid": [], "batch": batch, "images": images, "protocol": "mine",
    } | timing  # fmt: skip
    return record


@pytest.fixture
def store(tmp_path: Path) -> Path:
    put(tmp_path, timed("pyramiddrop", 1, 1, {1: 0.5, 8: 0.8, 64: 0.99}), experiment="even")
    put(tmp_path, timed("pyramiddrop", 4, 1, {1: 0.5, 8: 0.7, 64: 0.9}), experiment="even")
    put(tmp_path, timed("fastv", 1, 2, {1: 1.2, 8: 1.1, 64: 1.0}, invalid=["others compute here"]), experiment="even")
    return tmp_path


def test_break_even_is_read_off_the_intervals(store: Path) -> None:
    found = break_even.curves(load_experiment(store, "even").runs)
    assert [(c.run.record.spec.method, c.batch, c.images) for c in found] == [
        ("fastv", 1, 2), ("pyramiddrop", 1, 1), ("pyramiddrop", 4, 1)
    ]  # fmt: skip
    fastv, alone, four = found
    assert alone.lengths == (1, 8, 64) and alone.speedup == pytest.approx((2, 1.25, 1 / 0.99))
    assert alone.pays_until == 8, "at 64 tokens the interval holds 1"
    assert four.pays_until == 64 and fastv.pays_until is None and not fastv.valid


def test_the_page_and_the_figure_of_a_break_even_experiment(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "even", "--results", str(store)]) == 0
    said = capsys.readouterr().out
    assert "1.25 [1.23, 1.28]" in said and "others compute here" in said and "invalid" in said
    assert (store / "tables/even.md").read_text() in said
    assert main(["figures", "even", "--results", str(store)]) == 0
    assert (store / "figures/even.png").read_bytes()[:4] == b"\x89PNG"


def test_times_of_other_conditions_are_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"before": CONDITIONS | {"attention_tower": "eager"}, "after": CONDITIONS}
    put(store, timed("random", 1, 1, {1: 0.5}, conditions=other), experiment="even")
    assert main(["tables", "even", "--results", str(store)]) == 1
    assert "may not be compared. attention_tower: " in capsys.readouterr().err


@pytest.mark.parametrize("name", EQUAL_CONDITIONS)
def test_no_table_shows_times_of_two_conditions(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of scores: such as those of two kernels, or of two generations of cards."""
    for method, value in (("fastv", "one"), ("random", "other")):
        record, now = make_record(method, 0.5), CONDITIONS | {name: value}
        assert record.cost is not None
        record.cost.timing = timed(method, 1, 1, {1: 0.5}, conditions={"before": now, "after": now}).cost.timing  # type: ignore[union-attr]
        put(tmp_path, record)
    put(tmp_path, make_record("none", 1.0))
    with pytest.raises(ValueError, match=rf"{name} \(times are shown\): one in .*; other in .*"):
        table_of(tmp_path)
    if name == "sdpa_kernels":
        assert main(["tables", "demo", "--results", str(tmp_path)]) == 1
        assert "sdpa_kernels (times are shown): one in " in capsys.readouterr().err
        assert not (tmp_path / "tables").exists()
        assert main(["tables", "demo", "--no-times", "--results", str(tmp_path)]) == 0


@pytest.mark.parametrize(("mhz", "refused"), [(1900.0, False), (1410.0, True), (None, False)])
def test_times_of_another_clock_are_refused(tmp_path: Path, mhz: float | None, refused: bool) -> None:
    from analysis.comparison.comparable import time_mixtures

    for method, clock in (("fastv", 1980.0), ("random", mhz)):
        now = CONDITIONS | {"device": "cuda", "clock_mhz": clock}
        put(tmp_path, timed(method, 1, 1, {1: 0.5}, conditions={"before": now, "after": now}), experiment="even")
    runs = load_experiment(tmp_path, "even").runs
    found = [mixture.text for mixture in time_mixtures(runs) if "clock_mhz" in mixture.text]
    assert bool(found) is refused, "within 5 %, or not noted, they stand together"
    if refused:
        assert "1410.0 in " in found[0]
        with pytest.raises(ValueError, match=r"clock_mhz: 1980 and 1410, more than 5% apart|clock_mhz: 1410 and 1980"):
            break_even.curves(runs)


def test_the_time_of_selection_on_a_gpu_is_a_bound(tmp_path: Path) -> None:
    from analysis.tables.costs import times

    record = make_record("fastv", 0.5)
    lane = {"this": {"median": 3.25}, "ratio": {"median": 0.5}}
    stages = {"prefill": lane, "decode": lane, "selection": lane, "vision": lane}
    for notes, shown in (({}, "3.25"), ({"notes": {"selection": "an upper bound"}}, "≤ 3.25")):
        assert record.cost is not None
        record.cost.timing = {"invalid": [], "stages": stages} | notes
        row = SimpleNamespace(runs=[SimpleNamespace(record=record)])
        assert times(row) == ["50.0", "50.0", shown, "3.25"]


@pytest.mark.product(2)
@pytest.mark.parametrize("tasks", [(), None], ids=["no tasks", "tasks"])
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "of before it was"])
def test_the_bound_is_one_wherever_it_is_shown(
    tmp_path: Path, tasks: tuple[str, ...] | None, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the record, the Markdown, LaTeX, CSV and the report: never as if it were a time."""
    now = CONDITIONS | {"device": "cuda", "clock_mhz": 1980.0}
    for method in ("none", "fastv"):
        record = make_record(method, 0.5 if method == "fastv" else 1.0, *([] if tasks is None else [tasks]))
        if method == "fastv":
            assert record.cost is not None
            found = timed(method, 1, 1, {1: 0.5}, conditions={"before": now, "after": now}).cost.timing  # type: ignore[union-attr]
            found["stages"]["selection"]["this"]["median"] = 3.2173
            record.cost.timing = found | ({"notes": {"selection": BOUND}} if noted else {}) | {"end_to_end": {}}
        put(tmp_path, record, experiment="bound")
    assert main(["tables", "bound", "--results", str(tmp_path)]) == 0
    assert main(["report", "--results", str(tmp_path)]) == 0
    capsys.readouterr()
    texts = {path.suffix: path.read_text() for path in (tmp_path / "tables").glob("bound.*")}
    texts[".html"] = (tmp_path / "report.html").read_text()
    assert set(texts) == {".md", ".tex", ".csv", ".html"}
    shown = {kind for kind, text in texts.items() if "3.22" in text}
    assert {".md", ".html"} <= shown and (tasks is None) <= (".tex" not in shown)
    bound = {".md": "≤ 3.22", ".tex": r"$\leq$ 3.22", ".csv": "≤ 3.22", ".html": "≤ 3.22"}
    for kind in shown:
        assert texts[kind].count("3.22") == texts[kind].count(bound[kind]) > 0, kind
    assert "follows ≤ is an upper bound" in texts[".md"] and texts[".tex"].isascii()
    if noted:
        assert BOUND in texts[".html"], "the record's raw value is next to its note"


def test_a_table_says_what_enters_each_layer(tmp_path: Path) -> None:
    from analysis.tables.table import grids

    fill(tmp_path, ratios=(0.5,), seeds=1)
    costs = grids(table_of(tmp_path))[-1]
    text = costs.markdown()
    assert costs.title == "What it costs"
    assert "64×12" in text and "64×3, 32×3, 16×3, 8×3" in text and "64×2, 32×10" in text
    assert "TTFT" not in text, "nothing was timed in stages"


def test_invalid_times_are_marked(tmp_path: Path) -> None:
    from analysis.tables.footnotes import warnings
    from analysis.tables.table import grids

    put(tmp_path, make_record("none", 1.0))
    record = make_record("fastv", 0.5)
    assert record.cost is not None
    record.cost.timing = timed("fastv", 1, 1, {1: 0.6}, invalid=["others hold 30.0 GiB of the GPU"]).cost.timing  # type: ignore[union-attr]
    record.cost.prefill_time_ratio = None
    put(tmp_path, record)
    table = table_of(tmp_path)
    assert any("INVALID TIMES" in text and "30.0 GiB" in text for text in warnings(table))
    (row,) = [row for row in grids(table)[-1].rows if row[1].text == "FastV"]
    assert [cell.text for cell in row[-4:]] == ["invalid"] * 4


def test_what_choosing_takes_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = {"median": 0.0123, "iqr": 0.002, "values": [0.01, 0.0123, 0.014]}
    row = {"schedule": "Schedule('0:0.111112')", "flops": 0.0007, "flops_llava_1_5_7b": 0.0002}
    record = {
        "format": 1, "model": {"num_hidden_layers": 32, "hidden_size": 512, "attention": "sdpa"}, "threads": 1,
        "load_before_and_after": [[0.5, 0, 0], [1.5, 0, 0]], "conditions": {"dtype": "float32"},
        "unpruned_cpu_s": {"median": 1.5, "values": [1.4, 1.5, 1.6]},
        "methods": {"scope": row | {"hooks": timed, "twin": timed | {"median": 0.002}, "choosing": timed}},
        "environment": {"processor": "Test CPU", "packages": {"torch": "2", "transformers": "5"}},
    }  # fmt: skip
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/choosing-1.json").write_text(json.dumps(record))
    assert main(["bench", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "tables/bench.md").exists(), "there is no record of prefills"
    (line,) = [line for line in said.splitlines() if line.startswith("| scope")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        "0:0.111112", "1.23", "0.20", "1.23 ± 0.10", "0.07", "0.02"
    ]  # fmt: skip
    assert "1500 ms" in said and "3 rounds" in said


def test_the_benchmark_s_record_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--results", str(tmp_path)]) == 1
    assert "make bench writes one" in capsys.readouterr().err
    row = {"cpu_ratio": lane(0.5)["ratio"], "wall_ratio": lane(0.52)["ratio"], "cpu_ms": lane(0.5)["this"]}
    case = row | {"flops_ratio": 0.49, "flops_ratio_causal": 0.51, "selection_share": 0.02}
    case |= {"short_ratio": lane(0.48)["ratio"], "over_short": lane(1.04)["ratio"]}
    none = {"cpu_ms": lane(1.0)["none"], "again": row}
    record = {
        "format": 3, "model": {"num_hidden_layers": 32, "hidden_size": 512, "attention": "sdpa"}, "threads": 1,
        "load_before_and_after": [[0.5, 0, 0], [1.5, 0, 0]], "conditions": {"dtype": "float32"},
        "prefill": [{"visual": 576, "text": 60, "none": none, "cases": {"SparseVLM-192": case}}],
        "decode": {"visual": 576, "none": none, "cases": {"FastV": row | {"flops_ratio": 0.97}}},
        "official_cpu_ratios": {"576": {"SparseVLM-192": {"its program": 0.47}}},
        "environment": {"processor": "Test CPU", "packages": {"torch": "2", "transformers": "5"}},
    }  # fmt: skip
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/1.json").write_text(json.dumps(record))
    assert main(["bench", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("| SparseVLM-192")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[:6] == ["0.500 [0.490, 0.510]", "0.520", "0.490", "0.510", "0.480", "1.040 [1.019, 1.061]"]
    assert "0.47 (its program)" in said and (tmp_path / "tables/bench.md").read_text() in said
    (tmp_path / "bench/2.json").write_text(json.dumps(record | {"format": 1}))
    with pytest.raises(ValueError, match="is not a benchmark record that this version reads"):
        bench.pages(tmp_path)
