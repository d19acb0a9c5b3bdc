"""Architectures of the papers' and today's common checkpoints: published configs, without weights.

The cost of a forward follows from the config alone, and its speed can be measured with random weights, so neither needs
a download: `read` returns the config, `noise_prompt` inputs of the right shapes. Each checkpoint has a JSON file with
its repository, a reference prompt, and the values of its config.json that determine shapes.

    config = read("llava_1_5_7b")
    sizes = ModelSizes.from_config(config)              # pdrop/shapes.py
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.resources import files
from typing import Any

from pdrop.shapes import PromptSize

FOLDER = files("pdrop.models")


def names() -> list[str]:
    """Names of the shipped architectures, sorted."""
    return sorted(path.name.removesuffix(".json") for path in FOLDER.iterdir() if path.name.endswith(".json"))


@functools.cache
def entry(name: str) -> dict[str, Any]:
    """The JSON file of an architecture.

    Raises:
        ValueError: If there is no such architecture.
    """
    if name not in names():
        raise ValueError(f"no architecture {name!r} is shipped, only {', '.join(names())}")
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf8")))


@functools.cache
def of_checkpoint(path: str) -> str | None:
    """The shipped architecture of a checkpoint on the Hub; None if there is none."""
    return next((name for name in names() if entry(name)["checkpoint"] == path), None)


@functools.cache
def read(name: str) -> Any:
    """The config, as transformers reads it for the checkpoint."""
    from transformers import AutoConfig

    values = dict(entry(name)["config"])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def reference_prompt(name: str) -> PromptSize:
    """The prompt with one image (or video) that an architecture's costs are computed for."""
    prompt = entry(name)["prompt"]
    images = prompt["images"] if isinstance(prompt["images"], int) else [tuple(grid) for grid in prompt["images"]]
    size = prompt.get("size")
    picture = None if size is None else (size[0], size[1])
    video = prompt.get("video", False)
    return PromptSize(prompt["text"], prompt["visual"], images=images, picture=picture, video=video)


def fingerprint(name: str, *more: Any) -> str:
    """16 hex digits over the file and whatever else makes the model, such as the seed of random weights."""
    text = json.dumps([entry(name), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(name: str, *, dtype: str, attn_implementation: str, device: str, seed: int = 0) -> Any:
    """The model with seeded random weights, in eval mode: speed does not depend on them.

    Raises:
        ValueError: If the attention backend is not available.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForImageTextToText.from_config(
                read(name),
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=False,
            )
    except ImportError as error:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} cannot be had here ({error}): use sdpa or eager"
        ) from error
    return model.eval()


def noise_prompt(config: Any, prompt: PromptSize, *, batch: int = 1, images: int = 1) -> dict[str, Any]:
    """Inputs of a forward, [batch, text + images x visual tokens]: half of the text, the images, the other half.

    Args:
        config: The model's.
        prompt: Sizes of one prompt with one image, or one video.
        batch: Number of equal prompts.
        images: Images, or videos, per prompt.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    vision, many = config.vision_config, batch * images
    text, visual = round(prompt.text), round(prompt.visual)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    pixels: dict[str, Any]
    if isinstance(prompt.images, int):
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        if prompt.video:
            pixels = {"pixel_values_videos": noise(many, prompt.images, 3, side, side)}
        elif prompt.picture is None:
            pixels = {"pixel_values": noise(many * prompt.images, 3, side, side)}
        else:
            pixels = {"pixel_values": noise(many, prompt.images, 3, side, side)}
            pixels["image_sizes"] = torch.tensor([prompt.picture] * many)
    else:
        grids = [] if prompt.images is None else [list(grid) for grid in prompt.images]
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(frames * height * width for frames, height, width in grids)
        pixels = {"pixel_values": noise(many * patches, values)}
        pixels["image_grid_thw"] = torch.tensor(grids * many)
    between = images if images > 1 else 0  # images of one prompt are separated by text tokens
    words = torch.randint(3, 900, (batch, max(2, text - between)), generator=generator)
    blocks = []
    for _ in range(images):
        token = config.video_token_id if prompt.video else config.image_token_id
        blocks.append(torch.full((batch, visual), token))
        if between:
            blocks.append(torch.full((batch, 1), 3))
    half = words.shape[1] // 2
    ids = torch.cat([words[:, :half], *blocks, words[:, half:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return inputs
