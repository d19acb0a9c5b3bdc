"""The numbers that a cost is computed from: of a prompt, of a model, and of what choosing tokens takes. No torch.

    sizes = ModelSizes.from_config(AutoConfig.from_pretrained("llava-hf/llava-1.5-7b-hf"))
    prompt = PromptSize(text=60, visual=576, images=1).under(method, schedule, sizes.layers)
    prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))        # pdrop/cost/flops.py

`PromptSize` is one prompt, as its tokens enter each layer; `ModelSizes` a decoder and its vision tower, read from a
transformers config, without weights, network or GPU; `SelectionCost` what a method computes in addition to the forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pdrop.schedule import Schedule

Images = int | Sequence[tuple[int, int, int]]  # a number of crops, or each image's (frames, height, width) in patches


class Counting(Protocol):
    """What `PromptSize.under` asks of a method."""

    def entering(self, schedule: Schedule, prompt: PromptSize, num_layers: int) -> Sequence[float]:
        """Visual tokens that enter each layer."""
        ...


@dataclass(frozen=True)
class PromptSize:
    """The numbers of one prompt, or their means over several.

    Attributes:
        text: Tokens that are not visual.
        visual: Visual tokens that it comes with, those that end rows included.
        visual_per_layer: Those that enter each layer, merged ones included; (): no decoder and schedule chosen yet.
        images: What goes through the vision tower: a number of crops (towers of a fixed size), or the grid (frames,
            height, width) in patches of each image (towers of any size). None: worked out from the visual tokens, as
            one image, which counts too few crops where a model cuts padding away (LLaVA-NeXT). 0: the decoder alone.
        picture: Height and width in pixels of its image, where it is cut into tiles.
        video: Its crops are the frames of one video.
    """

    text: float
    visual: float
    visual_per_layer: tuple[float, ...] = ()
    images: Images | None = None
    picture: tuple[int, int] | None = None
    video: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "visual_per_layer", tuple(self.visual_per_layer))
        if self.images is not None and not isinstance(self.images, int):
            object.__setattr__(self, "images", tuple((f, h, w) for f, h, w in self.images))

    def __str__(self) -> str:
        return f"{self.visual:g} visual tokens and {self.text:g} of text"

    @property
    def counts(self) -> dict[str, float]:
        """Tokens of text and visual ones, before any dropping."""
        return {"text": self.text, "visual": self.visual}

    @property
    def tokens_per_layer(self) -> list[float]:
        """All tokens that enter each layer."""
        return [n + self.text for n in self.visual_per_layer]

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of the visual tokens of each crop or frame; [] where the numbers do not tell."""
        if self.images is None or isinstance(self.images, int):
            crops = 1 if self.images is None else self.images
            side = math.isqrt(round(self.visual / crops)) if crops else 0
            return [(side, side)] * crops if side * side * crops == self.visual else []
        patches = sum(frames * height * width for frames, height, width in self.images)
        merge = math.isqrt(round(patches / self.visual)) if self.visual else 0
        if not merge or merge**2 * self.visual != patches:
            return []
        return [(height // merge, width // merge) for frames, height, width in self.images for _ in range(frames)]

    def undropped(self, layers: int | None = None) -> PromptSize:
        """The same prompt with every visual token in every layer.

        Args:
            layers: Of the decoder; None: as many as `visual_per_layer` has.
        """
        return replace(
            self, visual_per_layer=(self.visual,) * (len(self.visual_per_layer) if layers is None else layers)
        )

    def under(self, method: Counting | None, schedule: Schedule, layers: int) -> PromptSize:
        """The same prompt under a method's schedule in a decoder of this many layers; None drops nothing.

        Raises:
            ValueError: If how many stay is only known during the forward (adaptive stages).
        """
        if method is None:
            return self.undropped(layers)
        return replace(self, visual_per_layer=tuple(method.entering(schedule, self, layers)))

    def times(self, images: int) -> PromptSize:
        """The same text with `images` times the image."""
        seen = self.images if self.images is None else self.images * images  # type: ignore[operator]
        left = tuple(n * images for n in self.visual_per_layer)
        return replace(self, visual=self.visual * images, images=seen, visual_per_layer=left)


@dataclass(frozen=True)
class SelectionCost:
    """What choosing tokens costs in one prefill, in addition to the forward. Made by `Method.selection`.

    Attributes:
        boundaries: Layers before which rows of attention are computed to rank by.
        query_rows: How many rows at each.
        keys_cached: Whether their keys are cached because the layer has already run. Otherwise they are
            computed for the ranking. (In training nothing is cached.)
        tower_rows: For each layer of the vision tower whose attention is read: rows asked for of every crop or frame.
        macs: Multiply-adds of all other matrix products.
    """

    boundaries: tuple[int, ...] = ()
    query_rows: float = 1
    keys_cached: bool = False
    tower_rows: tuple[float, ...] = ()
    macs: float = 0.0


# What a vision config does not state, by its `model_type`: (class tokens, matrices of the MLP: 3 when gated)
TOWER_KINDS = {
    "clip_vision_model": (1, 2),
    "siglip_vision_model": (0, 2),
    "internvl_vision": (1, 2),
    "qwen2_vl_vision": (0, 2),
    "qwen2_5_vl_vision": (0, 3),
    "qwen3_vl_vision": (0, 2),
}
CLASS_TOKENS_OF_FRAMES = {"video_llava"}  # are visual tokens, while those of pictures are not
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class TowerSizes:
    """A vision transformer and the projector after it. Sizes are features, counts are per image or crop."""

    hidden: int
    layers: int
    intermediate: int
    mlp_matrices: int  # 2, or 3 when the MLP is gated
    patch_values: int  # numbers in a patch: channels x height x width (x frames)
    class_tokens: int  # tokens of the tower that are not patches
    grid: tuple[int, int] | None  # patches (height, width) of every crop; None: as large as the image asks for
    merge: int  # side of the square of patches that becomes one visual token
    window: int | None  # side, in patches, of the attention window of all layers but `full_layers`
    full_layers: int  # layers that attend to the whole image; all of them without windows
    projector: tuple[tuple[int, int], ...]  # (features in, features out) of each matrix, applied to each merged patch
    pooled: bool = False  # ends in SigLIP's attention pooling, which is computed even where nothing reads it
    # visual tokens of a crop in addition to its patches: 1 where the class token is projected like a patch, -1 where
    # the first patch is cut off as if it were one
    spare: int = 0
    # what is projected are the visual tokens themselves, whatever crops and frames they are of
    every_projected: bool = False
    heads: int = 1  # of a layer's attention
    fused: bool = False  # queries, keys and values are one product: asking for one computes all
    full: tuple[int, ...] | None = None  # which layers attend to the whole image; None: all

    @property
    def tokens(self) -> int | None:
        """Visual tokens of one crop; None where it depends on the image."""
        return None if self.grid is None else self.grid[0] * self.grid[1] // self.merge**2 + self.spare

    def flops(self, visual: float, images: Images | None = None) -> tuple[float, float]:
        """FLOPs (a multiply-add = 2) of the tower, patch embedding included, and of the projector.

        Args:
            visual: Visual tokens of the prompt.
            images: The number of crops for a tower of fixed size, the grids of the images for one of any size. None:
                worked out from `visual`, as one square image where the tower takes any size.

        Raises:
            ValueError: If grids are given to a tower of fixed size, or a number to one of any size.
        """
        parts, projected = self.macs(visual, images)
        return 2.0 * (sum(parts.values()) - parts["last_matrices"]), 2.0 * projected

    def macs(self, visual: float, images: Images | None = None) -> tuple[dict[str, float], float]:
        """Multiply-adds of the tower's parts (embedding, linear, attention, pooling), and of the projector: `flops`."""
        frames = self.frames(visual, images)
        patches = sum(height * width for height, width in frames)
        pairs = self.full_layers * sum((height * width + self.class_tokens) ** 2 for height, width in frames)
        if self.window is not None:
            squares = sum(squared(height, self.window) * squared(width, self.window) for height, width in frames)
            pairs += (self.layers - self.full_layers) * squares
        d, mlp = self.hidden, self.mlp_matrices * self.hidden * self.intermediate
        total = patches + self.class_tokens * len(frames)
        # SigLIP's pooling: one query a crop asks all tokens, and goes through an MLP
        pooling = 2 * total * d * d + 2 * total * d + len(frames) * (2 * d * d + mlp) if self.pooled else 0.0
        parts = {
            "embedding": patches * self.patch_values * d,
            "linear": self.layers * total * (4 * d * d + mlp),
            "last_matrices": self.layers * total * d * self.intermediate,  # among the linear ones
            "attention": 2 * pairs * d,
            "pooling": pooling,
        }
        projected = patches / self.merge**2 + self.spare * len(frames)
        if self.every_projected and frames:
            projected = visual
        return parts, projected * sum(inward * outward for inward, outward in self.projector)

    def rows_macs(self, rows: float, visual: float, images: Images | None = None) -> float:
        """Multiply-adds of `rows` rows of attention (at most all) per crop or frame in one layer, over all keys."""
        d, macs = self.hidden, 0.0
        for height, width in self.frames(visual, images):
            tokens = height * width + self.class_tokens
            asked = min(rows, tokens)
            products = 3 * tokens if self.fused else tokens + asked
            macs += products * d * d + asked * tokens * d
        return macs

    def received_macs(self, layer: int, visual: float, images: Images | None = None) -> float:
        """Multiply-adds of all rows of attention of one layer, in windows where it has them, and of what they need."""
        d, macs = self.hidden, 0.0
        for height, width in self.frames(visual, images):
            tokens = height * width + self.class_tokens
            pairs = tokens**2
            if self.window is not None and self.full is not None and layer not in self.full:
                pairs = squared(height, self.window) * squared(width, self.window)
            macs += (3 if self.fused else 2) * tokens * d * d + pairs * d
        return macs

    def frames(self, visual: float, images: Images | None = None) -> list[tuple[float, float]]:
        """Height and width in patches of everything that goes through the tower: crops, images, frames. See `flops`."""
        if not images and images is not None:
            return []
        if images is not None and isinstance(images, int) != (self.grid is not None):
            wanted = "grids (frames, height, width)" if self.grid is None else "a number of crops"
            raise ValueError(f"images of this tower are given as {wanted}, not as {images!r}")
        if self.grid is not None:
            return [self.grid] * (images if isinstance(images, int) else self.crops(visual))
        if images is None or isinstance(images, int):
            return [(math.sqrt(visual) * self.merge,) * 2]
        return [(height, width) for count, height, width in images for _ in range(count)]

    def crops(self, visual: float) -> int:
        """Crops that give `visual` tokens: exact for whole crops, also when newline tokens end their rows (LLaVA-NeXT);
        too few where padding was cut away. Only for towers of a fixed size."""
        assert self.grid is not None and self.tokens is not None
        if visual % self.tokens == 0:
            return int(visual // self.tokens)
        return math.ceil(visual / (self.tokens * (1 + self.merge / self.grid[1])))


@dataclass(frozen=True)
class ModelSizes:
    """A Llama-like decoder (grouped-query attention, gated MLP of three matrices) and its vision tower."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tower: TowerSizes

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Read a transformers config.

        Args:
            config: Of a vision-language model: has `text_config` and `vision_config`.

        Raises:
            ValueError: If sizes are missing, naming them, or the cost of a part is not known here.
        """
        kind = getattr(config, "model_type", type(config).__name__)
        text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
        if text is None or vision is None:
            missing = " and ".join(
                name for name, part in (("text_config", text), ("vision_config", vision)) if part is None
            )
            raise ValueError(f"the config of {kind!r} has no {missing}: it is not a vision-language model")
        if any(getattr(text, name, None) for name in EXPERTS):
            raise ValueError(f"the decoder of {kind!r} is a mixture of experts, whose cost depends on the routing")
        hidden, layers, heads, intermediate, vocab = whole_numbers(
            text,
            "text_config",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
        return cls(
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            intermediate=intermediate,
            vocab=vocab,
            tower=read_tower(config, vision, hidden),
        )


def whole_numbers(config: Any, name: str, *fields: str) -> list[int]:
    """The values of `fields`.

    Raises:
        ValueError: If some are missing; the message names them all.
    """
    missing = [field for field in fields if not isinstance(getattr(config, field, None), int)]
    if missing:
        kind = getattr(config, "model_type", "?")
        raise ValueError(f"{name} ({kind!r}) lacks {', '.join(missing)}: what a forward costs cannot be computed")
    return [getattr(config, field) for field in fields]


def read_tower(config: Any, vision: Any, decoder: int) -> TowerSizes:
    """The tower of a config; `decoder` is the language model's hidden size.

    Raises:
        ValueError: If the tower is of an unknown kind or lacks sizes.
    """
    if vision.model_type not in TOWER_KINDS:
        raise ValueError(f"vision tower {vision.model_type!r} is not known here, only {', '.join(TOWER_KINDS)}")
    class_tokens, mlp_matrices = TOWER_KINDS[vision.model_type]
    if hasattr(vision, "spatial_merge_size"):  # Qwen's towers: any resolution, and a merger for a projector
        return read_merging_tower(vision, class_tokens, mlp_matrices)
    hidden, layers, intermediate = whole_numbers(
        vision, "vision_config", "hidden_size", "num_hidden_layers", "intermediate_size"
    )
    patch, image = pair(vision.patch_size), pair(vision.image_size)
    merge = 1
    if getattr(config, "downsample_ratio", None):  # InternVL's pixel shuffle
        merge = round(1 / config.downsample_ratio)
    first_cut = getattr(config, "vision_feature_select_strategy", "default") == "default"  # whatever the first row is
    taps = getattr(config, "vision_feature_layer", -1)
    features = hidden * merge**2 * (len(taps) if isinstance(taps, (list, tuple)) else 1)
    return TowerSizes(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        mlp_matrices=mlp_matrices,
        patch_values=getattr(vision, "num_channels", 3) * patch[0] * patch[1],
        class_tokens=class_tokens,
        grid=(image[0] // patch[0], image[1] // patch[1]),
        merge=merge,
        window=None,
        full_layers=layers,
        projector=((features, decoder), (decoder, decoder)),
        pooled=bool(getattr(vision, "vision_use_head", False)),
        spare=0 if merge > 1 else class_tokens - first_cut,
        every_projected=getattr(config, "model_type", "") in CLASS_TOKENS_OF_FRAMES,
        heads=getattr(vision, "num_attention_heads", None) or 1,
    )


def read_merging_tower(vision: Any, class_tokens: int, mlp_matrices: int) -> TowerSizes:
    """A tower as Qwen2-VL has it: three-dimensional patches, optional windows, a merger of 2x2 patches at its end."""
    layers, merge, patch, frames = whole_numbers(
        vision, "vision_config", "depth", "spatial_merge_size", "patch_size", "temporal_patch_size"
    )
    # Qwen2-VL calls the tower's own width embed_dim and the decoder's hidden_size; its successors say out_hidden_size
    (hidden,) = whole_numbers(vision, "vision_config", "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size")
    (out,) = whole_numbers(
        vision, "vision_config", "out_hidden_size" if hasattr(vision, "out_hidden_size") else "hidden_size"
    )
    if isinstance(getattr(vision, "intermediate_size", None), int):
        intermediate = vision.intermediate_size
    else:
        intermediate = int(hidden * vision.mlp_ratio)
    window, full = None, None
    if getattr(vision, "window_size", None) and hasattr(vision, "fullatt_block_indexes"):
        window = vision.window_size // merge // patch * merge
        full = tuple(layer for layer in vision.fullatt_block_indexes if layer < layers)
    merged = hidden * merge**2
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return TowerSizes(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        mlp_matrices=mlp_matrices,
        patch_values=(getattr(vision, "in_channels", None) or 3) * frames * patch**2,
        class_tokens=class_tokens,
        grid=None,
        merge=merge,
        window=window,
        full_layers=layers if full is None else len(full),
        full=full,
        projector=((merged, merged), (merged, out)) * mergers,
        heads=getattr(vision, "num_heads", None) or 1,
        fused=True,
    )


def pair(size: Any) -> tuple[int, int]:
    """A side length as (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def squared(length: float, window: int) -> float:
    """Sum of the squared sides of the windows that a side of `length` patches is cut into."""
    return length // window * window**2 + (length % window) ** 2
