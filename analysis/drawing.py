"""How every figure is drawn and saved: sizes, fonts, and the same bytes for the same figure (no dates inside files).

A PNG of curves or of a heat map has a palette of 256 colours, which makes it a third as large: lines and areas keep
their colours, and blends at edges change by a few steps of 255, which cannot be seen. Figures with photographs keep all
colours.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .captions import caption

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0  # inches: widths of one column and of the page
DPI = 300
COLOURS, EXACT = 256, 96  # colours of a palette, and how many of them are the figure's most frequent ones
SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # fonts that publishers accept
    "svg.hashsalt": "pdrop",
}


def saved(
    drawn: Iterable[tuple[str, Figure]], pdf: bool = False, photographs: bool = False
) -> Iterator[tuple[str, bytes]]:
    """Figures as PNG (300 dpi), each with its file name; closes them.

    Args:
        drawn: Stems of file names, and figures.
        pdf: Also as PDF.
        photographs: Whether the figures hold photographs, and so need all colours.
    """
    for stem, figure in drawn:
        with plt.rc_context(SETTINGS):
            told = caption(stem)
            yield f"{stem}.png", png(figure, photographs, told)
            if pdf:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Subject": told or None})
                yield f"{stem}.pdf", buffer.getvalue()
        plt.close(figure)


def hide_the_rest(grid: Any, count: int) -> None:
    """Hide a grid's panels from number `count` on; a panel above one of them has the numbers of its axis itself."""
    across = grid.shape[1]
    for number, axes in enumerate(grid.flat):
        axes.set_visible(number < count)
        if number < count <= number + across:
            axes.tick_params(labelbottom=True)


def png(figure: Figure, photographs: bool, told: str = "") -> bytes:
    """A figure as PNG with its caption as the file's description, and with a palette unless it holds photographs."""
    buffer = io.BytesIO()
    described = {"Description": told} if told else {}
    written: Any = {"format": "png", "dpi": DPI, "metadata": {"Software": None, **described}}
    if photographs:
        figure.savefig(buffer, **written)
        return buffer.getvalue()
    figure.savefig(buffer, **written, pil_kwargs={"compress_level": 0})  # only read back here
    with Image.open(buffer) as image:  # the background is opaque: nothing is lost without transparency
        small = with_palette(image.convert("RGB"))
    buffer = io.BytesIO()
    notes = PngInfo()
    for name, text in described.items():
        notes.add_text(name, text)
    small.save(buffer, "PNG", optimize=True, dpi=(DPI, DPI), pnginfo=notes)
    return buffer.getvalue()


def with_palette(image: Image.Image) -> Image.Image:
    """An RGB image in 256 colours: its most frequent ones are kept, each other one becomes the nearest."""
    parts = np.asarray(image).astype(np.uint32)
    packed = (parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]).ravel()
    found, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
    order = np.argsort(-counts, kind="stable")
    palette, rest = colours[order[:EXACT]], colours[order[EXACT:]]
    if len(rest):
        row = Image.fromarray(rest[None]).quantize(
            COLOURS - EXACT, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        )
        palette = np.concatenate([palette, np.array(row.getpalette(), dtype=np.uint8).reshape(-1, 3)])
    steps = colours[:, None].astype(np.int32) - palette[None]
    nearest = (steps**2).sum(2).argmin(1).astype(np.uint8)
    small = Image.fromarray(nearest[places].reshape(image.height, image.width), "P")
    small.putpalette(palette.tobytes())
    return small
