"""Where the visual tokens of a forward are in its pictures, and what goes through the vision tower.

Methods that thin out a grid, overlays and FLOPs all use what is read here from the model's inputs.

Processors have few layouts, which are recognised by the inputs and their sizes, not by the kind of model:

    image_grid_thw, video_grid_thw [n, 3]     frames, height and width in patches, several of which make one token
    image_sizes with pinpoints                a small picture, then the tiles joined, cut to size, a newline per row
    image_sizes without                       height and width in pixels
    pixel_values, pixel_values_videos         crops or frames of a fixed size, each a square, perhaps a class token

`generate` runs the tower before the model, and passes only the features. Then the number of features of each picture
is known, and its rows follow from three-dimensional position ids, from newline features, or from a square shape.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pdrop.engine.sequence import Prompts
from pdrop.engine.visual import encoded
from pdrop.methods.layout import TokenGrid
from pdrop.methods.transfer import read_back


class UnknownLayout(ValueError):
    """Pictures whose layout is none of the above."""


@dataclass(frozen=True)
class SeenPicture:
    """One image, crop or video of a prompt.

    Attributes:
        tokens: How many it became.
        grids: Their grids; numbered from the picture's first token, or from the prompt's once the prompt is known.
            None: to be read from position ids.
        tower: What goes through the tower for it: a number of crops or frames (towers of a fixed size), or (frames,
            height, width) in patches.
    """

    tokens: int
    grids: list[TokenGrid] | None
    tower: int | tuple[int, int, int] = 1


def read_layout(vlm: Any, given: Mapping[str, Any], prompts: Prompts) -> list[list[TokenGrid]]:
    """The grids of each prompt, in the order of its visual tokens. Arguments and errors: see `read_pictures`."""
    rows = read_pictures(vlm, given, prompts.host.ids, prompts.host.visual)
    return [[grid for picture in row for grid in picture.grids or ()] for row in rows]


def read_pictures(vlm: Any, given: Mapping[str, Any], ids: Tensor, visual: Tensor) -> list[list[SeenPicture]]:
    """The pictures of each prompt, in the order of its visual tokens. Waits for the device at most once.

    Args:
        vlm: The model.
        given: The arguments of its forward.
        ids: Input ids of the prompts, [B, L].
        visual: Which are visual tokens, [B, L] bool.

    Raises:
        UnknownLayout: If the layout is none of the above, or makes other numbers of tokens than the prompts have.
    """
    given, counts = on_host(given), visual.sum(1).tolist()
    video_id = getattr(vlm.config, "video_token_id", None)
    videos = [
        name for named in (given, encoded(given)) for name in named if "video" in name and named[name] is not None
    ]
    kinds: list[list[bool]]  # whether each of a prompt's visual tokens is part of a video
    if videos and isinstance(video_id, int):
        kinds = [(row == video_id)[places].tolist() for row, places in zip(ids, visual)]
    else:
        kinds = [[False] * count for count in counts]
    tokens = {video: sum(kind.count(video) for kind in kinds) for video in (False, True)}
    sources = {video: iter(pictures(vlm, given, video, tokens[video])) for video in (False, True) if tokens[video]}
    rows = []
    for number, kind in enumerate(kinds):
        row: list[SeenPicture] = []
        first = 0
        for video, run in groupby(kind):
            end = first + len(list(run))
            while first < end:
                picture = next(sources[video], None)
                if picture is None or first + picture.tokens > end:
                    raise unknown(vlm, f"the pictures make other numbers of tokens than {counts}")
                grids = picture.grids
                if grids is None:
                    places = visual[number].nonzero()[first : first + picture.tokens, 0]
                    grids = numbered(given["position_ids"][-3:, number % given["position_ids"].shape[1], places])
                row.append(replace(picture, grids=moved(grids, first)))
                first += picture.tokens
        rows.append(row)
    return rows


def on_host(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a forward, with those that say sizes and places of its pictures on the host."""
    made = encoded(given)
    names = [] if made.get("image") is not None else ["image_grid_thw", "image_sizes", "batch_num_images"]
    names += [] if made.get("video") is not None else ["video_grid_thw"]
    names += ["position_ids"] if turned(given) and any(one is not None for one in made.values()) else []
    named = {name: given[name] for name in names if isinstance(given.get(name), Tensor)}
    return {**given, **dict(zip(named, read_back(named.values())))}


def turned(given: Mapping[str, Any]) -> bool:
    """Whether position ids have three dimensions, from which the rows of a picture follow."""
    positions = given.get("position_ids")
    return positions is not None and positions.ndim == 3


def moved(grids: list[TokenGrid], by: int) -> list[TokenGrid]:
    """The grids, shifted by this many tokens."""
    return [TokenGrid(by + g.first, g.height, g.width, g.stride) for g in grids]


