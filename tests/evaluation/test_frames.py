"""Which frames of a video are shown, and that these are what is decoded; what is not a video is an error that names it.

pytest tests/evaluation/test_frames.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from pdrop.evaluation.frames import Film, Sampling
from pdrop.evaluation.requests import DocumentPictures
from tests.support.films import write_film


def given(visual: Any) -> DocumentPictures:
    """What a task's code takes out of a document."""
    return DocumentPictures(visual, dict, dict, "")


def levels(images: Any) -> list[int]:
    return [round(float(np.asarray(image).mean()) / 10) for image in images]


@pytest.mark.parametrize(
    ("sampling", "total", "expected"),
    [
        (Sampling(), 24, [1, 4, 7, 10, 13, 16, 19, 22]),
        (Sampling(), 3, [0, 1, 2]),
        (Sampling(4, "ends"), 12, [0, 3, 7, 11]),  # np.linspace(0, 11, 4, dtype=int), as LLaVA's own code
        (Sampling(4, "ends"), 2, [0, 0, 0, 1]),
        (Sampling(4, "nearest"), 12, [0, 4, 7, 11]),  # torch.linspace(0, 11, 4).round(), as Qwen's
        (Sampling(4, "nearest", group=2), 3, [0, 2]),
        (Sampling(5, "nearest", group=2), 12, [0, 4, 7, 11]),
        (Sampling(4, "nearest", group=2), 1, [0, 0]),
        (Sampling(group=2), 1, [0, 0]),
        (Sampling(1, group=2), 9, [2, 6]),
        (
            Sampling(768, "nearest", fps=2, group=2),
            240,
            [round(n * 239 / 19) for n in range(20)],
        ),  # 10 s
        (Sampling(6, "nearest", fps=2, group=2), 240, [0, 48, 96, 143, 191, 239]),
        (Sampling(768, "nearest", fps=2, group=2), 24, [0, 8, 15, 23]),  # one second: four frames at least
    ],
)
def test_which_frames(sampling: Sampling, total: int, expected: list[int]) -> None:
    assert sampling.places(total, 24.0) == expected


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        ("mp4", "mpeg4", {"g": "6", "bf": "2"}),
        ("mp4", "libx264", {"g": "10", "bf": "3"}),
        ("webm", "libvpx-vp9", {"g": "8"}),
        ("avi", "mpeg4", {}),
    ],
)
def test_frames_are_those_that_decoding_the_whole_film_gives(
    tmp_path: Path, ending: str, codec: str, options: dict[str, str]
) -> None:
    film = write_film(tmp_path / f"film.{ending}", 40, codec=codec, noise=True, **options)
    with av.open(str(film)) as opened:
        whole = [frame.to_image() for frame in opened.decode(video=0)]
    for sampling in (Sampling(), Sampling(3, "ends"), Sampling(40), Sampling(64, "ends")):
        video = Film(film).show(sampling)
        assert (video.total, video.rate) == (40, 8.0) and list(video.places) == sampling.places(40, 8.0)
        for place, frame in zip(video.places, video.frames, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(whole[place])), place
    assert video.seconds == 5 and video.times[-1] == 39 / 8


def test_a_tasks_video_is_a_film(tmp_path: Path) -> None:
    film, still = write_film(tmp_path / "film.mp4", 16), Image.new("RGB", (8, 8))
    asked = given(lambda document: [str(film), None, still])
    assert asked() == [Film(film), still] and given(None)() == [] == given(lambda document: None)()
    glance = asked.glance()
    assert glance.sizes == ((8, 8),) and glance.films == (Film(film),) and glance.named


def test_what_is_shown_is_known_from_the_header(tmp_path: Path) -> None:
    for ending in ("mp4", "avi", "webm"):
        codec = "libvpx-vp9" if ending == "webm" else "mpeg4"
        film = Film(write_film(tmp_path / f"film.{ending}", 24, (64, 40), codec=codec))
        seen, shown = film.outline(Sampling()), film.show(Sampling())
        assert (seen.places, seen.size, seen.rate) == (shown.places, shown.size, shown.rate) and not seen.frames


def test_a_folder_of_frames_is_a_film(tmp_path: Path) -> None:
    folder = tmp_path / "film.mp4"
    folder.mkdir()
    for number in range(24):
        Image.new("RGB", (8, 8), (10 * number,) * 3).save(folder / f"{number}.png")
    (film,) = given(lambda document: [str(folder)])()
    assert levels(film.show(Sampling()).frames) == [1, 4, 7, 10, 13, 16, 19, 22], "2 before 10"
    assert film.show(Sampling()).rate == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no frame"):
        Film(tmp_path / "empty").show(Sampling())


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no video .*missing\.mp4"):
        Film(tmp_path / "missing.mp4").show(Sampling())
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be decoded"):
        Film(tmp_path / "text.mp4").show(Sampling())
    whole = write_film(tmp_path / "film.avi", 40, noise=True)
    (tmp_path / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    cut = Film(tmp_path / "cut.avi").show(Sampling())
    assert 0 < cut.total < 40 and len(cut.frames) == min(8, cut.total), "of a film that is cut short, what there is"
