"""What a forward costs: the paper's figures, and the closed form against two counters that know nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pdrop.conformance.families import CORE, build, fresh
from pdrop.conformance.prompts import sample, single
from pdrop.cost.counters import counted_prefill_flops, fvcore_prefill_flops
from pdrop.cost.flops import SUMMED, cost, decode_flops_per_token, kv_bytes, paper_macs_visual, prefill_flops
from pdrop.engine import attach
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import RandomDrop
from pdrop.schedule import Schedule, pyramid
from pdrop.schedule import single as single_boundary
from pdrop.shapes import ModelSizes, PromptSize, SelectionCost

SEVEN_B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
THIRTEEN_B = dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
CLIP_L = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


def llava_config(**text: Any) -> Any:
    return transformers.LlavaConfig(
        text_config=dict(model_type="llama", vocab_size=32064, max_position_embeddings=4096, **text),
        vision_config=CLIP_L,
        image_token_index=32000,
    )


# ------------------------------------------------------------------ the papers' convention


def in_paper(schedule: Schedule, visual: int) -> float:
    """Tera-MACs of visual tokens in a 7B decoder, fractions of tokens not rounded, as the paper computes."""
    keep = [1.0] * 32
    for stage in schedule:
        keep[stage.layer :] = [stage.keep or 0.0] * (32 - stage.layer)
    return paper_macs_visual(4096, 11008, [visual * share for share in keep]) / 1e12


@pytest.mark.parametrize(
    ("schedule", "visual", "printed"),
    [
        (Schedule(), 576, "3.82"),
        (Schedule(), 2880, "20.8"),
        (Schedule(), 9 * 576, "40.6"),
        (Schedule(), 8 * 256, "14.4"),
        (pyramid(32), 576, "1.78"),
        (pyramid(32), 2880, "9.46"),
        (pyramid(32), 9 * 576, "18.1"),
        (pyramid(32), 8 * 256, "6.6"),
        (pyramid(32, ratio=0.4), 576, "1.54"),
        (pyramid(32, ratio=0.4), 2880, "8.22"),
        (pyramid(32, ratio=0.6), 576, "2.06"),
        (pyramid(32, ratio=0.6), 2880, "11.0"),
        (single_boundary(2, 0.5), 576, "2.01"),
        (single_boundary(2, 0.5), 2880, "10.6"),
        (single_boundary(2, 0.5), 8 * 256, "7.4"),
        (Schedule(), 288, "1.89"),  # Q-Former: half of the tokens in every layer
        (pyramid(32, stages=3), 576, "2.13"),
    ],
)
def test_the_paper_s_figures(schedule: Schedule, visual: int, printed: str) -> None:
    decimals = len(printed.split(".")[1])
    assert f"{in_paper(schedule, visual):.{decimals}f}" == printed


def test_the_paper_s_1_38_at_five_stages_leaves_out_two_layers() -> None:
    assert in_paper(pyramid(32, stages=5), 576) == pytest.approx(1.391, abs=5e-4)
    stages = [576 * 0.5**s for s in range(5) for _ in range(6)]  # 5 stages of 6 layers are 30 of the 32
    assert paper_macs_visual(4096, 11008, stages) / 1e12 == pytest.approx(1.377, abs=5e-4)


def test_average_tokens_of_the_paper() -> None:
    assert pyramid(32).mean_keep(32) * 576 == 270
    assert single_boundary(2, 0.5).mean_keep(32) * 576 == 306


def test_fastv_s_own_formula_has_two_mlp_matrices() -> None:
    whole = paper_macs_visual(4096, 11008, [576] * 32, mlp_matrices=2)
    for keep, saved in ((0.5, 0.476), (0.25, 0.708)):
        left = paper_macs_visual(4096, 11008, [576] * 2 + [576 * keep] * 30, mlp_matrices=2)
        assert 1 - left / whole == pytest.approx(saved, abs=5e-4)


# ------------------------------------------------------------------ closed form against torch's counter


def size_of(model: Any, inputs: dict[str, Any]) -> PromptSize:
    """Visual tokens, text tokens and what went through the tower."""
    ids, config = inputs["input_ids"], model.config
    visual = int((ids == config.image_token_id).sum())
    if "image_grid_thw" in inputs:
        images: Any = [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]
    else:
        images = len(inputs["pixel_values"].flatten(0, -4))
    return PromptSize(ids.numel() - visual, visual, images=images)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CORE)
def test_closed_form_is_what_torch_counts(family: str, backend: str) -> None:
    model = build(family, backend)
    inputs = single(family, sample(family, model, (3, 5, 2)))
    del inputs["attention_mask"]
    sizes, prompt = ModelSizes.from_config(model.config), size_of(model, inputs)
    counted = counted_prefill_flops(model, inputs)
    flops = prefill_flops(sizes, prompt.undropped(sizes.layers))
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)
    assert flops["vision_tower"] > 0 and flops["projector"] > 0 and flops["ranking"] == 0
    assert flops["total"] == sum(flops[name] for name in SUMMED)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_which_rows_of_the_tower_are_projected(kind: str, strategy: str) -> None:
    """The class token under "full"; under "default" the first row goes, which is a patch where no class token is."""
    config = fresh("llava", "sdpa", torch.float32).config.to_dict()
    config["vision_config"]["model_type"], config["vision_feature_select_strategy"] = kind, strategy
    model: Any = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig.from_dict(config)).eval()
    sizes = ModelSizes.from_config(model.config)
    assert sizes.tower.tokens == 16 + (kind[0] == "c") - (strategy == "default") and sizes.tower.crops(34) in (2, 3)
    prompt = PromptSize(9, 2 * sizes.tower.tokens, images=2)
    ids = torch.full((1, int(prompt.text + prompt.visual)), 7)
    ids[:, 3 : 3 + int(prompt.visual)] = model.config.image_token_id
    counted = counted_prefill_flops(model, {"input_ids": ids, "pixel_values": torch.zeros(2, 3, 28, 28)})
    assert prefill_flops(sizes, prompt.undropped(sizes.layers))["total"] == pytest.approx(counted["total"], rel=1e-9)


@torch.no_grad()
def test_rows_of_the_tower_s_attention_are_what_torch_counts() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    sizes, attention = ModelSizes.from_config(model.config), model.model.vision_tower.encoder.layers[-2].self_attn
    states = torch.zeros(2, 17, sizes.tower.hidden)
    with FlopCounterMode(display=False) as counter:  # the class token's row, of two crops
        keys = attention.k_proj(states).unflatten(-1, (attention.num_heads, -1))
        query = attention.q_proj(states[:, :1]).unflatten(-1, (attention.num_heads, -1))
        torch.einsum("bqhd,bkhd->bhqk", query, keys)
    prompt = PromptSize(9, 32, images=2).undropped(sizes.layers)
    once, twice = (prefill_flops(sizes, prompt, SelectionCost(tower_rows=(1,) * n))["ranking"] for n in (1, 2))
    assert once == counter.get_total_flops() and twice == 2 * once
    assert prefill_flops(sizes, prompt, SelectionCost(tower_rows=(1,), macs=5))["ranking"] == once + 10


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        (PyramidDrop(), pyramid(6, layers=(2, 3, 5), ratio=0.5)),
        (PyramidDrop(), pyramid(6, layers=(1, 4), ratio=1.0)),
        (FastV(), single_boundary(2, 0.3)),
        (RandomDrop(), pyramid(6, layers=(2, 4), ratio=0.5)),
    ],
)
def test_closed_form_is_what_torch_counts_through_the_hooks(method: Any, schedule: Schedule, kv_heads: int) -> None:
    model = fresh("llava", "sdpa", torch.float32, num_key_value_heads=kv_heads)
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    sizes = ModelSizes.from_config(model.config)
    prompt = size_of(model, inputs).under(method, schedule, sizes.layers)
    with attach(model, method, schedule):
        counted = counted_prefill_flops(model, inputs)
    flops = prefill_flops(sizes, prompt, method.selection(schedule, prompt, sizes))
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)
    assert (flops["ranking"] > 0) == method.ranks_by_attention


@pytest.mark.product(1)
@pytest.mark.parametrize("text", [SEVEN_B, THIRTEEN_B, dict(SEVEN_B, num_key_value_heads=8)])
def test_closed_form_at_real_shapes_without_weights(text: dict[str, int]) -> None:
    with torch.device("meta"):
        model: Any = transformers.LlavaForConditionalGeneration(llava_config(**text))
        model.to(torch.bfloat16).eval()
    ids = torch.zeros(1, 576 + 60, dtype=torch.long, device="meta")
    pixels = torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16, device="meta")
    sizes = ModelSizes.from_config(model.config)

    counted = counted_prefill_flops(model, {"input_ids": ids, "pixel_values": pixels})
    flops = prefill_flops(sizes, PromptSize(60, 576).undropped(sizes.layers))
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)

    # with dropping: each stage is a stack of its own layers over its own tokens
    schedule = pyramid(sizes.layers)
    visual = schedule.tokens_per_layer(576, sizes.layers)
    decoder = model.model.language_model
    layers, edges = decoder.layers, [0, *schedule.layers, sizes.layers]
    total = 0.0
    for stage, (begin, end) in enumerate(zip(edges, edges[1:])):
        decoder.layers = nn.ModuleList(layers[begin:end])
        inputs = {"input_ids": ids[:, : 60 + visual[begin]]} | ({} if stage else {"pixel_values": pixels})
        total += counted_prefill_flops(model, inputs)["total"] - (flops["lm_head"] if stage else 0)
    dropped = prefill_flops(sizes, PromptSize(60, 576, tuple(visual)))
    assert dropped["total"] == pytest.approx(total, rel=1e-6)
    assert dropped["total"] < 0.6 * flops["total"]


def test_seven_b_prefill_in_absolute_numbers() -> None:
    """LLaVA-1.5-7B, 576 + 35 tokens: 8.1094 TFLOP of decoder and lm_head at every position, 0.3819 of tower."""
    sizes = ModelSizes.from_config(llava_config(**SEVEN_B))
    flops = prefill_flops(sizes, PromptSize(35, 576).undropped(32), logits=611)
    decoder = sum(flops[name] for name in ("attention_projections", "attention", "mlp"))
    assert decoder / 1e12 == pytest.approx(8.1094, abs=0.0001)
    assert flops["vision_tower"] / 1e12 == pytest.approx(0.3819, abs=0.0001)


def test_causal_attention_is_named_and_half() -> None:
    flops = prefill_flops(ModelSizes.from_config(llava_config(**SEVEN_B)), PromptSize(60, 2880).undropped(32))
    assert flops["attention_causal"] / flops["attention"] == pytest.approx(0.5, abs=1e-3)
    saved = flops["attention"] - flops["attention_causal"]
    assert flops["total_causal"] == pytest.approx(flops["total"] - saved)


# ------------------------------------------------------------------ fvcore


def test_fvcore_agrees_on_the_eager_path_and_names_what_it_cannot_count() -> None:
    model = fresh("llava", "eager", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    del inputs["attention_mask"]
    counted = counted_prefill_flops(model, inputs)
    flops, unsupported = fvcore_prefill_flops(model, inputs)
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)
    products = ("mm", "matmul", "linear", "conv", "attention", "einsum")
    assert unsupported and not [name for name in unsupported if any(word in name for word in products)]


def test_fvcore_is_not_believed_on_other_paths() -> None:
    model = fresh("llava", "sdpa", torch.float32)
    inputs = single("llava", sample("llava", model, (3, 5)))
    with pytest.raises(ValueError, match="cannot see sdpa"):
        fvcore_prefill_flops(model, inputs)


# ------------------------------------------------------------------ a run's cost


def prompt(text: int, visual: int, schedule: Schedule, layers: int, **more: Any) -> PromptSize:
    return PromptSize(text, visual, tuple(schedule.tokens_per_layer(visual, layers)), **more)


def test_cost_is_a_mean_over_prompts() -> None:
    arch, schedule = ModelSizes.from_config(llava_config(**SEVEN_B)), pyramid(32)
    prompts = [prompt(60, 576, schedule, 32), prompt(100, 1152, schedule, 32), prompt(60, 576, schedule, 32)]
    got = cost(arch, prompts, schedule, PyramidDrop(), dtype_bytes=2)
    each = [prefill_flops(arch, p, SelectionCost(boundaries=(8, 16, 24))) for p in prompts]
    assert got.samples == 3
    assert got.prefill_flops == pytest.approx(sum(flops["total"] for flops in each) / 3)
    assert sum(got.flops_parts[name] for name in SUMMED) == pytest.approx(got.prefill_flops)
    assert got.flops_parts["ranking"] > 0
    assert got.text_tokens == pytest.approx(220 / 3) and got.visual_tokens == 768
    assert got.visual_tokens_per_layer[31] == pytest.approx(768 / 8)
    assert got.mean_keep == pytest.approx(0.46875)
    assert 0.46 < got.prefill_flops_ratio < 0.6
    whole = sum(prefill_flops(arch, p.undropped())["total"] for p in prompts)
    assert got.prefill_flops_ratio == pytest.approx(3 * got.prefill_flops / whole)
    assert got.kv_bytes == pytest.approx(2 * 4096 * 2 * sum(got.tokens_per_layer))
    assert got.kv_ratio == pytest.approx(sum(got.tokens_per_layer) / (32 * (768 + 220 / 3)))
    macs = [paper_macs_visual(arch.hidden, arch.intermediate, p.visual_per_layer) for p in prompts]
    assert got.paper_macs_visual == pytest.approx(sum(macs) / 3)
    assert got.prefill_ms is None and got.prefill_time_ratio is None


def test_cost_of_nothing_dropped_is_exactly_one() -> None:
    arch = ModelSizes.from_config(llava_config(**SEVEN_B))
    got = cost(arch, [prompt(60, 576, Schedule(), 32), prompt(7, 0, Schedule(), 32)], Schedule(), None, 2)
    assert got.prefill_flops_ratio == got.kv_ratio == got.mean_keep == 1.0
    assert got.flops_parts["ranking"] == 0


def test_cost_of_text_alone() -> None:
    arch = ModelSizes.from_config(llava_config(**SEVEN_B))
    got = cost(arch, [prompt(50, 0, pyramid(32), 32)], pyramid(32), PyramidDrop(), 2)
    assert got.mean_keep == got.prefill_flops_ratio == 1.0
    assert got.paper_macs_visual == got.flops_parts["vision_tower"] == got.flops_parts["ranking"] == 0


def test_cost_reads_what_went_through_the_tower() -> None:
    arch = ModelSizes.from_config(llava_config(**SEVEN_B))
    few, many = (
        cost(arch, [prompt(60, 1752, Schedule(), 32, images=n)], Schedule(), None, 2).flops_parts for n in (3, 5)
    )
    assert many["vision_tower"] / few["vision_tower"] == pytest.approx(5 / 3)
    assert many["mlp"] == few["mlp"]


def test_no_prompt_has_no_cost() -> None:
    with pytest.raises(ValueError, match="none"):
        cost(ModelSizes.from_config(llava_config(**SEVEN_B)), [], Schedule(), None, 2)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_kv_bytes_and_decoding_are_those_of_the_cache(family: str) -> None:
    model = fresh(family, "sdpa", torch.float32)
    method, schedule = PyramidDrop(positions="original"), pyramid(6, layers=(2, 4), ratio=0.5)
    inputs = single(family, sample(family, model, (3, 5)))
    arch = ModelSizes.from_config(model.config)
    with attach(model, method, schedule) as trace, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        tokens = [row[0] for row in trace.tokens]
        assert kv_bytes(arch, tokens, 4) == held
        step = {"input_ids": torch.tensor([[7]]), "past_key_values": cache}
        counted = counted_prefill_flops(model, step)
    assert decode_flops_per_token(arch, [n + 1 for n in tokens]) == pytest.approx(counted["total"], rel=1e-6)


# ------------------------------------------------------------------ misuse


def test_crops_of_anyres_prompts() -> None:
    """LLaVA-NeXT at 672x672: a 24x24 overview, 48x48 patches and 48 newlines are five crops."""
    tower = ModelSizes.from_config(llava_config(**SEVEN_B)).tower
    assert [tower.crops(n) for n in (576, 1152, 576 + 48 * 49, 576 + 24 * 49)] == [1, 2, 5, 3]


def test_what_cannot_be_computed_is_named() -> None:
    with pytest.raises(ValueError, match="no text_config and vision_config"):
        ModelSizes.from_config(transformers.LlamaConfig())
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        ModelSizes.from_config(transformers.LlavaConfig(text_config=dict(model_type="gpt2"), vision_config=CLIP_L))
    with pytest.raises(ValueError, match="mixture of experts"):
        ModelSizes.from_config(transformers.LlavaConfig(text_config=dict(model_type="mixtral"), vision_config=CLIP_L))
    with pytest.raises(ValueError, match="'pixtral' is not known"):
        ModelSizes.from_config(build("mistral3").config)


def test_wrong_arguments_are_refused() -> None:
    arch = ModelSizes.from_config(llava_config(**SEVEN_B))
    with pytest.raises(ValueError, match="31 entries for 32 layers"):
        prefill_flops(arch, PromptSize(60, 576).undropped(31))
    with pytest.raises(ValueError, match="boundaries"):
        prefill_flops(arch, PromptSize(60, 576).undropped(32), SelectionCost(boundaries=(32,)))
    with pytest.raises(ValueError, match="a number of crops"):
        prefill_flops(arch, PromptSize(60, 576, images=[(1, 24, 24)]).undropped(32))
