"""Ragged prompts for the tiny models of families.py: no processor, pixels are noise.

Each prompt is built alone (`sample`) and batches are padded from prompts (`collate`), so that a row alone can be
compared with the same row in a batch.

    samples = [sample("qwen2_5_vl", model, (3, 5)), sample("qwen2_5_vl", model, (2, 4, 6))]
    model(**collate("qwen2_5_vl", samples, side="left"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from pdrop.conformance.families import BOS, IMAGE, PINPOINTS, TILED, VIDEO, VISION_END, VISION_START


def sample(
    family: str, model: Any, texts: Sequence[int] = (3, 5), seed: int = 1, video: bool = False
) -> dict[str, Tensor]:
    """One prompt without padding: BOS, texts[0] text tokens, then an image and texts[i] text tokens for each i >= 1.

    So `(3, 5)` holds one image, `(3, 5, 2)` two, `(8,)` none. With `video` the last image is a video.
    `input_ids` is [tokens]; pixels are as the family's model takes them, without a batch dimension of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype, kinds = next(model.parameters()).dtype, [IMAGE] * (len(texts) - 1)
    if video:
        kinds[-1] = VIDEO
    pixels: dict[str, Tensor] = {}
    lengths: list[int] = []
    for at, kind in enumerate(kinds):
        new, length = _pixels(family, model, kind, seed + at, generator, dtype)
        lengths.append(length)
        for key, value in new.items():
            pixels[key] = torch.cat(_same_tiles([pixels[key], value])) if key in pixels else value

    def words(count: int) -> Tensor:
        return torch.randint(5, 180, (count,), generator=generator)

    pieces = [torch.tensor([BOS]), words(texts[0])]
    for kind, length, count in zip(kinds, lengths, texts[1:]):
        block = torch.full((length,), kind)
        if family == "qwen3_vl" and kind == VIDEO:  # it sees each frame separately, after a time stamp
            for frame in block.chunk(2):
                pieces += [words(1), torch.tensor([VISION_START]), frame, torch.tensor([VISION_END])]
        else:
            pieces += [torch.tensor([VISION_START]), block, torch.tensor([VISION_END])] if "qwen" in family else [block]
        pieces.append(words(count))
    ids = torch.cat(pieces)
    if "qwen" in family:
        pixels["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return {"input_ids": ids, **pixels}


def _pixels(
    family: str, model: Any, kind: int, seed: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[dict[str, Tensor], int]:
    """Pixels of one image or video, and how many visual tokens they become."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if "qwen" in family:
        frames = 2 if kind == VIDEO else 1
        height, width = [(4, 4), (4, 6), (6, 6), (8, 4), (4, 8), (6, 4)][seed % 6]
        grid, name = torch.tensor([[frames, height, width]]), "video" if kind == VIDEO else "image"
        values = noise(int(grid.prod()), 3 * 2 * 16)
        key = "pixel_values_videos" if kind == VIDEO else "pixel_values"
        return {key: values, f"{name}_grid_thw": grid}, int(grid.prod()) // 4
    if kind == VIDEO:
        values = noise(1, 8, 3, 28, 28)  # Video-LLaVA reads 8 frames of 17 tokens; OneVision pools 16 to 4, + newline
        return {"pixel_values_videos": values}, {"llava_onevision": 8 * 4 + 1, "video_llava": 8 * 17}[family]
    if family in TILED:
        size = [(28, 56), (56, 28), (24, 56), (50, 40)][seed % 4]
        tiles = image_size_to_num_patches(list(size), PINPOINTS, 28)
        values, sizes = noise(1, tiles, 3, 28, 28), torch.tensor([size])
        with torch.no_grad():
            features = model.model.get_image_features(values, sizes, return_dict=True).pooler_output
        return {"pixel_values": values, "image_sizes": sizes}, len(features[0])
    values = noise(1, 3, 28, 28)
    if family == "mistral3":
        return {"pixel_values": values, "image_sizes": torch.tensor([[28, 28]])}, 4
    if family == "video_llava":
        return {"pixel_values_images": values}, 16
    return {"pixel_values": values}, 16 if family.startswith("llava") else 4


def _same_tiles(values: list[Tensor]) -> list[Tensor]:
    """Images cut into different numbers of tiles [images, tiles, 3, h, w], padded to the same number."""
    if values[0].ndim != 5:
        return values
    most = max(value.shape[1] for value in values)
    return [pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]


def collate(family: str, samples: Sequence[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
    """The samples as one batch, padded on `side`: keyword arguments for the model's forward and for `generate`."""
    longest = max(len(one["input_ids"]) for one in samples)
    batch: dict[str, Tensor] = {}

    def row(value: Tensor) -> Tensor:
        missing = longest - len(value)
        return pad(value, (missing, 0) if side == "left" else (0, missing))

    batch["input_ids"] = torch.stack([row(one["input_ids"]) for one in samples])
    batch["attention_mask"] = torch.stack([row(torch.ones_like(one["input_ids"])) for one in samples])
    for key in dict.fromkeys(key for one in samples for key in one if key != "input_ids"):
        values = [one[key] for one in samples if key in one]
        if key == "mm_token_type_ids":
            batch[key] = torch.stack([row(value) for value in values])
        elif family == "idefics3":  # [batch, most images, ...]: images of zeros are not images
            most = max(map(len, values))
            empty = values[0].new_zeros(0, *values[0].shape[1:])
            rows = [one.get(key, empty) for one in samples]
            batch[key] = torch.stack([torch.cat([r, r.new_zeros(most - len(r), *r.shape[1:])]) for r in rows])
        else:
            batch[key] = torch.cat(_same_tiles(values))
    return batch


def single(family: str, one: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample as a batch of one."""
    return collate(family, [one])