def unknown(vlm: Any, why: str) -> UnknownLayout:
    """The error of a layout that cannot be read."""
    return UnknownLayout(f"where visual tokens of {type(vlm).__name__} lie in their picture is not known here: {why}")


def pictures(vlm: Any, given: Mapping[str, Any], video: bool, tokens: int) -> Iterator[SeenPicture]:
    """The images (or videos) of a forward, in order; `tokens` is their number of tokens together."""
    made = encoded(given).get("video" if video else "image")
    if made is not None:
        yield from features(vlm, given, made, video)
        return
    grids = given.get("video_grid_thw" if video else "image_grid_thw")
    if grids is not None:
        merge = vlm.config.vision_config.spatial_merge_size
        yield from (frames_of(count, h, w, merge) for count, h, w in grids.tolist())
        return
    sizes = given.get("image_sizes")
    if sizes is not None and not video:
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else [list(size) for size in sizes]
        inner = getattr(vlm, "model", vlm)
        if hasattr(inner, "pack_image_features"):
            yield from (tiled(inner, size, whole) for size, whole in zip(sizes, single_images(given, len(sizes))))
        else:
            side = vlm.config.vision_config.patch_size * getattr(vlm.config, "spatial_merge_size", 1)
            yield from (replace(frames_of(1, h, w, side), tower=1) for h, w in sizes)
        return
    names = ("pixel_values_videos",) if video else ("pixel_values", "pixel_values_images")
    pixels = next((given[name] for name in names if given.get(name) is not None), None)
    if pixels is None:
        raise unknown(vlm, f"there is no {names[0]}")
    yield from fixed(vlm, pixels, video, tokens)


def frames_of(count: int, height: int, width: int, merge: int) -> SeenPicture:
    """Frames of one size in patches, of which a square of merge x merge makes a token, without newlines."""
    rows, columns = height // merge, width // merge
    size = rows * columns
    grids = [TokenGrid(frame * size, rows, columns, columns) for frame in range(count)]
    return SeenPicture(count * size, grids, (count, height, width))


def single_images(given: Mapping[str, Any], images: int) -> list[bool]:
    """For each image, whether it may be tiled: models that count images do not tile images that share a prompt."""
    counts = given.get("batch_num_images")
    return [True] * images if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]


def tiled(inner: Any, size: Sequence[int], tiles: bool) -> SeenPicture:
    """An image of `size` (height, width) that is seen as a small picture and in tiles.

    The model itself packs features of zeros, with ones for newlines: the places of the ones show the rows.
    """
    patches = inner.config.vision_config.image_size // inner.config.vision_config.patch_size
    count = tiles_of(inner, size, tiles)
    packed = pack(inner, torch.zeros(count, patches * patches), size, newline=1)
    return replace(rows_to_newlines(packed == 1, patches), tower=count)


def tiles_of(inner: Any, size: Sequence[int], tiled: bool) -> int:
    """How many tiles an image of `size` (height, width) is cut into, the small one included."""
    if not tiled:
        return 1
    module, config = sys.modules[type(inner).__module__], inner.config
    count = module.image_size_to_num_patches(list(size), config.image_grid_pinpoints, config.vision_config.image_size)
    return int(count)


def pack(inner: Any, values: Tensor, size: Sequence[int], newline: float) -> Tensor:
    """The model's packing of one value per patch, [tiles, patches], and of newlines: one value per token."""
    takes = inspect.signature(inner.pack_image_features).parameters
    names = ("vision_feature_select_strategy", "vision_aspect_ratio")
    more = {name: getattr(inner.config, name) for name in names if name in takes and hasattr(inner.config, name)}
    line = torch.full((1,), float(newline), dtype=values.dtype)
    packed, _ = inner.pack_image_features([values[..., None]], torch.tensor([list(size)]), image_newline=line, **more)
    tokens: Tensor = packed[0][:, 0]
    return tokens


def newlines(inner: Any, features: Sequence[Tensor]) -> dict[int, Tensor]:
    """Which rows of each picture's features [tokens, D] are newlines, [tokens] bool, by id."""
    once = {id(one): one for one in features}  # copies for beams are the same tensors
    return {name: (one == inner.image_newline.to(one)).all(-1) for name, one in once.items()}


