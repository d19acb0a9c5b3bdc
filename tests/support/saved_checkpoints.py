"""A tiny LLaVA saved in the real format: config, safetensors, byte-level tokenizer, chat template, image processor.

folder = save_llava(tmp_path / "llava")      # 16 visual tokens per image, 4 decoder layers of width 32
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
VISUAL_TOKENS = 16
LAYERS = 4
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'video' %}<video>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_SPECIAL = (*SPECIAL[:3], "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TEMPLATE = TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "<video>\n", "<|vision_start|><|video_pad|><|vision_end|>"
)


def tokenizer(special: tuple[str, ...] = SPECIAL) -> transformers.PreTrainedTokenizerFast:
    """One token a letter of printable ASCII, space and newline; starts with <s> as Llama's does."""
    letters = [*map(chr, range(33, 127)), "\u0120", "\u010a"]  # the byte-level names of space and newline
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {f"{token[1:-1]}_token": token for token in ("<image>", "<video>") if token in special}
    named = named if "<image>" in special else list(special[3:])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def config(positions: int = 1024) -> transformers.LlavaConfig:
    """Llama under CLIP, the smallest that still has heads to average and layers to cut between."""
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # answers that differ from prompt to prompt
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        projection_dim=16,
        initializer_range=0.3,
    )
    return transformers.LlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
    )


def save_llava(folder: Path, *, weights: bool = True, template: bool = True, positions: int = 1024) -> Path:
    """Save it; without weights or chat template if asked."""
    image = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE if template else None,
    )
    processor.save_pretrained(folder)
    if weights:
        return _save(transformers.LlavaForConditionalGeneration, config(positions), folder)
    config(positions).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT with tiles of 28 pixels in grids of up to 2 x 2."""
    grids = [[28, 56], [56, 28], [56, 56]]
    like, size = config(), {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    whole = transformers.LlavaNextConfig(
        text_config=like.text_config.to_dict(),
        vision_config=like.vision_config.to_dict(),
        image_token_index=like.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=grids,
    )
    transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=grids),
        tokenizer=tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return _save(transformers.LlavaNextForConditionalGeneration, whole, folder)


def save_llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision with SigLIP tiles of 28 pixels in grids of up to 2 x 2."""
    words, grids, size = tokenizer((*SPECIAL, "<video>")), [[28, 56], [56, 28], [56, 56]], {"height": 28, "width": 28}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = transformers.LlavaOnevisionConfig(
        text_config=qwen2_text(words),
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7} | tower,
        image_token_index=3,
        video_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grids,
    )
    transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer=words,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return _save(transformers.LlavaOnevisionForConditionalGeneration, whole, folder)


def save_internvl(folder: Path) -> Path:
    """InternVL with tiles of 28 pixels, 4 tokens each."""
    words = tokenizer((*SPECIAL[:3], "<IMG_CONTEXT>", "<img>", "</img>", "<video>"))
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    for name, token in {**named, "video_token": "<video>"}.items():
        for attribute, value in ((name, token), (f"{name}_id", words.convert_tokens_to_ids(token))):
            setattr(words, attribute, value)
            words.init_kwargs[attribute] = value
    size = {"height": 28, "width": 28}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = transformers.InternVLConfig(
        text_config=qwen2_text(words),
        vision_config={"image_size": [28, 28], "patch_size": [7, 7]} | tower,
        image_token_id=3,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=12),
        tokenizer=words,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("<image>\n", "<IMG_CONTEXT>\n"),
    ).save_pretrained(folder)
    return _save(transformers.InternVLForConditionalGeneration, whole, folder)


def qwen2_text(words: transformers.PreTrainedTokenizerFast) -> dict[str, object]:
    """The small text model as one of Qwen2's kind."""
    like = config().text_config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    more = {"model_type": "qwen2", "vocab_size": len(words), "max_position_embeddings": 8192}
    return {name: like[name] for name in names} | more


# as Qwen's own: who speaks, a system message of its own where none is given (Qwen3-VL has none), pictures, words
CHATML = (
    "{% for m in messages %}{% if DEFAULT and loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN: dict[str, dict[str, Any]] = {
    "Qwen2VL": dict(embed_dim=16, hidden_size=32, mlp_ratio=2, in_channels=3, depth=2),
    "Qwen2_5_VL": dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, fullatt_block_indexes=[1], depth=2),
    "Qwen3VL": dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, in_channels=3, depth=3)
    | dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
}


def save_qwen(folder: Path, family: str, patch: int, limits: tuple[int, int] = (64, 4096), chatml: bool = True) -> Path:
    """A Qwen of a family of QWEN with patches of that many pixels, merged 2 x 2; `limits` in pixels of a picture."""
    special = (*SPECIAL[:3], "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer((*special, "<|im_start|>", "<|im_end|>") if chatml else special)
    words.image_token, words.video_token = "<|image_pad|>", "<|video_pad|>"
    pad, video, start, end = words.convert_tokens_to_ids(list(special[3:]))
    patches = {"patch_size": patch, "temporal_patch_size": 2}
    text = config().text_config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    more: dict[str, Any] = {"window_size": 4 * patch} if family == "Qwen2_5_VL" else {}
    head = {"head_dim": 8} if family == "Qwen3VL" else {}
    whole = getattr(transformers, f"{family}Config")(
        text_config={name: text[name] for name in names}
        | head
        | {
            "vocab_size": len(words),
            "max_position_embeddings": 8192 if chatml else 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config=QWEN[family] | patches | more | {"num_heads": 2, "spatial_merge_size": 2},
        image_token_id=pad,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    least, most = limits
    shared = patches | {"merge_size": 2}
    film: type = transformers.Qwen3VLVideoProcessor if family == "Qwen3VL" else transformers.Qwen2VLVideoProcessor
    getattr(transformers, f"{family}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            **shared, size={"shortest_edge": least, "longest_edge": most}
        ),
        tokenizer=words,
        video_processor=film(**shared, size={"shortest_edge": least, "longest_edge": 16 * most}),
        chat_template=CHATML.replace("DEFAULT", "false" if family == "Qwen3VL" else "true")
        if chatml
        else QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return _save(getattr(transformers, f"{family}ForConditionalGeneration"), whole, folder)


def save_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL with patches of 4 pixels, merged 2 x 2."""
    return save_qwen(folder, "Qwen2_5_VL", 4, chatml=False)


def save_qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL with patches of 4 pixels, merged 2 x 2: frames of a video by twos, each pair after its time."""
    return save_qwen(folder, "Qwen3VL", 4)


def save_video_llava(folder: Path) -> Path:
    """Video-LLaVA: towers of its own for pictures and for frames of 28 pixels, 17 tokens a frame."""
    words = tokenizer((*SPECIAL, "<video>"))
    like, size = config(4096), {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    whole = transformers.VideoLlavaConfig(
        text_config=like.text_config.to_dict() | {"vocab_size": len(words)},
        vision_config=like.vision_config.to_dict(),
        image_token_index=3,
        video_token_index=4,
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
        video_seq_length=8 * (VISUAL_TOKENS + 1),
    )
    transformers.VideoLlavaProcessor(
        image_processor=transformers.VideoLlavaImageProcessor(**size),
        video_processor=transformers.VideoLlavaVideoProcessor(**size),
        tokenizer=words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return _save(transformers.VideoLlavaForConditionalGeneration, whole, folder)


def _save(kind: type, whole: transformers.PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(whole).save_pretrained(folder)
    return folder
