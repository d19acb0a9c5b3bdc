"""Published numbers: the file is sound, and the verdicts say what was and was not reproduced.

python -m pytest tests/analysis/test_repro.py
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import main
from analysis.store.load import load_runs
from analysis.studies import repro
from analysis.studies.repro import Published, compare, read_published
from pdrop.record import RunRecord, Score
from pdrop.schedule import Schedule
from tests.support.records import make_record, put

PYRAMID = "8:0.5 16:0.25 24:0.125"
TASKS = ("gqa", "textvqa_val_ocr", "pope", "mme")


@pytest.fixture(scope="module")
def published() -> list[Published]:
    """The file."""
    return read_published()


def store(results: Path, scores: Mapping[str, float], n_total: int = 60, **changes: Any) -> None:
    """A finished run of LLaVA-1.5-7B under the paper's schedule, with these main scores."""
    record = make_record("pyramiddrop", 0.5, TASKS, **{"model": "llava_1_5_7b", "protocol": "official"} | changes)
    record = replace(record, spec=replace(record.spec, schedule=PYRAMID))
    assert record.cost
    record.cost.paper_macs_visual = 1.777e12
    record.cost.visual_tokens_per_layer = [576.0] * 8 + [288.0] * 8 + [144.0] * 8 + [72.0] * 8
    folder = put(results, record)
    metrics = dict.fromkeys(TASKS, "exact_match") | {"pope": "pope_f1_score", "mme": "mme_perception_score"}
    for task, metric in metrics.items():
        result = record.results[task]
        result.n_total, result.main_metric = n_total, metric
        samples = folder / "samples" / f"{task}.jsonl"
        samples.write_text(samples.read_text().replace('"acc"', f'"{metric}"'))
        result.scores = {metric: Score(scores.get(task, result.scores["acc"].value), 60)}
    record.results["mme"].scores["mme_cognition_score"] = Score(300.0, 60)
    RunRecord.write(record, folder)


def verdicts(results: Path, published: list[Published], table: str, benchmark: str, row: str = "PDrop") -> list[Any]:
    """The verdicts on PyramidDrop's own v2 numbers of a table."""
    return [
        one
        for one in compare(published, load_runs(results))
        if (one.published.version, one.published.table, one.published.benchmark) == ("v2", table, benchmark)
        and row in one.published.row
        and one.published.model == "llava_1_5_7b"
    ]


def test_every_line_is_whole(published: list[Published]) -> None:
    assert len(published) > 800
    seen = set()
    for entry in published:
        assert entry.paper and entry.table and entry.row and entry.benchmark and entry.unit and entry.model, entry
        key = (entry.paper, entry.version, entry.table, entry.row, entry.benchmark, entry.unit)
        assert key not in seen, f"twice: {key}"
        seen.add(key)
        if entry.schedule not in ("", "?"):
            assert str(Schedule.parse(entry.schedule)) == entry.schedule
        assert (entry.schedule == "") == (entry.method == "none"), entry
        assert not (entry.trained == "yes" and entry.task and not entry.differs), "trained weights are not ours"


@pytest.mark.parametrize(
    ("version", "table", "row", "benchmark", "value"),
    [
        ("v2", "1", "LLaVA-NeXT-7B PDrop", "TFLOPs", "9.5"),
        ("v2", "1", "LLaVA-1.5-7B PDrop", "MME", "1500.8"),
        ("v1", "5", "LLaVA-1.5-7B FastV", "DocVQA", "19.2"),
        ("v2", "2", "PDrop, 64 tokens", "GQA", "47.5"),
        ("v2", "2", "SparseVLM, 128 tokens", "Ratio", "93.0"),
        ("v2", "3", "LLaVA-NeXT-7B p9 PDrop", "GPU h", "269"),
        ("v2", "4", "LLaVA-NeXT-7B p9 vanilla", "VizWiz", "58.0"),
        ("v2", "5", "LLaVA-1.5-7B LLaVolta", "avg tokens", "339"),
        ("v2", "7", "LLaVA-1.5-7B lambda 0.6", "InfoVQA", "21.0"),
        ("v2", "8", "Video-LLaVA trained with PDrop", "GPU h", "132"),
        ("v2", "9", "LLaVA-1.5-7B S=5", "POPE", "86.1"),
    ],
)
def test_spot_checks(
    published: list[Published], version: str, table: str, row: str, benchmark: str, value: str
) -> None:
    key = (version, table, row, benchmark)
    assert [e.value for e in published if (e.version, e.table, e.row, e.benchmark) == key] == [value]


