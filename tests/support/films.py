"""Tiny films: written by the library that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np


def write_film(
    path: Path,
    length: int,
    size: tuple[int, int] = (32, 32),
    rate: int = 8,
    codec: str = "mpeg4",
    noise: bool = False,
    **options: str,
) -> Path:
    """A film of `length` frames of `size` (width, height), the n-th of grey level 10 n, or of noise.

    Args:
        path: Its file; the ending names the container.
        length: Frames.
        size: In pixels, even numbers.
        rate: Frames in a second.
        codec: FFmpeg's name.
        noise: Frames that all differ everywhere.
        options: Of the codec.
    """
    draw = np.random.default_rng(length)
    with av.open(str(path), "w") as film:
        stream: Any = film.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(length):
            shape = (size[1], size[0], 3)
            made = draw.integers(0, 256, shape) if noise else np.full(shape, 10 * number)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(made.astype(np.uint8), format="rgb24")))
        film.mux(stream.encode())
    return path
