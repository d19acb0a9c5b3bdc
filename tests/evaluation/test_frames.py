"""Videos are shown as evenly spaced frames, in their order; what is not a video is an error that names the file.

pytest tests/evaluation/test_frames.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pdrop.evaluation.frames import FRAMES, frames
from pdrop.evaluation.requests import DocumentPictures


def video(path: Path, length: int) -> Path:
    """A film of `length` frames, the n-th of grey level 10 n."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for number in range(length):
            grey = np.full((32, 32, 3), 10 * number, dtype=np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        film.mux(stream.encode())
    return path


def levels(images: list[Any]) -> list[int]:
    return [round(float(np.asarray(image).mean()) / 10) for image in images]


@pytest.mark.parametrize(("length", "expected"), [(24, [1, 4, 7, 10, 13, 16, 19, 22]), (3, [0, 1, 2])])
def test_frames_are_the_middles_of_equal_parts(tmp_path: Path, length: int, expected: list[int]) -> None:
    shown = frames(video(tmp_path / "film.mp4", length))
    assert levels(shown) == expected and len(shown) <= FRAMES
    assert shown[0].mode == "RGB" and shown[0].size == (32, 32)


def test_a_tasks_video_becomes_pictures(tmp_path: Path) -> None:
    film, still = video(tmp_path / "film.mp4", 16), Image.new("RGB", (8, 8))
    shown = DocumentPictures(lambda document: [str(film), None, still], dict, dict, "")()
    assert levels(shown) == [*range(1, 16, 2), 0] and shown[-1] is still
    assert (
        DocumentPictures(None, dict, dict, "")() == []
        and DocumentPictures(lambda document: None, dict, dict, "")() == []
    )


def test_a_folder_of_frames_is_a_video(tmp_path: Path) -> None:
    folder = tmp_path / "film.mp4"
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(folder / f"{number}.png")
    assert levels(DocumentPictures(lambda document: [str(folder)], dict, dict, "")()) == [
        1,
        4,
        7,
        10,
        13,
        16,
        19,
        22,
    ], "2 before 10"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no frames"):
        frames(tmp_path / "empty")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no video .*missing\.mp4"):
        frames(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be decoded"):
        frames(tmp_path / "text.mp4")
