"""The embedded model: a LLaVA with 12 decoder layers and 144 visual tokens, as an unmodified transformers model.

`build` makes it with fresh weights, `save` writes a folder that AutoProcessor and LlavaForConditionalGeneration load
offline. About 5 million parameters, 10 MB in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .tokenizer import BEGIN_ID, CHAT_TEMPLATE, END_ID, IMAGE, IMAGE_ID, PAD_ID, build_tokenizer, vocabulary
from .vocabulary import IMAGE_SIZE, PATCH_SIZE, VISUAL_TOKENS

if TYPE_CHECKING:
    from transformers import LlavaProcessor

FOLDER = Path(__file__).parent / "model"
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS, TOWER_INNER = 192, 5, 4, 640
WIDTH, LAYERS, HEADS, INNER = 128, 12, 4, 512


def config() -> LlavaConfig:
    """The shapes; vision_feature_layer is the tower's last one, as the tower was trained to be read there."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=TOWER_INNER,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        image_seq_length=VISUAL_TOKENS,
    )


def build(seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with fresh float32 weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    # Muon takes orthogonal steps whose size the learning rate gives, so the start matters little; only the scale of
    # what each layer adds to the residual stream is chosen with care.
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed" not in name and "lm_head" not in name:
            nn.init.normal_(weight, std=0.7 * weight[0].numel() ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * LAYERS) ** -0.5)
        if name.endswith(("out_proj.weight", "fc2.weight")):
            weight.data.mul_((2 * TOWER_LAYERS) ** -0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.5 * WIDTH**-0.5)
    return model


def build_processor() -> LlavaProcessor:
    """Image processor (values scaled to -1..1; an image of 168 pixels is not resized), tokenizer and chat template."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,  # the tower's class token, which "default" then leaves out
        chat_template=CHAT_TEMPLATE,
    )


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Writes the weights in bfloat16, the processor and the tokenizer to `folder`; `model` does not change."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LlavaForConditionalGeneration(config())
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    copy.generation_config.bos_token_id = BEGIN_ID
    copy.generation_config.eos_token_id = END_ID
    copy.generation_config.pad_token_id = PAD_ID
    copy.save_pretrained(folder)
    build_processor().save_pretrained(folder)
