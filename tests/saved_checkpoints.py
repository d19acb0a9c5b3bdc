"""A tiny LLaVA saved in the real format: config, safetensors, byte-level tokenizer, chat template, image processor.

folder = save_llava(tmp_path / "llava")      # 16 visual tokens an image, 4 decoder layers of width 32
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

torch.set_num_threads(1)  # the models are so small that threads only get in each other's way

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
VISUAL_TOKENS = 16
LAYERS = 4
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a letter of printable ASCII, space and newline; starts with <s> as Llama's does."""
    letters = [*map(chr, range(33, 127)), "\u0120", "\u010a"]  # the byte-level names of space and newline
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
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


def save_llava(
    folder: Path, *, seed: int = 0, weights: bool = True, template: bool = True, positions: int = 1024
) -> Path:
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
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformers.LlavaForConditionalGeneration(config(positions)).save_pretrained(folder)
    else:
        config(positions).save_pretrained(folder)
    return folder
