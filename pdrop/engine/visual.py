"""Which tokens of a forward are visual: image and video ids that come with pixels, or with features made of pixels.

An id alone makes no visual token. A text may quote it, a model may generate it, a draft may copy it from the prompt:
then transformers looks up the id's own embedding, and the engine treats it as text. The model itself checks that there
are as many ids as features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# arguments of forward that hold pixels in transformers' models
PIXELS = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}


def visual_ids(config: Any) -> list[int]:
    """The input ids of image and video tokens in a model config; empty if it has none."""
    ids = (getattr(config, f"{kind}_token_id", None) for kind in PIXELS)
    return [i for i in ids if isinstance(i, int)]


def check_arguments(vlm: nn.Module) -> None:
    """Refuse a model whose pictures come in arguments that are not known here: all its ids would count as text.

    Raises:
        ValueError: Naming the arguments that are known.
    """
    known = {name for names in PIXELS.values() for name in names}
    if not known & set(inspect.signature(type(vlm).forward).parameters):
        raise ValueError(
            f"{type(vlm).__name__}.forward takes none of {', '.join(sorted(known))}: which ids come with pixels "
            "cannot be told"
        )


def encoded(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Features that the tower has already made, {"image": ..., "video": ...}."""
    made = given.get("mm_encoder_outputs")
    return {"image": made} if isinstance(made, Tensor) else (made or {})


def visual_tokens(ids: Tensor, given: Mapping[str, Any], config: Any) -> Tensor:
    """Which of the ids are visual tokens, [B, L] bool, without waiting for the device.

    Args:
        ids: [B, L].
        given: The arguments of the model's forward.
        config: The model's config.
    """
    made, visual = encoded(given), torch.zeros_like(ids, dtype=torch.bool)
    images, videos = (
        ids == named if isinstance(named := getattr(config, f"{kind}_token_id", None), int) else visual
        for kind in ("image", "video")
    )
    if brought("image", given, made):
        visual = images
    if brought("video", given, made):
        # some models use image ids for the frames of a video too
        visual = visual | videos | (images & ~videos.any())
    return visual


def brought(kind: str, given: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether a forward was given pictures of this kind, as pixels or as features."""
    return made.get(kind) is not None or any(given.get(name) is not None for name in PIXELS[kind])