@pytest.mark.parametrize(
    ("paper", "row", "model", "benchmark", "value"),
    [
        ("VisionZip", "visionzip, 64 tokens, tuned", "llava_1_5_7b", "POPE", "80.9"),
        ("VisionZip repository, Qwen2_5_VL/README.md", "visionzip, 50 %", "qwen2_5_vl_7b", "OCRBench", "70.5"),
        ("MMTok", "divprune, 64 tokens", "llava_1_5_7b", "Avg", "94.8"),
        ("CDPruner family", "cdpruner, 160 tokens", "llava_next_7b", "MME", "1402.3"),
        ("ViCA", "vispruner, 32 tokens", "llava_1_5_7b", "MMB-CN", "52.7"),
        ("CDPruner family", "prumerge_plus, 32 tokens", "llava_1_5_7b", "TextVQA", "48.7"),
        ("HiPrune (re-run)", "hired, 64 tokens", "llava_1_5_7b", "VQAv2", "69.8"),
        ("RESTORE (re-run)", "holov_redistributed, 11.1 %", "qwen2_5_vl_7b", "Avg", "83.5"),
        ("TOPS", "scope, 160 tokens", "llava_next_13b", "Avg", "95.8"),
        ("DART, arXiv 2502.11494", "dart, 64 tokens", "llava_1_5_7b", "MME", "1765"),
        ("V2Drop, arXiv 2509.01552", "v2drop, 64 tokens", "llava_1_5_7b", "Avg", "86.9"),
        ("FEATHER, arXiv 2412.13180", "FEATHER", "prismatic_siglip_7b", "RefCOCO", "43.4"),
        ("AutoPrune", "pyramiddrop, 64 tokens", "llava_1_5_7b", "MME", "1561"),
    ],
)
def test_spot_checks_of_the_rivals(
    published: list[Published], paper: str, row: str, model: str, benchmark: str, value: str
) -> None:
    key = (paper, row, model, benchmark)
    assert [e.value for e in published if (e.paper, e.row, e.model, e.benchmark) == key] == [value]


def test_a_budget_of_llava_next_is_a_share_of_its_2928_tokens(published: list[Published]) -> None:
    """Runs have newlines, published pictures had none: 640 of 2880 is 0.21858 of 2928, not 0.2222."""
    rows = {(e.tokens, e.schedule) for e in published if e.model.startswith("llava_next") and e.schedule[:2] == "0:"}
    assert {tokens for tokens, _ in rows} == {"640", "320", "160"}
    for tokens, schedule in rows:
        assert int((Schedule.parse(schedule).stages[0].keep or 0) * 2928) == int(tokens)


def test_averages_are_those_of_their_rows(published: list[Published]) -> None:
    """A typing error in a cell of Table 1 or 7 would show; the two that the paper gets wrong carry a note."""
    for table in ("1", "7"):
        rows: dict[str, dict[str, Published]] = {}
        for entry in published:
            if (entry.version, entry.table) == ("v2", table):
                rows.setdefault(entry.row, {})[entry.benchmark] = entry
        assert len(rows) == (6 if table == "1" else 8)
        for row in rows.values():
            scores = [float(e.value) / (20 if e.benchmark == "MME" else 1) for e in row.values() if e.task]
            average = row["Avg"]
            assert abs(sum(scores) / len(scores) - float(average.value)) < 0.06 or "the mean of the row" in average.note


def test_nothing_run_is_no_verdict(published: list[Published], tmp_path: Path) -> None:
    put(tmp_path, make_record("pyramiddrop", 0.5))
    assert {one.verdict for one in compare(published, load_runs(tmp_path))} == {"not run"}


def test_a_score_in_the_interval_is_reproduced(published: list[Published], tmp_path: Path) -> None:
    store(tmp_path, {"pope": 0.8470, "mme": 1495.0})
    (gqa,) = verdicts(tmp_path, published, "1", "GQA")
    assert gqa.ours.low < gqa.ours.value < gqa.ours.high
    expected = gqa.ours.low - 0.05 <= 60.1 <= gqa.ours.high + 0.05
    assert (gqa.verdict == "reproduced") == expected
    near, far = (replace(gqa.published, value=f"{gqa.ours.value + d:.1f}") for d in (0, 40))
    assert [one.verdict for one in compare([near, far], load_runs(tmp_path))] == ["reproduced", "not reproduced"]
    (pope,) = verdicts(tmp_path, published, "1", "POPE")
    assert pope.verdict == "reproduced" and pope.ours.low is None and pope.ours.value == pytest.approx(84.7)
    (mme,) = verdicts(tmp_path, published, "1", "MME")
    assert mme.verdict == "reproduced"
    store(tmp_path / "off", {"pope": 0.80, "mme": 1300.0})
    for benchmark in ("POPE", "MME"):
        (one,) = verdicts(tmp_path / "off", published, "1", benchmark)
        assert one.verdict == "not reproduced"


def test_the_official_rule_counts_where_a_record_has_it(published: list[Published], tmp_path: Path) -> None:
    store(tmp_path, {"pope": 0.417})
    assert verdicts(tmp_path, published, "1", "POPE")[0].ours.value == pytest.approx(41.7)
    (run,) = load_runs(tmp_path)
    run.record.results["pope"].scores["official_f1"] = Score(0.848, 60)
    run.record.write(run.path)
    (pope,) = verdicts(tmp_path, published, "1", "POPE")
    assert pope.ours.value == pytest.approx(84.8) and pope.verdict == "reproduced"


