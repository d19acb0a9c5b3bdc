"""A picture as it is shown: turned as its EXIF says, 8 bits per channel, RGB. The same in scoring, training, drawing.

Pillow alone would clip 16-bit greys (everything from 256 on is white) and ignore the EXIF orientation; FFmpeg
decodes JPEGs differently from Pillow (up to 91 of 255 apart), so a file is opened as a picture first, as a video last.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

LONG_TEXTS = 64 * 2**20  # bytes; a picture's texts are not read here
FILMS = {"MPEG", "FLI"}  # videos that Pillow knows by their first bytes
ANIMATED = {"GIF", "PNG", "WEBP", "AVIF"}  # films where there is more than one frame; several pages or views are not

ORIENTATION, SIDEWAYS = ExifTags.Base.Orientation, (5, 6, 7, 8)  # EXIF: the values that swap width and height


def as_shown(image: Image.Image) -> Image.Image:
    """A copy, RGB. 16-bit greys are scaled: 0..65535 become 0..255.

    Raises:
        ValueError: If it is not a picture, or its greys have no known range (see `check`).
    """
    check(image)
    deep, turned = _deep(image), ImageOps.exif_transpose(image)
    return (_scaled(turned) if deep else turned).convert("RGB")


def size_shown(image: Image.Image) -> tuple[int, int]:
    """Width and height that `as_shown` would give; only the header is read, no pixels.

    They may be swapped for a PNG whose orientation comes after its pixels: Pillow would have to decode it all to know.
    """
    width, height = image.size
    told = image.format != "PNG" or "exif" in image.info
    return (height, width) if told and image.getexif().get(ORIENTATION) in SIDEWAYS else (width, height)


def scaled(document: Any) -> Any:
    """A task's document with its 16-bit pictures scaled: most tasks call `.convert("RGB")` themselves, which clips."""
    if isinstance(document, Image.Image):
        return _scaled(document) if _deep(document) else document
    if isinstance(document, dict):
        return {name: scaled(value) for name, value in document.items()}
    return [scaled(value) for value in document] if isinstance(document, list) else document


def opened(path: Path, whole: bool = True) -> Image.Image:
    """A picture's file, opened by Pillow without the texts of a PNG: nothing here reads them, and Pillow refuses
    the whole picture for a large one.

    Args:
        path: The file.
        whole: Whether its pixels are read, too; texts may follow them.

    Raises:
        OSError, ValueError, SyntaxError: As Pillow does.
    """
    try:
        image = Image.open(path)
        if whole and image.format == "PNG":
            image.load()
        return image
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
        return Image.open(io.BytesIO(without_texts(path.read_bytes())))


def take_long_texts() -> None:
    """Have Pillow open PNGs with texts of up to 64 MiB in this process; it refuses the whole picture above 1 MiB.

    For pictures that a library decodes (`datasets`) without calling `opened`.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, LONG_TEXTS)
    PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, LONG_TEXTS)


def without_texts(png: bytes) -> bytes:
    """The file of a PNG without its text chunks (a chunk: length, kind, content, checksum)."""
    kept, at = [png[:8]], 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(png[at:end])
        at = end
    return b"".join(kept)


def check(image: Image.Image) -> None:
    """Refuse a picture that cannot be shown; only the header is read, no pixels.

    Raises:
        ValueError: If it is not a picture, or has 32-bit greys (modes I and F), whose range is unknown.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"a visual of type {type(image).__name__}: only images can be shown to the model so far")
    if image.mode in ("I", "F") and not _deep(image):
        raise ValueError(
            f"a picture of 32-bit greys (mode {image.mode}), whose range nobody knows: save it with 8 or 16 bits"
        )


def read(path: Path) -> Image.Image | None:
    """The picture in a file, as it is shown; None if the file is something else, such as a video.

    Raises:
        ValueError: If it is a picture that cannot be read; the file is named.
        FileNotFoundError: If there is no such file.
    """
    try:
        with opened(path) as image:
            film = image.format in FILMS or (image.format in ANIMATED and getattr(image, "is_animated", False))
            return None if film else as_shown(image)
    except UnidentifiedImageError:
        return None
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); mend or replace it") from error


def _deep(image: Image.Image) -> bool:
    """Whether its greys have 16 bits; Pillow opens some such files as 32-bit ones, in the range 0..65535."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit greys as 8-bit ones: 65535 becomes 255."""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
