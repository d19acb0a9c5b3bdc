"""The frames of a video that a model is shown: which ones, and how they are read.

lmms-eval's video tasks name a file (or a folder of frames): a `Film`. A run shows a `Video` of it: some of its frames,
with their times. The run's protocol says which frames (docs/protocols.md):

    ends      evenly from the first to the last, rounded down; a shorter film repeats frames (LLaVA's own code)
    nearest   the same, rounded to the nearest; a shorter film gives all its frames (Qwen's)
    middles   the middles of equal parts; a shorter film gives all its frames (InternVL's)

Files are read by PyAV on the CPU. Frames are numbered in display order, by the time stamps of their packets, and
decoding starts at the last key frame before a chosen frame, so only parts of a long film are decoded.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pdrop.pictures import read
from pdrop.record import FrameSampling

if TYPE_CHECKING:
    from PIL.Image import Image

STILLS_PER_SECOND = 3.0  # for a folder of frames: MVBench's TVQA episodes, the only such data
FEWEST = 4  # least number of frames with `fps`, if the film has as many (Qwen's own code)


@dataclass(frozen=True)
class Sampling:
    """Which frames are shown.

    Attributes:
        frames: Number of frames, or with `fps` the most.
        rule: One of the rules above.
        fps: Frames per second of the film; None: `frames`, whatever its length.
        group: How many frames the model takes together: a film shows a multiple of it, if need be by repeating frames
            (as qwen-vl-utils' `fetch_video` does with a list of frames, and Qwen's processors with an odd last one).
    """

    frames: int = 8
    rule: FrameSampling = "middles"
    fps: float | None = None
    group: int = 1

    def places(self, total: int, rate: float) -> list[int]:
        """The numbers of the frames to show of a film of `total` frames at `rate` per second, ascending."""
        wanted = self.frames
        if self.fps is not None:
            wanted = min(max(total / rate * self.fps, FEWEST), self.frames)  # type: ignore[assignment]
        if self.rule != "ends" or self.fps is not None:
            wanted = min(wanted, total)
        wanted = max(self.group, math.floor(wanted / self.group) * self.group)
        if self.rule == "middles":
            return [int((place + 0.5) * total / wanted) for place in range(wanted)]
        spread = np.linspace(0, total - 1, wanted)
        return [int(place) for place in (spread if self.rule == "ends" else spread.round())]


@dataclass(frozen=True)
class Video:
    """What is shown of a film.

    Attributes:
        places: The numbers of its frames in the film.
        total: Number of frames of the film.
        rate: Of these in a second.
        size: (width, height) of a frame, in pixels.
        frames: The frames, RGB, in order; (): not decoded.
    """

    places: tuple[int, ...]
    total: int
    rate: float
    size: tuple[int, int]
    frames: tuple[Image, ...] = ()

    @property
    def seconds(self) -> float:
        """Length of the whole film, in seconds."""
        return self.total / self.rate

    @property
    def times(self) -> list[float]:
        """When each frame is shown, in seconds."""
        return [place / self.rate for place in self.places]


@dataclass(frozen=True)
class Film:
    """A video's file, or the folder of its frames as pictures, in the order of the numbers in their names."""

    path: Path

    def show(self, sampling: Sampling, fit: Callable[[Image, int], Image] | None = None) -> Video:
        """The frames that a run shows.

        Args:
            sampling: Which frames.
            fit: Resizes a frame, given the number of frames; called for each as soon as it is decoded.

        Raises:
            ValueError: If there is no such file, or no frame in it that can be decoded.
        """
        if self.path.is_dir():
            return _shown(_stills(self.path), sampling, fit)
        if not self.path.is_file():
            raise ValueError(f"no video {self.path}: the task's data is not all here")
        with _naming(self.path):
            try:
                return _shown(_indexed(self.path), sampling, fit)
            except LookupError:  # its packets are not its frames
                return _shown(_counted(self.path), sampling, fit)

    def outline(self, sampling: Sampling) -> Video:
        """The result of `show` without the frames, according to the file's header: a file may have fewer frames.

        Raises:
            ValueError: As `show` does.
        """
        if self.path.is_dir():
            return self.show(sampling)
        import av

        with _naming(self.path), contextlib.closing(av.open(str(self.path))) as film:
            stream = film.streams.video[0]
            rate = _rate(stream)
            seconds = (film.duration or 0) / 1_000_000  # FFmpeg's own unit of time
            total = max(1, stream.frames or round(seconds * rate))
            return Video(tuple(sampling.places(total, rate)), total, rate, (stream.width, stream.height))


