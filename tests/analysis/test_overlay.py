"""Overlays: the patches that stayed stay in colour, at their places; what has no square grid is refused.

python -m pytest tests/analysis/test_overlay.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.__main__ import chosen, main
from analysis.overlays import overlay, pictures
from analysis.overlays.pictures import views
from analysis.store.load import load_runs, samples_of
from analysis.store.samples import Sample, unpack
from pdrop import thumbnails
from tests.support.records import make_record, masks, put, rewrite, run_of, standard

RED = np.array([1.0, 0.0, 0.0])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A results folder."""
    return standard(tmp_path / "results")


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A folder of red images, wider than high, one for each image id of the store."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (40, 30), "red").save(folder / f"image{number}.png")
    return folder


def test_masks_are_read_bit_by_bit() -> None:
    assert unpack("5", 4).tolist() == [True, False, True, False]
    assert unpack("0", 3).sum() == 0
    with pytest.raises(ValueError, match="after the last of 4"):
        unpack("10", 4)


def sample_of(tokens: int, prompt: str = "<image>", layout: list | None = None) -> Sample:
    """A sample that keeps everything."""
    return Sample("1", prompt, "?", "yes", "yes", 1.0, "image1", tokens, (), layout)


def test_kept_patches_keep_their_colour_at_their_place() -> None:
    kept = np.zeros(16, dtype=bool)
    kept[[0, 6]] = True  # row 0 column 0; row 1 column 2
    pixels = pictures.kept_panel(pictures.views(sample_of(16), [Image.new("RGB", (80, 80), "red")], "crop"), kept)
    size = len(pixels) // 4
    for token in range(16):
        row, column = divmod(token, 4)
        patch = pixels[row * size : (row + 1) * size, column * size : (column + 1) * size]
        inside = patch[size // 8 : -size // 8, size // 8 : -size // 8]
        assert (np.abs(inside - RED).max() < 1e-9) == kept[token]
        assert kept[token] or np.ptp(patch, axis=2).max() < 1e-9, "a dropped patch is grey"
        assert not kept[token] or np.allclose(patch[[0, -1]], pictures.OUTLINE), "a kept one has an outline"


def test_white_on_white_is_seen() -> None:
    kept = np.zeros(16, dtype=bool)
    kept[[3, 6]] = True  # a corner of the picture, and one inside
    (view,) = pictures.views(sample_of(16), [Image.new("RGB", (80, 80), "white")], "crop")
    pixels = pictures.kept_panel([view], kept)
    outlined = np.isclose(pixels, pictures.OUTLINE).all(2)
    size = len(pixels) // 4
    for token in range(16):
        row, column = divmod(token, 4)
        patch = outlined[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert all(edge.all() == kept[token] for edge in (patch[0], patch[-1], patch[:, 0], patch[:, -1]))
    everything = pictures.kept_panel([view], np.ones(16, dtype=bool))
    assert not np.isclose(everything, pictures.OUTLINE).all(2).any(), "where nothing is dropped nothing is set apart"


@pytest.mark.parametrize(("tokens", "prompt"), [(15, "<image>"), (0, ""), (16, "<image> and <image>")])
def test_without_a_layout_what_is_not_a_square_grid_is_refused(tokens: int, prompt: str) -> None:
    with pytest.raises(ValueError, match="are not a square grid"):
        pictures.views(sample_of(tokens, prompt), [Image.new("RGB", (8, 8))], "crop")


def test_tiles_newlines_and_several_pictures_have_their_places() -> None:
    whole = [0.0, 0.0, 1.0, 1.0]
    layout = [[[2, 2, 0, *whole], [2, 3, 1, *whole]], [[1, 2, 0, *whole]]]
    images = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 10), "red")]
    found = pictures.views(sample_of(14, layout=layout), images, "crop")
    assert [(v.rows, v.columns, v.start) for v in found] == [(2, 2, 0), (2, 3, 4), (1, 2, 12)]
    values = np.arange(14.0)
    assert found[0].cells(values).tolist() == [[0, 1], [2, 3]]
    assert found[1].cells(values).tolist() == [[4, 5, 6], [8, 9, 10]], "newlines 7 and 11 have no place"
    assert found[2].cells(values).tolist() == [[12, 13]]
    kept = np.zeros(14, dtype=bool)
    kept[13] = True
    panel = pictures.kept_panel(found, kept)
    red = (np.abs(panel - RED) < 1e-9).all(2)
    patch = pictures.SIDE // 2
    width = round(patch / 16)
    assert red.sum() == (patch - 2 * width) ** 2, "one patch of the third view, within its outline"
    assert not red[: red.shape[0] // 2].any(), "which stands in the second row of views"
    for wrong, images_ in ((layout[:1], images[:1]), (layout, images[:1])):
        with pytest.raises(ValueError, match=r"layout of 12 tokens for 14|2 pictures were shown, 1 are at hand"):
            pictures.views(sample_of(14, layout=wrong), images_, "crop")


def test_the_picture_is_the_one_the_tower_saw() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste((0, 0, 255), (10, 0, 20, 10))
    (middle,) = pictures.views(sample_of(4), [wide], "crop")
    assert set(np.asarray(middle.picture).reshape(-1, 3).sum(0) > 0) == {False, True}, "blue alone"
    (padded,) = pictures.views(sample_of(9), [wide], "pad")
    pixels = np.asarray(padded.picture)
    third = len(pixels) // 3
    assert pixels.shape == (3 * third, 3 * third, 3)
    assert len(np.unique(pixels[: third // 2].reshape(-1, 3), axis=0)) == 1, "grey above"
    assert (pixels[third + 10, 10] == (255, 0, 0)).all() and (pixels[third + 10, third + 40] == (0, 0, 255)).all()


def test_samples_say_what_was_kept(store: Path) -> None:
    run = run_of(store, "pyramiddrop", "0.5")
    sample = samples_of(run, "toy_ocr")["7"]
    assert sample.question == "toy_ocr, number 7?" and len(sample.kept) == 3
    assert [int(kept.sum()) for kept in sample.kept] == [32, 16, 8]
    assert np.flatnonzero(sample.kept[0]).tolist() == [
        i for i in range(64) if int(masks(run.record, 7)[0], 16) >> i & 1
    ]
    with pytest.raises(ValueError, match="has no task 'toy'"):
        samples_of(run, "toy")


def test_overlay_of_several_runs(store: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(store, method, keep) for method, keep in (("none", ""), ("pyramiddrop", "0.5"), ("random", "0.3"))]
    ids = [run.record.run_id for run in runs]
    options = ["--results", str(store), "--images", str(shown)]
    assert main(["overlay", *ids, *options, "--pdf", "--sample", "toy_ocr:7"]) == 0
    name = "-".join(["overlay-toy_ocr-7", *(run_id[:6] for run_id in ids)])
    assert (store / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert Image.open(store / "figures" / f"{name}.png").mode == "RGBA", "photographs keep their colours"
    samples = [samples_of(run, "toy_ocr")["7"] for run in runs]
    seen = views(samples[0], [Image.new("RGB", (40, 40), "red")], "crop")
    drawn = overlay.overlay(runs, samples, seen)
    panels = [axes for axes in drawn.axes if axes.get_visible()]
    assert len(panels) == 1 + 4 + 4
    assert [axes.get_title() for axes in panels[1:4]] == ["all 64", "from layer 3: 32 of 64", "from layer 6: 16 of 64"]
    assert "PyramidDrop" in panels[1].get_ylabel() and "toy_ocr, number 7?" in drawn.get_suptitle()
    capsys.readouterr()
    assert main(["overlay", *ids, *options]) == 0
    tasks = {line.split("overlay-")[1].split("-")[0] for line in capsys.readouterr().out.splitlines()}
    assert tasks == {"toy_exist", "toy_count", "toy_ocr"}


def test_without_a_wish_a_sample_that_differs_is_shown(store: Path) -> None:
    runs = [run_of(store, "none"), run_of(store, "fastv", "0.3")]
    for task, doc_id in overlay.choose(runs, []):
        before, after = (samples_of(run, task) for run in runs)
        differing = [key for key in before if before[key].answer != after[key].answer]
        assert doc_id == differing[0]


def test_what_cannot_be_shown_is_refused(store: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, failed = run_of(store, "pyramiddrop", "0.5").record.run_id, run_of(store, "fastv", "0.1").record.run_id
    options = ["--results", str(store), "--images", str(shown)]
    for arguments, message in (
        ([run, "--sample", "toy_ocr:999"], "has no sample '999'"),
        ([run, "--sample", "nothing:1"], "has no task 'nothing'"),
        ([failed], "is failed"),
        ([run, "--method", "fastv"], "no run of that method and budget; there are: pyramiddrop at 3:0.5"),
    ):
        assert main(["overlay", *arguments, *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["overlay", run, "--results", str(store), "--images", str(store)]) == 1
    assert "no image named" in capsys.readouterr().err
    assert main(["overlay", run, "--results", str(store)]) == 1
    assert "no image_id image" in capsys.readouterr().err
    rewrite(run_of(store, "fastv", "0.5"), data_hash="other")
    with pytest.raises(ValueError, match="scored on other data"):
        overlay.choose([run_of(store, "none"), run_of(store, "fastv", "0.5")], [])


def test_an_experiment_is_narrowed_by_method_and_budget(store: Path) -> None:
    runs = load_runs(store)
    assert len(chosen(runs, [], [])) == len(runs)
    assert {run.record.spec.method for run in chosen(runs, ["fastv", "none"], [])} == {"fastv", "none"}
    (one,) = chosen(runs, ["fastv"], ["2:0.3"])
    assert one.record.spec.schedule == "2:0.3"


def test_a_task_without_image_names_is_told_what_to_add() -> None:
    with pytest.raises(ValueError, match=r"names no image, and none is kept.* a column image_id.*--images"):
        pictures.read_images(None, None, "mine:0")
    with pytest.raises(ValueError, match=r"no image_id 0f3a in .*test.parquet, and none is kept.* a column image_id"):
        pictures.read_images(None, "0f3a", "mine:0")


def test_more_than_eight_runs_are_several_figures(store: Path, shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [run_of(store, method, keep).record.run_id for method, keep in (("fastv", "0.5"), ("random", "0.3"))]
    options = ["--results", str(store), "--images", str(shown), "--sample", "toy_ocr:7"]
    assert main(["overlay", *ids * 5, *options]) == 0
    first, second = sorted((store / "figures").glob("overlay-toy_ocr-7-*.png"), key=lambda path: -len(path.name))
    assert first.stem.count("-") == 2 + 8 and second.stem.count("-") == 2 + 2


def test_what_a_store_keeps_is_shown_without_the_data(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run_of(store, "fastv", "0.3"), data_hash="0123")
    run, data = run_of(store, "fastv", "0.3"), "0123"
    red = {number: lambda: [Image.new("RGB", (40, 30), "red")] for number in range(30)}
    kept = thumbnails.keep(run.path, "toy_exist", data, red)
    assert kept == store / "pictures" / f"toy_exist-{data}.zip"
    assert thumbnails.keep(run.path, "toy_exist", data, red) is None, "once"
    assert main(["overlay", run.record.run_id, "--results", str(store), "--sample", "toy_exist:7"]) == 0
    (figure,) = (store / "figures").glob("overlay-toy_exist-7-*.png")
    pixels = np.asarray(Image.open(figure).convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (254, 0, 0)).max(1) < 4).mean() > 0.05, "its picture is red"
    assert int(dict(overlay.choose([run], []))["toy_exist"]) < thumbnails.SAMPLES, "of those that are kept"
    assert main(["report", "--results", str(store)]) == 0
    page = (store / "report.html").read_text()
    assert f"toy_exist/{data}/7-0" in page and f"toy_exist/{data}/8-0" not in page
    capsys.readouterr()
    assert main(["overlay", run.record.run_id, "--results", str(store), "--sample", "toy_exist:8"]) == 1
    assert "column image_id" in capsys.readouterr().err
    kept.write_bytes(kept.read_bytes()[:-30])
    assert main(["overlay", run.record.run_id, "--results", str(store), "--sample", "toy_exist:7"]) == 1
    assert f"{kept} is damaged" in capsys.readouterr().err


def test_kept_pictures_are_small_and_few(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1300, 3), dtype=np.uint8)
    assert len(thumbnails.small(Image.fromarray(noise))) <= thumbnails.LARGEST
    videos = {number: lambda: [Image.new("L", (20, 20))] * 9 for number in range(5)}
    assert thumbnails.keep(tmp_path / "runs/a", "films", "0" * 16, videos)
    assert list(map(len, thumbnails.read(tmp_path / "runs/a", "films", "0" * 16).values())) == [9, 9, 9]
    assert thumbnails.keep(tmp_path / "runs/a", "embedded_chart", "0" * 16, videos) is None, "the package has them"
    assert thumbnails.read(tmp_path / "runs/a", "films", "../../x") == {}
    assert thumbnails.keep(tmp_path / "runs/a", "texts", "0" * 16, {0: list}) is None


def test_images_come_from_parquet_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    frame = pd.DataFrame({"image_id": ["a", "b"], "image": [{"bytes": buffer.getvalue()}, {"bytes": b"not asked for"}]})
    frame.to_parquet(tmp_path / "images.parquet")
    assert pictures.read_images(tmp_path / "images.parquet", "a", "toy:1")[0].getpixel((0, 0)) == (255, 0, 0)
    assert pictures.read_images(None, "test-00000", "embedded_chart:0")[0].size[0] > 64
    with pytest.raises(ValueError, match="2 pictures: give --images as a folder with a-0, a-1"):
        pictures.read_images(tmp_path / "images.parquet", "a", "toy:1", 2)
    for name in ("b-0", "b-1"):
        Image.new("RGB", (8, 8), "blue").save(tmp_path / f"{name}.png")
    assert len(pictures.read_images(tmp_path, "b", "toy:1", 2)) == 2
    with pytest.raises(ValueError, match="no image named b-2"):
        pictures.read_images(tmp_path, "b", "toy:1", 3)


def test_a_sample_without_masks_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, make_record("pyramiddrop", 0.5)) / "samples" / "toy_ocr.jsonl"
    path.write_text(json.dumps({"doc_id": 0, "scores": {"acc": 1.0}}) + "\n")
    with pytest.raises(ValueError, match="sample 1 does not say what was answered, or which tokens were kept"):
        samples_of(run_of(tmp_path, "pyramiddrop"), "toy_ocr")
