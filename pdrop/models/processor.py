"""Checks that a processor counts as many visual tokens as the tower makes: older LLaVA folders lack settings for it.

Their prompts would have a different number of image tokens than features, which fails at the first question.
"""

from __future__ import annotations

from typing import Any

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def refuse_other_tower(processor: Any, config: Any, what: str) -> None:
    """Compare a LLaVA processor's settings for the tower with the config. Other kinds of processors are not checked.

    Args:
        processor: The checkpoint's processor.
        config: The checkpoint's config.
        what: The checkpoint, for the message.

    Raises:
        ValueError: Saying what to set in processor_config.json.
    """
    tower: Any = getattr(config, "vision_config", None)
    extra = CLASS_TOKENS.get(getattr(tower, "model_type", ""))
    if extra is None or not hasattr(processor, "num_additional_image_tokens"):
        return
    wanted = {"patch_size": tower.patch_size, "num_additional_image_tokens": extra}
    if (strategy := getattr(config, "vision_feature_select_strategy", None)) is not None:
        wanted["vision_feature_select_strategy"] = strategy
    wrong = {name: getattr(processor, name) for name, value in wanted.items() if getattr(processor, name) != value}
    if wrong:
        said = ", ".join(f"{name}={value}" for name, value in wrong.items())
        remedy = ", ".join(f'"{name}": {json_word(wanted[name])}' for name in wrong)
        raise ValueError(
            f"{what}: its processor says {said}, its tower needs another: set in processor_config.json {remedy}"
        )
    side, shown = tower.image_size, shown_side(processor.image_processor)
    if shown is not None and shown != side:
        raise ValueError(
            f"{what}: its processor shows pictures of {shown} pixels a side, its tower takes {side}: set in "
            f"preprocessor_config.json the crop_size (or the size, where nothing is cropped) to {side}"
        )


def shown_side(image_processor: Any) -> int | None:
    """The side in pixels of the square pictures (or tiles) given to the tower; None if they are not square."""
    cropped = getattr(image_processor, "do_center_crop", False)
    size = getattr(image_processor, "crop_size" if cropped else "size", None)
    height, width = (getattr(size, name, None) for name in ("height", "width"))
    return height if height is not None and height == width else None


def json_word(value: Any) -> str:
    """A word or number in JSON."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def limited(image_processor: Any, min_pixels: int | None, max_pixels: int | None, max_tiles: int | None) -> Any:
    """Set an image processor's limits in place.

    Args:
        image_processor: An image processor of transformers.
        min_pixels, max_pixels: Pixels of a picture, for processors that keep its proportions (Qwen's); None: unchanged.
        max_tiles: Tiles of a picture, for processors with a variable number of tiles (InternVL's); None: unchanged.

    Raises:
        ValueError: If it has no such limit, or the limits contradict each other.
    """
    kind = type(image_processor).__name__
    size = getattr(image_processor, "size", None)
    if min_pixels is not None or max_pixels is not None:
        if not hasattr(image_processor, "merge_size") or size is None:
            raise ValueError(f"{kind} scales every picture to the same size: leave out min_pixels and max_pixels")
        sizes = dict(size) | {
            name: value
            for name, value in {"shortest_edge": min_pixels, "longest_edge": max_pixels}.items()
            if value is not None
        }
        if sizes["shortest_edge"] > sizes["longest_edge"]:
            raise ValueError(f"min_pixels={sizes['shortest_edge']} is more than max_pixels={sizes['longest_edge']}")
        image_processor.size = type(size)(**{name: value for name, value in sizes.items() if value is not None})
    if max_tiles is not None:
        if not hasattr(image_processor, "max_patches"):
            raise ValueError(f"{kind} has no limit of tiles to set: leave out max_tiles")
        image_processor.max_patches = max_tiles
    return image_processor