def test_costs_are_held_to_the_printed_digits(published: list[Published], tmp_path: Path) -> None:
    store(tmp_path, {})
    (macs,) = verdicts(tmp_path, published, "1", "TFLOPs")
    assert (macs.verdict, macs.ours.value) == ("reproduced", pytest.approx(1.777))
    (tokens,) = verdicts(tmp_path, published, "5", "avg tokens")
    assert (tokens.verdict, tokens.ours.value) == ("reproduced", pytest.approx(270))
    wrong = replace(macs.published, value="1.79")
    assert compare([wrong], load_runs(tmp_path))[0].verdict == "not reproduced"


def test_another_protocol_says_why(published: list[Published], tmp_path: Path) -> None:
    store(tmp_path, {})
    (text,) = verdicts(tmp_path, published, "1", "TextVQA")
    assert text.published.task == "textvqa_val_ocr" and text.verdict in ("reproduced", "not reproduced")
    assert text.ours.low < text.ours.value < text.ours.high, "with OCR tokens, as printed; lmms-eval's own is no match"
    (trained,) = verdicts(tmp_path, published, "5", "GQA")
    assert trained.verdict == "other protocol" and "trained with dropping" in trained.reason
    store(tmp_path / "few", {}, n_total=12578, protocol="checkpoint")
    (few,) = verdicts(tmp_path / "few", published, "1", "GQA")
    assert (
        few.verdict == "other protocol"
        and "60 of 12578 samples" in few.reason
        and "published numbers are made with protocol=official" in few.reason
    )
    store(tmp_path / "turned", {}, n_total=60)
    (folder,) = (tmp_path / "turned/runs").iterdir()
    record = RunRecord.read(folder)
    record.environment["turned"] = ["image_mode"]
    record.write(folder)
    (turned,) = verdicts(tmp_path / "turned", published, "1", "GQA")
    assert turned.verdict == "other protocol" and "image_mode not as the official protocol has it" in turned.reason
    (sum_of_two,) = verdicts(tmp_path, published, "2", "MME", "PDrop, 192 tokens")
    assert sum_of_two.verdict == "not run", "270 tokens are not 192"


def test_a_budget_is_matched_by_its_tokens(published: list[Published], tmp_path: Path) -> None:
    store(tmp_path, {"mme": 1490.0})
    entry = next(e for e in published if (e.table, e.row, e.benchmark) == ("2", "PDrop, 192 tokens", "MME"))
    (one,) = compare([replace(entry, tokens="268")], load_runs(tmp_path))
    assert one.verdict == "other protocol" and one.ours.value == pytest.approx(1790) and "not published" in one.reason


def test_page_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path, {})
    assert main(["repro", "--results", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "1.78 T MACs" in page and "other protocol" in page and "Comparable, but not run: " in page
    lines = list(csv.DictReader(io.StringIO((tmp_path / "tables" / "repro.csv").read_text())))
    assert {line["verdict"] for line in lines} <= set(repro.VERDICTS)
    run_id = load_runs(tmp_path)[0].record.run_id
    assert {line["run_id"] for line in lines if line["verdict"] != "not run"} == {run_id}
    assert main(["repro", "--results", str(tmp_path)]) == 0
    assert "wrote" not in capsys.readouterr().out


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    text = repro.PUBLISHED.read_text().splitlines()
    for lines, message in (
        ([text[0].replace("unit", "units"), text[1]], "columns"),
        ([text[0], text[1].replace("20.8", "x")], "line 2"),
    ):
        path = tmp_path / "published.csv"
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=message):
            read_published(path)


def test_a_rivals_row_wants_its_schedule_and_its_arguments(published: list[Published], tmp_path: Path) -> None:
    """VisionZip at 64 tokens is 54 + 10; the last digit of a fraction sets nobody apart."""
    for number, contextual in enumerate((10, 30)):
        store(tmp_path / str(number), {}, method_args=f'{{"contextual":{contextual}}}')
        (folder,) = (tmp_path / str(number) / "runs").iterdir()
        record = RunRecord.read(folder)
        spec = replace(record.spec, method="visionzip", schedule="0:0.111111")
        RunRecord.write(replace(record, spec=spec), folder)
        rows = [one for one in published if one.method == "visionzip" and one.paper == "VisionZip"]
        assert {one.schedule for one in rows if one.tokens == "64"} == {"0:0.111112"}
        found = [replace(one, differs="") for one in rows if one.task == "gqa"]
        judged = {one.published.tokens: one for one in compare(found, load_runs(tmp_path / str(number)))}
        assert judged["192"].verdict == "not run"
        assert judged["64"].verdict != "not run"
        assert ("ours: method.contextual=30, not 10" in judged["64"].reason) == (contextual == 30)


def test_no_row_of_pyramiddrop_below_144_tokens_claims_boundaries_that_cannot_reach_it(
    published: list[Published],
) -> None:
    for entry in published:
        if entry.method == "pyramiddrop" and entry.model == "llava_1_5_7b" and entry.tokens in ("128", "64"):
            assert entry.schedule == "?" or Schedule.parse(entry.schedule).layers[0] <= 4, entry
    said = [one.note for one in published if one.benchmark == "TFLOPs" and one.tokens in ("128", "64")]
    assert sum("not at boundaries 8/16/24" in note for note in said) == 2