@dataclass(frozen=True)
class _Reader:
    """Reads the frames of a film.

    Attributes:
        path: The film.
        total: Number of its frames.
        rate: Of these in a second.
        read: Function that yields the frames at ascending places, each with its place.
    """

    path: Path
    total: int
    rate: float
    read: Callable[[list[int]], Iterator[tuple[int, Image]]]


def _shown(reader: _Reader, sampling: Sampling, fit: Callable[[Image, int], Image] | None) -> Video:
    if not reader.total:
        raise ValueError(f"{reader.path} has no frame")
    places = sampling.places(reader.total, reader.rate)
    made: dict[int, Image] = {}
    for place, frame in reader.read(sorted(set(places))):
        made[place] = frame if fit is None else fit(frame, len(places))
    frames = tuple(made[place] for place in places)
    return Video(tuple(places), reader.total, reader.rate, frames[0].size, frames)


def _stills(folder: Path) -> _Reader:
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    pictures.sort(key=lambda path: ([int(digits) for digits in re.findall(r"\d+", path.stem)], path.name))

    def frames(places: list[int]) -> Iterator[tuple[int, Image]]:
        for place in places:
            if (picture := read(pictures[place])) is None:
                raise ValueError(f"{pictures[place]} is no picture, in a folder of a video's frames")
            yield place, picture.convert("RGB")

    return _Reader(folder, len(pictures), STILLS_PER_SECOND, frames)


def _rate(stream: Any) -> float:
    """Frames per second of a stream."""
    return float(stream.average_rate or stream.guessed_rate or 1)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    import av

    try:
        yield
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


def _indexed(path: Path) -> _Reader:
    """A file whose frames are found by the time stamps of its packets.

    Raises:
        LookupError: If packets have no time stamps; when read, if a packet gives no frame.
    """
    import av

    with contextlib.closing(av.open(str(path))) as film:
        stream = film.streams.video[0]
        rate = _rate(stream)
        packets = [packet for packet in film.demux(stream) if packet.size and not packet.is_discard]
    stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
    if len(set(stamps)) < len(packets):
        raise LookupError(f"{path} has no time stamps")
    keys = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
    return _Reader(path, len(stamps), rate, functools.partial(_sought, path, stamps, keys))


def _sought(path: Path, stamps: list[int], keys: list[int], places: list[int]) -> Iterator[tuple[int, Image]]:
    """Yields the frames at ascending places, by the time stamps of all frames and of key frames."""
    import av

    with contextlib.closing(av.open(str(path))) as film:
        stream = film.streams.video[0]
        frames, last = film.decode(stream), stamps[0] - 1  # the time stamp that was decoded last
        for place in places:
            key = bisect.bisect_right(keys, stamps[place])
            if key and keys[key - 1] > last:
                film.seek(keys[key - 1], stream=stream)
                frames = film.decode(stream)
            found = next((frame for frame in frames if frame.pts is not None and frame.pts >= stamps[place]), None)
            if found is None or found.pts != stamps[place]:
                raise LookupError(f"frame {place} of {path} does not come out of the decoder")
            last = found.pts
            yield place, found.to_image().convert("RGB")


def _counted(path: Path) -> _Reader:
    """A file whose frames are found by counting the decoder's output."""
    import av

    def every() -> Iterator[Any]:
        with contextlib.closing(av.open(str(path))) as film:
            yield from film.decode(video=0)

    def frames(places: list[int]) -> Iterator[tuple[int, Image]]:
        wanted = set(places)
        for place, frame in enumerate(every()):
            if place in wanted:
                yield place, frame.to_image().convert("RGB")

    with contextlib.closing(av.open(str(path))) as film:
        rate = _rate(film.streams.video[0])
    return _Reader(path, sum(1 for _ in every()), rate, frames)
