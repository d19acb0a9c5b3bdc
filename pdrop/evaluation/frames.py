"""A video as the frames that a model is shown: so many pictures, evenly spaced, in their order.

lmms-eval's video tasks name a file. It is shown as FRAMES pictures of one prompt, each the middle of an equal part of
the video: the number that Video-LLaVA reads (arXiv 2311.10122), hence that of PyramidDrop's video tables. Every frame
is a picture of its own to the engine, so a method ranks the tokens of all frames together.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pdrop.pictures import read

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 8


def frames(path: Path, number: int = FRAMES) -> list[Image]:
    """`number` frames of a video, RGB; of a shorter one all it has.

    Args:
        path: A video file, or a folder that holds the frames as pictures, in the order of their names (MVBench's
            episodes).
        number: How many.

    Raises:
        ValueError: If there is no such file, or no frame in it that can be decoded.
    """
    if path.is_dir():
        return stills(path, number)
    import av

    if not path.is_file():
        raise ValueError(f"no video {path}: the task's data is not all here")
    found: list[Image] = []
    try:
        total = count(path)
        wanted = {int((place + 0.5) * total / number) for place in range(number)}
        with contextlib.closing(av.open(str(path))) as video:
            for place, frame in enumerate(video.decode(video=0)):
                if place in wanted:
                    found.append(frame.to_image().convert("RGB"))
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error
    if not found:
        raise ValueError(f"{path} has no frame")
    return found


def sizes(path: Path, number: int = FRAMES) -> list[tuple[int, int]]:
    """(width, height) of the frames that `frames` gives, by the file's header: there may be fewer of them.

    Raises:
        ValueError: As `frames` does.
    """
    if path.is_dir():
        return [image.size for image in stills(path, number)]
    import av

    try:
        with contextlib.closing(av.open(str(path))) as video:
            stream = video.streams.video[0]
            return [(stream.width, stream.height)] * number
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


def stills(folder: Path, number: int) -> list[Image]:
    """`number` of the pictures of a folder, evenly spaced as `frames` are, in the order of the numbers in their names.

    Raises:
        ValueError: If there is no picture in it.
    """
    pictures = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    pictures.sort(key=lambda path: ([int(digits) for digits in re.findall(r"\d+", path.stem)], path.name))
    wanted = sorted({int((place + 0.5) * len(pictures) / number) for place in range(number)}) if pictures else []
    found = [picture for place in wanted if (picture := read(pictures[place])) is not None]
    if not found or len(found) < len(wanted):
        raise ValueError(f"{folder} holds no frames, or some that are no pictures")
    return [picture.convert("RGB") for picture in found]


def count(path: Path) -> int:
    """Frames of a video, counted: what the file's header says need not be so."""
    import av

    with contextlib.closing(av.open(str(path))) as video:
        return sum(1 for _ in video.decode(video=0))
