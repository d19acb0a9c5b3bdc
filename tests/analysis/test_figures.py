"""Figures: every method is drawn, no two look alike, bars are the paired intervals.

python -m pytest tests/analysis/test_figures.py
"""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import drawing, style
from analysis.__main__ import main
from analysis.captions import caption
from analysis.statistics import Estimate
from analysis.store.load import load_runs
from analysis.studies import tradeoff_figure as figure
from tests.support.records import TASKS, make_record, put, standard, table_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that tests only read."""
    return standard(tmp_path_factory.mktemp("store"))


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """A results folder that a test may change."""
    return Path(shutil.copytree(store, tmp_path / "results"))


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """The same with the fewest runs and tasks that have both figures of a trade-off."""
    for method, ratio in (("none", 1.0), ("pyramiddrop", 0.5), ("pyramiddrop", 0.3)):
        put(tmp_path / "results", make_record(method, ratio, TASKS[:2]))
    return tmp_path / "results"


def test_figures_show_every_method(copied: Path) -> None:
    assert main(["figures", "--pdf", "--results", str(copied)]) == 0
    for name, width in (("demo-tradeoff", drawing.COLUMN), ("demo-tradeoff-tasks", drawing.PAGE)):
        assert (copied / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(copied / "figures" / f"{name}.png") as image:
            assert image.width == pytest.approx(300 * width, abs=2)
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        for method in ("pyramiddrop", "fastv", "random"):
            colour = style.LINES[method].colour
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).sum(1) < 12).sum() > 300, (name, method)


def test_points_stand_where_they_were_measured_and_axes_hold_their_axis(store: Path) -> None:
    table = table_of(store)
    drawn, by_task = figure.tradeoff(table, "toy"), figure.tradeoff_by_task(table, "toy")
    assert drawn is not None and by_task is not None
    for axes in (*drawn.axes, *(one for one in by_task.axes if one.get_visible())):
        for held in axes.containers:
            places = np.sort(held.lines[0].get_xdata())
            rows = [row for row in table.rows if style.method_name(row.spec.method) == held.get_label()]
            costs = [100 * row.cost("prefill_flops_ratio") for row in rows if row.status == "done"]
            assert np.allclose(places, np.sort(costs)), "the FLOPs of the table"
            assert held.lines[0].get_markerfacecolor() == "none", "what lies below is seen"
    assert drawn.axes[0].get_xlabel() == by_task.get_supxlabel() == "prefill FLOPs (% of none)"
    assert drawn.axes[0].get_ylabel() == "average score of 3 tasks (%)"
    named = [text.get_text() for text in drawn.axes[0].texts]
    assert {"none", "PyramidDrop", "FastV", "Random"} <= set(named) and not drawn.legends, "named beside the curves"


def test_the_average_of_one_task_is_the_score_of_it(tmp_path: Path) -> None:
    for method, ratio in (("none", 1.0), ("pyramiddrop", 0.5)):
        put(tmp_path, make_record(method, ratio, tasks=("toy_exist",)))
    assert figure.averaged(table_of(tmp_path)) == "score of toy exist (%)"


def test_two_kinds_of_budget_are_not_joined(tmp_path: Path) -> None:
    put(tmp_path, make_record("none", 1.0))
    for ratio, budget in ((0.5, "flops:0.6"), (0.3, "flops:0.4"), (0.45, "avg_tokens:30"), (0.25, "avg_tokens:20")):
        put(tmp_path, make_record("pyramiddrop", ratio), budget=budget)
    drawn = figure.tradeoff(table_of(tmp_path), "toy")
    assert drawn is not None
    held = drawn.axes[0].containers
    assert [len(one.lines[0].get_xdata()) for one in held] == [2, 2]
    assert len({one.lines[0].get_markerfacecolor() for one in held}) == 2
    (key,) = drawn.legends
    kinds = ["equal average tokens", "equal prefill FLOPs"]
    assert [text.get_text() for text in key.get_texts()] == kinds
    by_task = figure.tradeoff_by_task(table_of(tmp_path), "toy")
    assert by_task is not None
    (key,) = by_task.legends
    assert [text.get_text() for text in key.get_texts()][-2:] == kinds, "the panels of tasks say it, too"


def test_every_column_of_panels_ends_in_the_numbers_of_its_axis(tmp_path: Path) -> None:
    tasks = ("toy_exist", "toy_count", "toy_read", "toy_chart")
    for method, ratio in (("none", 1.0), ("pyramiddrop", 0.5)):
        put(tmp_path, make_record(method, ratio, tasks=tasks))
    drawn = figure.tradeoff_by_task(table_of(tmp_path), "toy")
    assert drawn is not None
    drawn.draw_without_rendering()
    shown = [any(one.get_visible() and one.get_text() for one in axes.get_xticklabels()) for axes in drawn.axes]
    visible = [axes.get_visible() for axes in drawn.axes]
    assert visible == [True] * 4 + [False] * 2, "two rows of three"
    assert shown[:4] == [False, True, True, True]


def test_no_label_hides_a_point_or_another_label(store: Path) -> None:
    drawn = figure.tradeoff(table_of(store), "toy")
    assert drawn is not None
    drawn.draw_without_rendering()
    (axes,) = drawn.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    points = [axes.transData.transform(point) for c in axes.containers for point in c.lines[0].get_xydata()]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number]), axes.texts[number].get_text()
        assert not any(box.contains(*point) for point in points), axes.texts[number].get_text()


def test_a_front_joins_what_no_other_method_beats(tmp_path: Path) -> None:
    put(tmp_path, make_record("none", 1.0))
    for ratio in (0.7, 0.5, 0.3):
        put(tmp_path, make_record("pyramiddrop", ratio))
        put(tmp_path, make_record("fastv", ratio))
    table = table_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "MANY", 2)
        drawn = figure.tradeoff(table, "toy")
    assert drawn is not None
    (front,) = (line for line in drawn.axes[0].lines if line.get_label() == figure.FRONT)
    known = [(100 * row.cost("prefill_flops_ratio"), 100 * row.average.score.value) for row in table.rows if row.drops]
    best = sorted(p for p in known if not any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in known))
    assert np.allclose(front.get_xydata(), best) and 1 < len(best) <= len(known)


def test_the_range_is_that_of_the_scores(store: Path) -> None:
    table = table_of(store)
    table.floors = dict.fromkeys(table.tasks, 0.0)
    drawn = figure.tradeoff(table, "toy")
    assert drawn is not None
    (axes,) = drawn.axes
    scores = [100 * row.average.score.value for row in table.rows if row.average]
    low, high = axes.get_ylim()
    assert low > 0 and max(scores) - min(scores) > 0.6 * (high - low), "the guess far below does not flatten them"
    assert "↓ blind guess 0" in [text.get_text() for text in axes.texts]


def test_captions_say_what_bars_mean_in_files_and_on_the_page(store: Path) -> None:
    drawn = figure.tradeoff(table_of(store), "toy")
    assert drawn is not None
    ((_, content),) = drawing.saved([("demo-tradeoff", drawn)])
    with Image.open(io.BytesIO(content)) as image:
        assert "95 % intervals of the paired difference" in image.text["Description"]
    for stem in ("x-redundancy-models", "x-tradeoff-tasks", "break_even", "trainings"):
        assert "95 %" in caption(stem), stem
    assert "random sets share" in caption("x-attention-stability") and caption("overlay-x") == ""


def test_models_in_legends_are_no_folders() -> None:
    for name in ("trained_fastv_seed0", "trained_none_seed2", "my_own_model", "llava_1_5_7b"):
        assert "_" not in style.model_name(name)
    assert style.model_name("trained_fastv_seed0") == "trained with FastV, seed 0"


def test_no_two_methods_look_alike() -> None:
    everything = style.lines([*style.LINES, *(f"new{i}" for i in range(len(style.SPARE_LINES)))])
    assert len({line.colour for line in everything.values()}) == len(everything)
    assert len({line.marker for line in everything.values()}) == len(everything)
    with pytest.raises(ValueError, match="add them to LINES"):
        style.lines([f"new{i}" for i in range(len(style.SPARE_LINES) + 1)])


def test_error_bars_are_the_paired_interval(store: Path) -> None:
    cell = next(row.average for row in table_of(store).rows if row.drops)
    below, above = figure.half_lengths(cell, 100)
    assert below == pytest.approx(100 * (cell.delta.value - cell.delta.low))
    assert above == pytest.approx(100 * (cell.delta.high - cell.delta.value))
    assert figure.half_lengths(replace(cell, delta=Estimate(0.1)), 100) == (0.0, 0.0)


def test_figures_are_drawn_again_only_if_something_changed(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = few

    def said() -> set[str]:
        assert main(["figures", "--results", str(copied)]) == 0
        return {line.split()[0] for line in capsys.readouterr().out.splitlines()}

    assert said() == {"wrote"}
    places = sorted((copied / "figures").glob("demo*"))
    before = [path.stat().st_mtime_ns for path in places]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "files", lambda table: pytest.fail("drawn although nothing changed"))
        assert said() == {"unchanged"}
    assert [path.stat().st_mtime_ns for path in places] == before
    places[0].write_bytes(b"changed by hand")
    assert said() == {"wrote", "unchanged"}
    run = load_runs(copied)[0]
    sample = run.path / "samples" / "toy_exist.jsonl"
    sample.write_text(sample.read_text().replace('"yes"', '"yes, it is"', 1))
    drawn: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "files", lambda table: drawn.append(table.name) or [])
        main(["figures", "--results", str(copied)])
    assert drawn == ["demo"]


def test_of_several_models_those_with_one_budget_a_method_have_no_trade_off(tmp_path: Path) -> None:
    for model, ratios in (("many", (0.3, 0.5)), ("one", (0.5,)), ("none_only", ())):
        put(tmp_path, make_record("none", 1.0, model=model))
        for ratio in ratios:
            put(tmp_path, make_record("pyramiddrop", ratio, model=model))
    assert {name.split("-")[1] for name, _ in figure.files(table_of(tmp_path))} == {"many"}
    for model in ("first", "second"):
        put(tmp_path / "alike", make_record("none", 1.0, model=model))
        put(tmp_path / "alike", make_record("pyramiddrop", 0.5, model=model))
    assert {name.split("-")[1] for name, _ in figure.files(table_of(tmp_path / "alike"))} == {"first", "second"}


def test_pdfs_are_drawn_on_demand_and_never_left_behind(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = few

    def made() -> set[str]:
        return {path.suffix for path in (copied / "figures").iterdir() if not path.name.startswith(".")}

    for options, kinds in (([], {".png"}), (["--pdf"], {".png", ".pdf"}), (["--pdf"], {".png", ".pdf"})):
        capsys.readouterr()
        assert main(["figures", *options, "--results", str(copied)]) == 0
        assert made() == kinds
    assert "wrote" not in capsys.readouterr().out
    assert main(["figures", "--results", str(copied)]) == 0
    assert made() == {".png"}, "a PDF of older numbers beside a new PNG would lie"
    assert "removed" in capsys.readouterr().out


def test_a_palette_changes_nothing_that_is_seen(copied: Path) -> None:
    drawn = figure.tradeoff(table_of(copied), "toy")
    assert drawn is not None
    contents = [drawing.png(drawn, photographs) for photographs in (False, True)]
    small, whole = (Image.open(io.BytesIO(content)) for content in contents)
    assert small.mode == "P" and small.size == whole.size and len(contents[0]) < 0.5 * len(contents[1])
    assert small.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    pixels, wanted = (np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int) for image in (small, whole))
    apart = np.abs(pixels - wanted).max(1)
    assert apart.max() <= 24 and (apart > 8).mean() < 0.01
    colours, counts = np.unique(wanted, axis=0, return_counts=True)
    for colour in colours[np.argsort(-counts)[:10]]:
        assert not apart[(wanted == colour).all(1)].any(), "what is drawn keeps its colour to the bit"
