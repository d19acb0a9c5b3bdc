"""Pictures are shown in one way wherever they are opened: 16-bit greys scaled, photos turned, files read by Pillow.

pytest tests/contracts/test_pictures.py
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from analysis.overlays.pictures import read_images
from analysis.report.samples import uri
from pdrop.evaluation.frames import Sampling
from pdrop.evaluation.requests import DocumentPictures
from pdrop.pictures import as_shown, check, opened, read, take_long_texts
from pdrop.training.conversations import Conversations
from pdrop.training.encode import Encoder
from tests.support.films import write_film as video

GREYS = [0, 100, 256, 1000, 30000, 65535]
SCALED = [0, 0, 1, 4, 117, 255]
ORIENTATION = 0x0112


def noise(width: int = 40, height: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(path: Path, orientation: int) -> Path:
    """A JPEG of 40 x 28 pixels that says how it is to be turned."""
    picture = noise()
    exif = picture.getexif()
    exif[ORIENTATION] = orientation
    picture.save(path, exif=exif)
    return path


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).tolist()


def all_ways(path: Path, folder: Path) -> dict[str, Image.Image]:
    """The picture as each part of the project opens it."""
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (folder / "data.json").write_text(json.dumps([{"image": str(path), "conversations": conversation}]))
    record = Conversations(folder / "data.json")[0]
    (scored,) = DocumentPictures(lambda _: [str(path)], dict, dict, "")()
    (opened,) = DocumentPictures(lambda _: [Image.open(path)], dict, dict, "")()
    (drawn,) = read_images(path.parent, path.stem, "a sample")
    return {
        "scored, by path": as_shown(scored),
        "scored, opened": as_shown(opened),
        "trained": Encoder._open(record.images[0], record),
        "drawn": drawn,
    }


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "big-endian"])
def test_16_bit_greys_are_scaled(kind: str, tmp_path: Path) -> None:
    greys, path = np.array([GREYS], dtype=np.uint16), tmp_path / f"grey.{kind}"
    if kind == "big-endian":
        shown = {"": as_shown(Image.frombytes("I;16B", (6, 1), greys.astype(">u2").tobytes()))}
    elif kind == "pgm":
        path.write_bytes(b"P5 6 1 65535\n" + greys.astype(">u2").tobytes())
        shown = all_ways(path, tmp_path)
    else:
        Image.fromarray(greys).save(path)
        shown = all_ways(path, tmp_path)
    for way, image in shown.items():
        assert image.mode == "RGB" and pixels(image) == [[[grey] * 3 for grey in SCALED]], way


def test_a_task_that_converts_by_itself_is_given_8_bits() -> None:
    """As most of lmms-eval's tasks do; what they are not given to convert stays as it is."""
    deep, still = Image.fromarray(np.array([GREYS], dtype=np.uint16)), noise()
    document = {"image": deep, "images": [still, deep], "question": "What?", "nested": {"image": deep}}
    shown = DocumentPictures(
        lambda d: [d["image"].convert("RGB"), *d["images"], d["nested"]["image"]],
        lambda: document,
        lambda: document,
        "",
    )()
    assert shown[1] is still and document["image"] is deep
    for image in (shown[0], *shown[2:]):
        assert pixels(image.convert("RGB")) == [[[grey] * 3 for grey in SCALED]]


def test_greys_without_a_range_are_refused(tmp_path: Path) -> None:
    for kind in (np.int32, np.float32):
        picture = Image.fromarray(np.array([GREYS], dtype=kind))
        for refuse in (check, as_shown):
            with pytest.raises(ValueError, match=r"32-bit greys \(mode [IF]\).*save it with 8 or 16 bits"):
                refuse(picture)
        path = tmp_path / f"{kind.__name__}.tiff"
        picture.save(path)
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read as a picture \(a picture of 32-bit greys"):
            read(path)
        with pytest.raises(ValueError, match=r"record 0: .*32-bit greys"):  # before anything is loaded
            all_ways(path, tmp_path)
    with pytest.raises(ValueError, match="a visual of type dict"):
        as_shown({"bytes": b""})  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_everywhere(orientation: int, tmp_path: Path) -> None:
    path = photo(tmp_path / "photo.jpg", orientation)
    expected = ImageOps.exif_transpose(Image.open(path))
    assert expected.size == ((28, 40) if orientation > 4 else (40, 28))
    for way, image in all_ways(path, tmp_path).items():
        assert pixels(image) == pixels(expected), way
        assert pixels(as_shown(image)) == pixels(expected), f"{way}: turned once"


def test_a_small_copy_for_the_report_is_turned() -> None:
    content = io.BytesIO()
    exif = (picture := Image.new("RGB", (900, 300))).getexif()
    exif[ORIENTATION] = 6
    picture.save(content, "TIFF", exif=exif)
    shown = Image.open(io.BytesIO(base64.b64decode(uri(content.getvalue()).split(",")[1])))
    assert shown.height > shown.width and ORIENTATION not in shown.getexif()


def test_files_are_pictures_first_and_videos_last(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 120, 240)]
    noise().save(tmp_path / "still.gif")
    noise().save(tmp_path / "no_suffix", "JPEG", quality=60)
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    for name in ("still.gif", "no_suffix", "pages.tiff"):
        shown = read(tmp_path / name)
        assert shown is not None and pixels(shown) == pixels(Image.open(tmp_path / name).convert("RGB")), name
    for path in (tmp_path / "film.gif", video(tmp_path / "film.mp4", 3)):
        assert read(path) is None
        (film,) = DocumentPictures(lambda _, path=path: [path], dict, dict, "")()
        assert len(film.show(Sampling()).frames) == 3
    with pytest.raises(ValueError, match=r"no picture or video .*nowhere\.jpg"):
        DocumentPictures(lambda _: ["/nowhere.jpg"], dict, dict, "")()
    whole = (tmp_path / "no_suffix").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read as a picture .*mend or replace it"):
        DocumentPictures(lambda _: [str(tmp_path / "cut.jpg")], dict, dict, "")()


def test_a_png_with_a_large_comment_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)  # as Pillow has it
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 64 * 2**20)
    picture, texts = noise(), PngImagePlugin.PngInfo()
    texts.add_text("story", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    path = tmp_path / "told.png"
    picture.save(path, pnginfo=texts)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(path).load()
    assert pixels(read(path)) == pixels(picture)
    with opened(path, whole=False) as header:
        assert header.size == picture.size
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": str(path), "conversations": conversation}]))
    record = Conversations(tmp_path / "data.json")[0]
    assert pixels(Encoder._open(record.images[0], record)) == pixels(picture)
    take_long_texts()  # what `datasets` decodes is opened by Pillow alone
    with Image.open(path) as whole:
        whole.load()
        assert pixels(whole.convert("RGB")) == pixels(picture)
