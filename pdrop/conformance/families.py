"""Tiny models of many LVLM families with random weights: no download, no processor. prompts.py makes their inputs.

Why: the engine promises to work on unmodified transformers models, so the tests run on the real classes, with 6 layers
of width 32.

    model = build("qwen2_5_vl", "sdpa")
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

torch.set_num_threads(1)  # the models are so small that more threads would be slower
transformers.logging.set_verbosity_error()

VOCABULARY, PAD, BOS = 200, 0, 1
IMAGE, VIDEO, VISION_START, VISION_END = 190, 191, 192, 193
LAYERS = 6
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
CLIP: dict[str, Any] = dict(VISION, model_type="clip_vision_model", image_size=28, patch_size=7, projection_dim=16)
SIGLIP: dict[str, Any] = dict(VISION, model_type="siglip_vision_model", image_size=28, patch_size=7)
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
LLAVA: dict[str, Any] = dict(vision_config=CLIP, image_token_index=IMAGE, vision_feature_layer=-1, image_seq_length=16)
QWEN_VISION: dict[str, Any] = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **more}


def _llava(**text: Any) -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=_text("llama", **text), **LLAVA)
    )


def _llava_mistral(**text: Any) -> Any:
    config = transformers.LlavaConfig(text_config=_text("mistral", **{"sliding_window": None, **text}), **LLAVA)
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next(**text: Any) -> Any:
    config = transformers.LlavaNextConfig(text_config=_text("llama", **text), image_grid_pinpoints=PINPOINTS, **LLAVA)
    return transformers.LlavaNextForConditionalGeneration(config)


def _llava_onevision(**text: Any) -> Any:
    config = transformers.LlavaOnevisionConfig(
        text_config=_text("qwen2", **text),
        vision_config=SIGLIP,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _qwen(family: str, vision: dict[str, Any], **text: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "rope_parameters": MROPE, **text},
        vision_config={**QWEN_VISION, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def _qwen2_vl(**text: Any) -> Any:
    return _qwen("Qwen2VL", dict(embed_dim=16, hidden_size=32, mlp_ratio=2, in_channels=3), **text)


def _qwen2_5_vl(**text: Any) -> Any:
    vision = dict(hidden_size=16, out_hidden_size=32, intermediate_size=24, in_chans=3)
    return _qwen("Qwen2_5_VL", dict(vision, window_size=16, fullatt_block_indexes=[1]), **text)


def _qwen3_vl(**text: Any) -> Any:
    vision: dict[str, Any] = dict(depth=3, hidden_size=16, out_hidden_size=32, intermediate_size=24, in_channels=3)
    vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    return _qwen("Qwen3VL", vision, **{"head_dim": 8, **text})


def _internvl(**text: Any) -> Any:
    config = transformers.InternVLConfig(
        text_config=_text("qwen2", **text),
        vision_config=dict(VISION, image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _mistral3(**text: Any) -> Any:
    config = transformers.Mistral3Config(
        text_config=_text("mistral", **{"sliding_window": None, "head_dim": 8, **text}),
        vision_config=dict(VISION, model_type="pixtral", image_size=28, patch_size=7, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def _idefics3(**text: Any) -> Any:
    config = transformers.Idefics3Config(
        text_config=_text("llama", **text),
        vision_config=dict(VISION, image_size=28, patch_size=7),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def _video_llava(**text: Any) -> Any:
    config = transformers.VideoLlavaConfig(
        text_config=_text("llama", **text), video_token_index=VIDEO, video_seq_length=16, **LLAVA
    )
    return transformers.VideoLlavaForConditionalGeneration(config)


FAMILIES: dict[str, Callable[..., Any]] = {
    "llava": _llava,
    "llava_mistral": _llava_mistral,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "video_llava": _video_llava,
}
CORE = ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
MROPE_FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
TILED = ("llava_next", "llava_onevision")
READ_TOWERS = ("llava", "llava_mistral", "llava_next", "llava_onevision")  # by methods that look at the vision tower
MERGED_TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # those of them with a rule for tokens of several patches


def llava_of(kind: str, **text: Any) -> Any:
    """A LLaVA around a language model of another kind of transformers'; `text` overrides its config."""
    config = transformers.LlavaConfig(text_config=_text(kind, **text), **LLAVA)
    return transformers.LlavaForConditionalGeneration(config)


def fresh(family: str, backend: str = "sdpa", dtype: torch.dtype = torch.float64, **text: Any) -> Any:
    """A new tiny model in eval mode; `text` overrides its language model's config."""
    torch.manual_seed(0)
    return ready(FAMILIES[family](**text), backend, dtype)


def ready(model: Any, backend: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """The model with weights drawn ten times wider than usual, so that rankings are far from ties."""
    model.set_attn_implementation(backend)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
            elif "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model.to(dtype).eval()


@functools.cache
def build(family: str, backend: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """The same model as `fresh`, made once, for tests that do not change it."""
    return fresh(family, backend, dtype)
