"""Processes the pictures of each prompt separately, or takes them from the cache.

A batch's pictures are those of its prompts, processed one by one and joined: so cached pictures serve other runs and
questions, and a prompt's inputs are the same in any batch. Processors whose outputs cannot be joined this way (because
they pad to the largest picture of the batch, say) are called with the whole batch, and their output is not cached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pdrop.evaluation.answers import Question
from pdrop.evaluation.frames import Video
from pdrop.evaluation.picture_cache import Content, PictureCache
from pdrop.evaluation.requests import DocumentPictures, Glance
from pdrop.evaluation.videos import VideoInputs

if TYPE_CHECKING:
    from PIL.Image import Image

JOINED = {"pixel_values", "image_sizes", "image_grid_thw", "num_patches", "batch_num_images"}
TILES = 5  # dimensions of pixel_values [pictures, tiles, channels, height, width], the second padded with zeros


@dataclass(frozen=True)
class PromptPictures:
    """The pictures of one prompt.

    Attributes:
        contents: Content of each picture.
        pictures: Function that returns them as they are shown; decoded only when needed.
        videos: The frames shown of its films.
    """

    contents: tuple[Content, ...]
    pictures: Callable[[], Sequence[Image]]
    videos: tuple[Video, ...] = ()

    @classmethod
    def of(
        cls, question: Question, scope: str, cache: PictureCache, films: VideoInputs, pixels: float = 1.0
    ) -> PromptPictures:
        """The pictures of a question.

        Args:
            question: The question.
            scope: What else decides which pictures a document has: see `scope_of` in batching.py.
            cache: Has the contents of documents seen before, which are not decoded again.
            films: How films are shown.
            pixels: Share of a frame's pixels that the processor is given.
        """

        def decoded() -> list[Image]:
            return films.show(question.images(), pixels)[0]

        identity = question.images.identity if isinstance(question.images, DocumentPictures) else None
        key = ("contents", scope, identity)
        known: tuple[Content, ...] | None = None if identity is None else cache.get(key)
        if known is not None:
            return cls(known, decoded)
        shown, videos = films.show(question.images(), pixels)
        contents = tuple(Content.of(image, hashed=cache.limit > 0) for image in shown)
        if identity is not None and cache.limit and not videos and not glance(question, scope, cache).named:
            cache.put(key, contents)
        return cls(contents, lambda: shown, tuple(videos))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each."""
        return [content.size for content in self.contents]


def glance(question: Question, scope: str, cache: PictureCache) -> Glance:
    """What is known about a question's pictures without decoding them."""
    images = question.images
    if not isinstance(images, DocumentPictures):
        return Glance.of(images())
    key = ("glance", scope, images.identity)
    found: Glance | None = cache.get(key)
    if found is None:
        found = images.glance()
        if not found.named:
            cache.put(key, found)
    return found


class RowProcessor:
    """Replaces an image processor while a batch is encoded: processes each row separately and joins the results.

    Args:
        inner: The image processor.
        rows: The batch's prompts that have pictures.
        prepare: Applied to a picture before the processor.
        cache: Cache of processed pictures.
        settings: Everything else that the result depends on, in addition to the pictures and the processor's settings.
        kept_as: The model's dtype: floating tensors are cached in it if it is smaller than their own.
    """

    def __init__(
        self,
        inner: Any,
        rows: Sequence[PromptPictures],
        prepare: Callable[[Image], Image],
        cache: PictureCache,
        settings: str,
        kept_as: torch.dtype | None = None,
    ) -> None:
        self.inner, self.rows, self.prepare, self.cache = inner, rows, prepare, cache
        self.settings, self.kept_as = settings, kept_as

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def fetch_images(self, images: Any) -> Any:
        """Passes the placeholders on."""
        return images

    def __call__(self, images: Any, **options: Any) -> Any:
        """The image processor's output for the rows' pictures; the given pictures are only placeholders."""
        said = f"{self.settings} {json.dumps(options, sort_keys=True, default=str)}"
        parts: list[Mapping[str, Any]] = []
        for row in self.rows:
            parts.append(self._part(row, said, options))
            if not joinable(parts):
                whole = [[self.prepare(image) for image in one.pictures()] for one in self.rows]
                return self.inner(whole, **options)
        return joined(parts)

    def _part(self, row: PromptPictures, said: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        key = (row.contents, said)
        kept = self.cache.get(key) if self.cache.limit else None
        if kept is None:
            made = self.inner([[self.prepare(image) for image in row.pictures()]], **options)
            if not self.cache.limit or not joinable([made]):
                return dict(made)
            kept = {name: (self._smaller(value), getattr(value, "dtype", None)) for name, value in made.items()}
            self.cache.put(key, kept, sum(_bytes(value) for value, _ in kept.values()))
            return dict(made)
        return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, (value, dtype) in kept.items()}

    def _smaller(self, value: Any) -> Any:
        """The value in the model's dtype if that is smaller; the model gets it in its own dtype anyway."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if self.kept_as is not None and floating and self.kept_as.itemsize < value.dtype.itemsize:
            return value.to(self.kept_as)
        return value


def joinable(parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an image processor's outputs for several rows can be joined to its output for all of them."""
    first = parts[0]
    if not set(first) <= JOINED or any(set(part) != set(first) for part in parts):
        return False
    for name, value in first.items():
        others = [part[name] for part in parts]
        if isinstance(value, list) and all(isinstance(other, list) for other in others):
            continue
        if not all(isinstance(other, Tensor) for other in others):
            return False
        skipped = 2 if value.ndim == TILES else 1  # dimensions that may differ
        if any(other.ndim != value.ndim or other.shape[skipped:] != value.shape[skipped:] for other in others):
            return False
    return True


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outputs of several rows as one batch."""
    found: dict[str, Any] = {}
    for name, value in parts[0].items():
        others = [part[name] for part in parts]
        if isinstance(value, list):
            found[name] = [item for other in others for item in other]
            continue
        if value.ndim == TILES:
            most = max(other.shape[1] for other in others)
            others = [_filled(other, most) for other in others]
        found[name] = torch.cat(others)
    return found


def _filled(value: Tensor, tiles: int) -> Tensor:
    missing = tiles - value.shape[1]
    if missing == 0:
        return value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)


def _bytes(value: Any) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 8 * len(value)
