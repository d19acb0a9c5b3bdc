"""Which tokens of a forward are visual: image and video ids that come with pixels, or with features made of pixels.

An id alone makes no visual token. A text may quote it, a model may generate it, a draft may copy it from the prompt:
there transformers looks up the id's own embedding, and for the engine it is text like any other. Whether the ids are
as many as the features is checked by the model itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# the arguments of forward that hold pixels, of transformers' models
PIXELS = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}


def visual_ids(config: Any) -> list[int]:
    """The input ids of image and video tokens of a model config; empty for a config that has none."""
    ids = (getattr(config, f"{kind}_token_id", None) for kind in PIXELS)
    return [i for i in ids if isinstance(i, int)]


def check_arguments(vlm: nn.Module) -> None:
    """Refuse a model whose pictures come by arguments that are not known here: all its ids would count as text.

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
    """Features that the tower has made already, {"image": ..., "video": ...}."""
    made = given.get("mm_encoder_outputs")
    return {"image": made} if isinstance(made, Tensor) else (made or {})


def visual_tokens(ids: Tensor, given: Mapping[str, Any], config: Any) -> Tensor:
    """Which of the ids are visual tokens, [B, L] bool, without asking the device.

    Args:
        ids: [B, L].
        given: What the model was called with.
        config: The model's.
    """
    made, visual = encoded(given), torch.zeros_like(ids, dtype=torch.bool)
    images, videos = (
        ids == named if isinstance(named := getattr(config, f"{kind}_token_id", None), int) else visual
        for kind in ("image", "video")
    )
    if brought("image", given, made):
        visual = images
    if brought("video", given, made):
        # some models have image ids stand for the frames of a video, too
        visual = visual | videos | (images & ~videos.any())
    return visual


def brought(kind: str, given: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether a forward was given pictures of this kind, as pixels or as features."""
    return made.get(kind) is not None or any(given.get(name) is not None for name in PIXELS[kind])
