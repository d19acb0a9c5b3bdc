"""Cases of the official programs, and unmodified models of transformers that hold their weights.

case = read("before_decoder", "visionzip", "z01")
trace, entered = in_front(case, VisionZip(contextual=4), Schedule((Stage(0, tokens=17),)))
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from pdrop import Method, Schedule, attach

VECTORS = Path(__file__).parents[1] / "vectors"
IMAGE = 0  # text ids of the vectors begin at 3


@functools.cache
def read(kind: str, method: str, name: str) -> dict[str, Any]:
    """One case with its arrays under "arrays", after checking the file's hash."""
    folder = VECTORS / kind / method
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    case = next(case for case in cases if case["name"].startswith(name))
    path = folder / case["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == case["sha256"], f"{path} has changed"
    return case | {"arrays": load_file(path)}


def names(kind: str, method: str) -> list[str]:
    """The cases that are here."""
    cases = json.loads((VECTORS / kind / method / "manifest.json").read_text())["cases"]
    return [case["name"] for case in cases]


@functools.cache
def pixels(side: int) -> Tensor:
    """Six pictures of side x side patches."""
    return load_file(VECTORS / "before_decoder" / "models" / f"tower{side}.safetensors")["pixels"].float()


@functools.cache
def with_tower(side: int, tiled: bool = False) -> Any:
    """A LLaVA (NeXT, if tiled) with the vectors' tower and projector, on a language model of two random layers."""
    folder = VECTORS / "before_decoder" / "models"
    own = json.loads((folder / f"tower{side}.json").read_text())
    vision = CLIPVisionConfig(**{key: value for key, value in own.items() if key not in ("llm_hidden", "projector")})
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=own["llm_hidden"],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    both: dict[str, Any] = dict(text_config=text, vision_config=vision, image_token_index=IMAGE)
    both |= dict(vision_feature_layer=-2, projector_hidden_act="gelu")
    torch.manual_seed(0)
    if tiled:
        size = vision.image_size
        grids = [[size * a, size * b] for a, b in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
        model: Any = LlavaNextForConditionalGeneration(LlavaNextConfig(**both, image_grid_pinpoints=grids))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**both))
    weights = {}
    for name, value in load_file(folder / f"tower{side}.safetensors").items():
        if name.startswith("vision_model."):
            weights["model.vision_tower." + name.removeprefix("vision_model.")] = value.float()
        elif name.startswith("projector."):
            number = {"0": "1", "2": "2"}[name[10]]
            weights[f"model.multi_modal_projector.linear_{number}{name[11:]}"] = value.float()
        elif name == "embed_tokens":
            weights["model.language_model.embed_tokens.weight"] = value.float()
        elif name == "image_newline" and tiled:
            weights["model.image_newline"] = value.float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not [name for name in missing if "vision_tower" in name or "projector" in name]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    return model.eval()


def inputs_of(case: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """The model and what it is called with."""
    tiled = case["kind"] == "anyres"
    model, pictures = with_tower(case["side"], tiled), pixels(case["side"])[case["pictures"]]
    extra: dict[str, Tensor] = {}
    count = case["side"] ** 2
    if tiled:
        (across, down), size = case["grid"], model.config.vision_config.image_size
        width, height = case.get("image_size") or (across * size, down * size)
        extra = {"image_sizes": torch.tensor([[height, width]])}
        pictures = pictures[None]
        with torch.no_grad():
            made = model.model.get_image_features(pictures, extra["image_sizes"], return_dict=True).pooler_output
        count = len(made[0])
    ids: list[int] = []
    given = case["arrays"].get("input_ids")
    for token in [5, 6, -200, 7, 8] if given is None else given.tolist():
        ids += [IMAGE] * count if token == -200 else [token]
    whole = torch.tensor(ids)[None]
    return model, {"input_ids": whole, "attention_mask": torch.ones_like(whole), "pixel_values": pictures, **extra}


@torch.no_grad()
def in_front(case: dict[str, Any], method: Method, schedule: Schedule, tokenizer: Any = None) -> tuple[Any, Tensor]:
    """The trace of a forward, and what enters the first layer, [tokens, D]."""
    model, batch = inputs_of(case)
    entered: list[Tensor] = []
    norm = model.get_decoder().layers[0].input_layernorm
    handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0][0].clone()))
    try:
        with attach(model, method, schedule, tokenizer=tokenizer) as trace:
            model(**batch)
    finally:
        handle.remove()
    return trace, entered[-1]


def clip_folder(folder: Path, side: int) -> Path:
    """A CLIP checkpoint of the vectors' towers and a tokenizer whose words are "w" and their id, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    source = VECTORS / "before_decoder" / "models"
    text, vision = (json.loads((source / f"{name}.json").read_text()) for name in ("text", f"tower{side}"))
    vision = {key: value for key, value in vision.items() if key not in ("llm_hidden", "projector")}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"]))
    weights = load_file(source / "text.safetensors") | load_file(source / f"tower{side}.safetensors")
    left = ("projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias")
    own = {k: v.float() for k, v in weights.items() if k not in (*left, "pixels", "image_newline", "embed_tokens")}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and missing == ["logit_scale"]
    model.save_pretrained(folder)
    start, end = text["bos_token_id"], text["vocab_size"] - 1
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(text["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(f"w{start}", start), (f"w{end}", end)]
    words.post_processor = processors.TemplateProcessing(single=f"w{start} $A w{end}", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=12).save_pretrained(folder)
    return folder


class Says:
    """A tokenizer for which every prompt's question is one text."""

    def __init__(self, text: str):
        self.text = text

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        """That text."""
        return [self.text for _ in rows]


def check_cache(cache: Any, arrays: dict[str, Tensor], rtol: float) -> None:
    """Hold each layer's rows and the norms of its keys and values against what the official program caches."""
    assert [layer.keys.shape[2] for layer in cache.layers] == arrays["cache_len_after_all"].tolist()
    for kind in ("key", "value"):
        norms = torch.stack([getattr(layer, f"{kind}s").double().norm() for layer in cache.layers])
        torch.testing.assert_close(norms, arrays[f"{kind}_cache_l2"], rtol=rtol, atol=0)
