"""The redundancy study: found in the schedules, drawn with its control, numbers those of the table.

python -m pytest tests/analysis/test_redundancy.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import drawing, style
from analysis.__main__ import main
from analysis.studies import models_figure, redundancy_figure
from analysis.studies import tradeoff_figure as figure
from analysis.studies.redundancy import studies
from tests.support.records import TASKS, answers, grid, make_record, put, standard, table_of

LAYERS, KEEPS = [1, 3, 6, 9], [0.0, 0.1, 0.25, 0.5]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a redundancy study, under another name; tests only read it."""
    return grid(tmp_path_factory.mktemp("store"))


def test_the_grid_is_found_in_the_schedules(store: Path) -> None:
    (study,) = studies(table_of(store, "cuts"))
    assert (study.layers, study.keeps) == (LAYERS, KEEPS)
    assert len(study.ranked) == len(study.blind) == 16 and study.none is not None
    for (layer, keep), row in study.ranked.items():
        assert row.spec.method == "pyramiddrop" and row.spec.schedule == f"{layer}:{keep:g}"
        assert study.blind[layer, keep].spec.method == "random"


def test_one_layer_or_several_stages_are_no_study(tmp_path: Path) -> None:
    table = table_of(standard(tmp_path))
    assert studies(table) == [] and list(redundancy_figure.files(table)) == []


def test_a_control_with_other_positions_is_none(tmp_path: Path) -> None:
    for layer in (1, 3):
        for keep in (0.1, 0.5):
            put(tmp_path, make_record("fastv", keep, at=layer, positions="original"))
            put(tmp_path, make_record("random", keep, at=layer, positions="compact"))
    (study,) = studies(table_of(tmp_path))
    assert study.method == "fastv" and study.blind == {} and study.none is None


def test_the_map_holds_the_paired_differences(store: Path) -> None:
    table = table_of(store, "cuts")
    (study,) = studies(table)
    drawn = redundancy_figure.heat(study)
    assert drawn is not None and len(drawn.axes) == 3
    texts = [[text.get_text() for text in axes.texts] for axes in drawn.axes]
    for panel, (rows, base) in enumerate(((study.ranked, None), (study.blind, None), (study.ranked, study.blind))):
        for place, row in rows.items():
            other = base[place] if base else study.none
            change = [
                np.mean(answers(row.runs[0].record, task, 60)) - np.mean(answers(other.runs[0].record, task, 60))
                for task in TASKS
            ]
            shown = f"{100 * np.mean(change):+.1f}".replace("-", "−")
            assert shown in texts[panel], (panel, place)


def test_figures_are_the_same_bytes_and_show_every_layer(store: Path) -> None:
    assert main(["figures", "cuts", "--results", str(store)]) == 0
    again, pdfs = {}, []
    for _ in range(2):
        curves, _, heat = redundancy_figure.files(table_of(store, "cuts"))
        again |= dict(drawing.saved([curves], pdf=True))
        pdfs.append(again.pop(f"{curves[0]}.pdf"))
    again |= dict(drawing.saved([heat]))
    assert pdfs[0] == pdfs[1] and pdfs[0].startswith(b"%PDF") and b"CreationDate" not in pdfs[0]
    for name, width in (("", drawing.COLUMN), ("-tasks", drawing.PAGE), ("-map", drawing.COLUMN)):
        stem = store / "figures" / f"cuts-redundancy{name}"
        path = stem.with_suffix(".png")
        assert path.read_bytes() == again.pop(path.name, path.read_bytes())
        with Image.open(stem.with_suffix(".png")) as image:
            assert image.width == pytest.approx(300 * width, abs=2)
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        for line in style.layer_lines(4) if name != "-map" else []:
            wanted = [int(line.colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - wanted).sum(1) < 12).sum() > 200, (name, line)
    assert again == {}


def test_a_study_has_no_trade_off_figure(store: Path, tmp_path: Path) -> None:
    assert list(figure.files(table_of(store, "cuts"))) == []
    grid(tmp_path, layers=(3, 6), keeps=(0.1, 0.5))
    put(tmp_path, make_record("fastv", 0.5), experiment="cuts")
    assert len(list(figure.files(table_of(tmp_path, "cuts")))) == 2, "something else was run as well"


def test_layers_grow_lighter_and_differ() -> None:
    for count in (1, 2, 4, 11):
        lines = style.layer_lines(count)
        light = [
            sum(w * int(line.colour[i : i + 2], 16) for w, i in ((0.3, 1), (0.59, 3), (0.11, 5))) for line in lines
        ]
        assert light == sorted(light) and len({line.marker for line in lines}) == count
        assert len(set(light)) == count, "still apart in grey"


def test_models_stand_side_by_side(tmp_path: Path) -> None:
    """Fig. 3: the same cuts on a model trained without dropping and on one trained with it."""
    for model in ("vanilla", "trained"):
        put(tmp_path, make_record("none", 1.0, model=model), experiment="cuts")
        for layer in (1, 6):
            for keep in (0.1, 0.5):
                put(tmp_path, make_record("pyramiddrop", keep, at=layer, model=model), experiment="cuts")
    table = table_of(tmp_path, "cuts")
    names = [name for name, _ in models_figure.files(table)]
    assert names == ["cuts-redundancy-models"]
    drawn = models_figure.side_by_side(table, studies(table))
    assert [axes.get_title() for axes in drawn.axes] == ["cut at layer 1", "cut at layer 6"]
    first, second = drawn.axes[0].containers
    assert {first.get_label(), second.get_label()} == {"vanilla", "trained"}
    for held in (first, second):
        assert np.allclose(held.lines[0].get_xdata(), [10, 50, 100]), "nothing is moved"
    assert first.lines[0].get_color() != second.lines[0].get_color()
    assert first.lines[0].get_marker() != second.lines[0].get_marker()
    assert drawn.get_supxlabel() == "visual tokens kept at the cut (%)"
    assert not list(models_figure.files(table_of(grid(tmp_path / "one"), "cuts"))), "one model has nobody beside it"