def rows_to_newlines(newline: Tensor, patches: int) -> SeenPicture:
    """The grids of a small square picture of `patches` rows and of a large one whose rows end in newlines (or that has
    one newline).

    Args:
        newline: Which tokens are newlines, [tokens] bool.
        patches: Rows and columns of the small picture.
    """
    ends, small = newline.nonzero()[:, 0].tolist(), patches * patches
    grids = [TokenGrid(0, patches, patches, patches)]
    if len(newline) > small + 1:
        stride, height = ends[0] - small + 1, len(ends)
        # if a picture is so narrow that all its columns are padding, only newlines are left
        grids += [TokenGrid(small, height, stride - 1, stride)] if stride > 1 else []
        grids.append(TokenGrid(ends[0], height, 1, stride))
    elif ends:
        grids.append(TokenGrid(small, 1, 1, 1))
    return SeenPicture(len(newline), grids)


def features(vlm: Any, given: Mapping[str, Any], encoding: Any, video: bool) -> Iterator[SeenPicture]:
    """The pictures of features that the tower has already made: `encoding.pooler_output` has an entry for each."""
    if getattr(encoding, "last_hidden_state", None) is None:
        raise unknown(vlm, "the features come without a last_hidden_state, which tells crops and frames")
    made, inner = encoding.pooler_output, getattr(vlm, "model", vlm)
    once = {id(one): len(one) for one in made}.values()  # copies for beams are the same tensors
    towards = len(encoding.last_hidden_state)  # crops or frames
    newline = getattr(inner, "image_newline", None)
    packs = newline is not None and not video and hasattr(inner, "pack_image_features")
    places = turned(given)
    lines = newlines(inner, made) if packs and not places else {}
    ends = dict(zip(lines, read_back(lines.values())))
    for one in made:
        if places:
            yield SeenPicture(len(one), None)
        elif packs:
            vision = inner.config.vision_config
            yield rows_to_newlines(ends[id(one)], vision.image_size // vision.patch_size)
        else:
            crop, rest = divmod(sum(once), towards)
            if video:
                yield framed(vlm, len(one), max(1, towards // len(once)))
            elif rest or not crop or len(one) % crop:
                yield framed(vlm, len(one), 1)
            else:  # an entry may be a prompt of several pictures
                copy = framed(vlm, crop, 1).grids or []
                yield SeenPicture(len(one), [g for n in range(len(one) // crop) for g in moved(copy, n * crop)])


def numbered(positions: Tensor) -> list[TokenGrid]:
    """The frames of a picture from its tokens' positions (time, height, width), [3, tokens].

    A row ends where the width does not grow, a frame where the time changes or the height falls.
    """
    time, high, wide = positions.tolist()
    starts = [j for j in range(1, len(wide)) if wide[j] <= wide[j - 1] or high[j] != high[j - 1]]
    width = starts[0] if starts else len(wide)
    rows = list(range(0, len(wide), width))
    frames = [0] + [b for a, b in zip(rows, rows[1:]) if time[b] != time[a] or high[b] <= high[a]]
    ends = [*frames[1:], len(wide)]
    return [TokenGrid(start, (end - start) // width, width, width) for start, end in zip(frames, ends)]


def fixed(vlm: Any, pixels: Tensor, video: bool, tokens: int) -> Sequence[SeenPicture]:
    """Pictures of crops, or videos of frames, all of one size.

    Args:
        vlm: The model.
        pixels: [..., channels, height, width], for videos [videos, frames, channels, height, width].
        video: Whether they are videos.
        tokens: Their number of tokens together.

    Raises:
        ValueError: If the tokens do not divide evenly, or a frame is not a square.
    """
    frames = pixels.shape[1] if video else 1
    lead = pixels.shape[: 1 if video else -3]
    filled = pixels.reshape(math.prod(lead), -1)
    # rows of zeros pad a batch whose prompts have different numbers of images
    count = int((filled != 0).any(1).sum()) if len(lead) > 1 else len(filled)
    each, rest = divmod(tokens, count) if count else (0, 1)
    if rest:
        raise unknown(vlm, f"{tokens} tokens of {count} pictures")
    return [framed(vlm, each, frames)] * count


def framed(vlm: Any, tokens: int, frames: int) -> SeenPicture:
    """A picture of square frames, each perhaps with a class token before it, and perhaps one newline after all.

    Raises:
        ValueError: If the frames are not squares.
    """
    tail = int(frames > 1 and tokens % frames == 1)
    per, rest = divmod(tokens - tail, frames)
    side, head = math.isqrt(per), 0
    if side * side != per:
        side, head = math.isqrt(per - 1), 1
    if rest or side * side + head != per:
        raise unknown(vlm, f"{tokens} tokens of {frames} frames are not squares")
    grids = []
    for frame in range(frames):
        grids += [TokenGrid(frame * per, 1, 1, 1)] if head else []
        grids.append(TokenGrid(frame * per + head, side, side, side))
    return SeenPicture(tokens, [*grids, *([TokenGrid(tokens - 1, 1, 1, 1)] if tail else [])], frames)
