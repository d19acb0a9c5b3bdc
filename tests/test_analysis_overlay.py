"""Overlays: the patches that stayed stay in colour, at their places; what has no square grid is refused.

python -m pytest tests/test_analysis_overlay.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from records import make_record, masks, put, rewrite, run_of, standard

from analysis import overlay
from analysis.__main__ import main
from analysis.kept import samples_of, unpack

RED = np.array([1.0, 0.0, 0.0])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A results folder."""
    return standard(tmp_path / "results")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of red images, wider than high, one for each image id of the store."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(30):
        Image.new("RGB", (40, 30), "red").save(folder / f"image{number}.png")
    return folder


def test_masks_are_read_bit_by_bit() -> None:
    assert unpack("5", 4).tolist() == [True, False, True, False]
    assert unpack("0", 3).sum() == 0
    with pytest.raises(ValueError, match="behind the last of 4"):
        unpack("10", 4)


def test_kept_patches_keep_their_colour_at_their_place() -> None:
    kept = np.zeros(16, dtype=bool)
    kept[[0, 6]] = True  # row 0 column 0; row 1 column 2
    pixels = overlay.patches(Image.new("RGB", (80, 80), "red"), kept)
    size = len(pixels) // 4
    for token in range(16):
        row, column = divmod(token, 4)
        patch = pixels[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert (np.abs(patch - RED).max() < 1e-9) == kept[token]
        assert kept[token] or np.ptp(patch, axis=2).max() < 1e-9, "a dropped patch is grey"


@pytest.mark.parametrize(("tokens", "prompt"), [(15, "<image>"), (0, ""), (16, "<image> and <image>")])
def test_no_square_grid_is_refused(tokens: int, prompt: str) -> None:
    with pytest.raises(ValueError, match="no square grid"):
        overlay.patches(Image.new("RGB", (8, 8)), np.ones(tokens, dtype=bool), prompt)


def test_the_picture_is_the_one_the_tower_saw() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste((0, 0, 255), (10, 0, 20, 10))
    assert set(np.asarray(overlay.as_seen(wide, "crop")).reshape(-1, 3).sum(0) > 0) == {False, True}  # blue alone
    padded = np.asarray(overlay.as_seen(wide, "pad"))
    assert padded.shape == (30, 30, 3) and (padded[10:20] == np.asarray(wide)).all()
    assert len(np.unique(padded[:10].reshape(-1, 3), axis=0)) == 1


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


def test_overlay_of_several_runs(store: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(store, method, keep) for method, keep in (("none", ""), ("pyramiddrop", "0.5"), ("random", "0.3"))]
    ids = [run.record.run_id for run in runs]
    options = ["--results", str(store), "--images", str(pictures)]
    assert main(["overlay", *ids, *options, "--sample", "toy_ocr:7"]) == 0
    name = "-".join(["overlay-toy_ocr-7", *(run_id[:6] for run_id in ids)])
    assert (store / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert (store / "figures" / f"{name}.png").exists()
    drawn = overlay.overlay(runs, [samples_of(run, "toy_ocr")["7"] for run in runs], Image.new("RGB", (40, 40), "red"))
    panels = [axes for axes in drawn.axes if axes.get_visible()]
    assert len(panels) == 1 + 4 + 4
    assert [axes.get_title() for axes in panels[1:4]] == ["all 64", "from layer 3: 32 of 64", "from layer 6: 16 of 64"]
    assert "PyramidDrop" in panels[1].get_ylabel() and "toy_ocr, number 7?" in drawn.get_suptitle()
    capsys.readouterr()
    assert main(["overlay", *ids, *options]) == 0
    shown = {line.split("overlay-")[1].split("-")[0] for line in capsys.readouterr().out.splitlines()}
    assert shown == {"toy_exist", "toy_count", "toy_ocr"}


def test_without_a_wish_a_sample_that_differs_is_shown(store: Path) -> None:
    runs = [run_of(store, "none"), run_of(store, "fastv", "0.3")]
    for task, doc_id in overlay.choose(runs, []):
        before, after = (samples_of(run, task) for run in runs)
        differing = [key for key in before if before[key].answer != after[key].answer]
        assert doc_id == differing[0]


def test_what_cannot_be_shown_is_refused(store: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, failed = run_of(store, "pyramiddrop", "0.5").record.run_id, run_of(store, "fastv", "0.1").record.run_id
    options = ["--results", str(store), "--images", str(pictures)]
    for arguments, message in (
        ([run, "--sample", "toy_ocr:999"], "has no sample '999'"),
        ([run, "--sample", "nothing:1"], "has no task 'nothing'"),
        ([failed], "is failed"),
        ([run] * 9, "8 runs at most"),
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


def test_images_come_from_parquet_too(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    frame = pd.DataFrame({"image_id": ["a", "b"], "image": [{"bytes": buffer.getvalue()}, {"bytes": b"not asked for"}]})
    frame.to_parquet(tmp_path / "images.parquet")
    assert overlay.read_image(tmp_path / "images.parquet", "a", "toy:1").getpixel((0, 0)) == (255, 0, 0)
    assert overlay.read_image(overlay.EMBEDDED, "test-00000", "embedded_chart:0").size[0] > 64


def test_a_sample_without_masks_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, make_record("pyramiddrop", 0.5)) / "samples" / "toy_ocr.jsonl"
    path.write_text(json.dumps({"doc_id": 0, "scores": {"acc": 1.0}}) + "\n")
    with pytest.raises(ValueError, match="line 1 does not say which tokens were kept"):
        samples_of(run_of(tmp_path, "pyramiddrop"), "toy_ocr")
