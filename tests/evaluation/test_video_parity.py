"""lmms-eval's own wrappers and `protocol=lmms_eval` on videos: token ids, pixels of frames, grids and times, output ids
and answers are equal, one by one.

pytest tests/evaluation/test_video_parity.py        (make parity)
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
from qwen_vl_utils import fetch_video
from transformers.video_utils import load_video

from pdrop.evaluation.frames import Film, Sampling
from pdrop.evaluation.videos import VideoInputs
from tests.evaluation.test_parity import HF, Family, held, ours, theirs
from tests.support.films import write_film
from tests.support.saved_checkpoints import save_internvl, save_llava_onevision, save_qwen, save_video_llava
from tests.support.synthetic_tasks import write_own_task

# of the processor's template, for messages whose content is a text
SIMPLE = (
    "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FAMILIES = {
    # its chat class fails on videos: it takes the sizes of pictures that there are none of
    "llava_onevision": Family(
        save_llava_onevision, "simple.llava_hf.LlavaHf", "float32", {**HF, "chat_template": SIMPLE}
    ),
    "qwen2_5_vl": Family(
        partial(save_qwen, family="Qwen2_5_VL", patch=14), "chat.qwen2_5_vl.Qwen2_5_VL", "bfloat16", {}
    ),
    "qwen3_vl": Family(partial(save_qwen, family="Qwen3VL", patch=16), "chat.qwen3_vl.Qwen3_VL", "bfloat16", {}),
    "internvl": Family(save_internvl, "chat.internvl_hf.InternVLHf", "bfloat16", {}),
    # on a CPU it can only be had by "auto"
    "video_llava": Family(save_video_llava, "simple.video_llava.VideoLLaVA", "float32", {"device_map": "auto"}),
}
FILMS = ((40, (64, 48), 8), (70, (96, 40), 10), (33, (48, 64), 25))  # frames, (width, height), frames in a second


class VideoReader:
    """What wrappers use of decord's, read by PyAV from the first frame to the last."""

    def __init__(self, path: str, ctx: Any = None, num_threads: int = 1) -> None:
        with av.open(path) as film:
            self.rate = float(film.streams.video[0].average_rate)  # type: ignore[arg-type]
            self.frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]

    def __len__(self) -> int:
        return len(self.frames)

    def get_avg_fps(self) -> float:
        return self.rate

    def get_batch(self, places: Sequence[int]) -> Any:
        return types.SimpleNamespace(asnumpy=lambda: np.stack([self.frames[place] for place in places]))


@pytest.fixture(autouse=True)
def decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package by which wrappers read videos: it has not been kept for years."""
    stand_in = types.ModuleType("decord")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("decord", None)
    stand_in.VideoReader, stand_in.cpu = VideoReader, lambda number: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "decord", stand_in)
    monkeypatch.setattr("qwen_vl_utils.vision_process.get_video_reader_backend", lambda: "decord")
    # and for torchcodec, by which InternVL's processor reads them: transformers' own reader of other kinds
    monkeypatch.setattr("transformers.video_processing_utils.is_torchcodec_usable", lambda **_: True)
    monkeypatch.setattr(
        "transformers.video_processing_utils.load_video",
        lambda *of, **given: load_video(*of, **given | {"backend": "pyav"}),
    )
    for name in list(sys.modules):  # those that have looked for it before
        if name.startswith("lmms_eval.models.") and "decord" in vars(sys.modules[name]):
            monkeypatch.setattr(sys.modules[name], "decord", stand_in)
    for name in ("lmms_eval.models.simple.llava_hf",):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "VideoReader", VideoReader)
            monkeypatch.setattr(sys.modules[name], "cpu", stand_in.cpu)


def own_task(folder: Path) -> Path:
    """Films of several lengths, shapes and speeds."""
    folder.mkdir()
    rows = []
    for number, (length, size, rate) in enumerate(FILMS):
        film = write_film(folder / f"{number}.mp4", length, size, rate, noise=True)
        rows.append({"film": str(film), "question": f"What is number {number}?", "answer": "yes"})
    return write_own_task(folder, "watching", datasets.Dataset.from_list(rows), "[row['film']]")


@pytest.mark.parametrize(("patch", "limits"), [(14, (3136, 6272, None)), (16, (4096, 99999, 30000))])
def test_qwens_own_package_makes_the_same_frames(
    patch: int, limits: tuple[int, int, int | None], tmp_path: Path
) -> None:
    """Qwen's fetch_video: which frames, of which size, with which pixels."""
    path = write_film(tmp_path / "film.mp4", 33, (80, 48), 10, noise=True)
    least, most, together = limits
    asked = {"video": str(path), "nframes": 6, "min_pixels": least, "max_pixels": most}
    asked |= {} if together is None else {"total_pixels": together}
    (theirs, about) = fetch_video(asked, image_patch_size=patch, return_video_metadata=True)
    kind = types.SimpleNamespace(patch_size=patch, merge_size=2, temporal_patch_size=2)
    processor = types.SimpleNamespace(video_processor=kind, video_token="<video>")
    _, (video,) = VideoInputs(processor, Sampling(6, "nearest"), limits=limits).show([Film(path)])
    assert list(video.places) == about["frames_indices"] and video.rate == about["fps"]
    found = np.stack([np.asarray(frame) for frame in video.frames])
    assert np.array_equal(found, theirs.permute(0, 2, 3, 1).numpy())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "video_llava"])
def test_lmms_evals_own_wrapper_watches_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = FAMILIES[family]
    watching(kind, kind.save(tmp_path / family), tmp_path, monkeypatch)


@pytest.mark.exhaustive
def test_video_llavas_wrapper_fails_and_with_its_reader_called_as_it_is_defined_watches_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the number of frames without its name, which `read_video` does not take: as it is shipped it answers
    nothing. With that mended all is equal but its prompt, which lacks a line break and has a question mark too many:
    so ours is asked by a template that has both."""
    kind = FAMILIES["video_llava"]
    folder = kind.save(tmp_path / "video_llava")
    with pytest.raises(TypeError, match="read_video"):
        theirs(kind, folder, own_task(tmp_path / "failing"), ["watching"], monkeypatch, tmp_path)
    module = sys.modules["lmms_eval.models.simple.video_llava"]
    read = module.read_video  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "read_video", lambda path, frames: read(path, num_frm=frames))
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("<video>\n", "<video>").replace("{{ c['text'] }}", "{{ c['text'] }}?")
    )
    watching(kind, folder, tmp_path, monkeypatch)


def watching(kind: Family, folder: Path, at: Path, patch: pytest.MonkeyPatch) -> None:
    """Hold a family's wrapper against ours on films."""
    tasks = own_task(at / "tasks")
    one = theirs(kind, folder, tasks, ["watching"], patch, at)
    held(one, ours(kind, folder, tasks, ["watching"], patch, at / "run"))
    assert len(one.calls) == len(FILMS)
    assert any("pixel_values" in name for name in one.calls[0])
