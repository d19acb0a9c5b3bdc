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
from analysis.statistics import Estimate
from analysis.store.load import load_runs
from analysis.studies import tradeoff_figure as figure
from tests.support.records import make_record, put, standard, table_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that tests only read."""
    return standard(tmp_path_factory.mktemp("store"))


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """A results folder that a test may change."""
    return Path(shutil.copytree(store, tmp_path / "results"))


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


def test_curves_are_dodged_and_bars_explained(store: Path) -> None:
    table = table_of(store)
    drawn = figure.tradeoff(table, "toy")
    assert drawn is not None
    (axes,) = drawn.axes
    assert "95 % interval of the paired difference to none" in axes.get_xlabel()
    places = {c.get_label(): np.sort(c.lines[0].get_xdata()) for c in axes.containers}
    costs = [100 * row.cost("prefill_flops_ratio") for row in table.rows if row.spec.method == "pyramiddrop"]
    shift = places["PyramidDrop"] - np.sort(costs)
    assert np.allclose(shift, shift[0]) and abs(shift[0]) < 1.01 * figure.DODGE
    assert np.allclose(places["Random"] - places["PyramidDrop"], figure.DODGE), "the same costs, side by side"


def test_no_curve_stands_far_from_its_place() -> None:
    for curves in (1, 2, 3, 6, 11):
        places = [figure.beside(number, curves, 0.7) for number in range(curves)]
        assert max(abs(place) for place in places) <= 0.7 + 1e-9 and sum(places) == pytest.approx(0)
        assert len(set(places)) == curves and places == sorted(places)


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


def test_the_cheaper_of_two_curves_is_moved_to_the_left(copied: Path) -> None:
    for run in load_runs(copied):
        if run.record.spec.method == "random" and run.record.cost:
            run.record.cost.prefill_flops_ratio -= 0.006  # no ranking
            run.record.write(run.path)
    drawn = figure.tradeoff(table_of(copied), "toy")
    assert drawn is not None
    places = {c.get_label(): np.sort(c.lines[0].get_xdata()) for c in drawn.axes[0].containers}
    assert np.allclose(places["PyramidDrop"] - places["Random"], 0.6 + figure.DODGE)


def test_figures_are_drawn_again_only_if_something_changed(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_pdfs_are_drawn_on_demand_and_never_left_behind(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
