"""The engine against what the official PyramidDrop and FastV programs computed: tests/vectors/README.md has the cases.

Why: everything else in the tests is our own reading of the papers; these numbers are not.

    pytest tests/engine/test_vectors.py
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pdrop import FastV, PyramidDrop, Schedule, Stage, attach
from pdrop.conformance import oracle
from pdrop.conformance.families import CLIP

VECTORS = Path(__file__).parents[1] / "vectors"
IMAGE = 0  # text ids of the vectors begin at 3
SCORES, LOGITS, CACHE, GRADIENTS = 1e-4, 5e-4, 1e-5, 2e-4


@functools.cache
def read_case(manifest: str, name: str) -> dict[str, Any]:
    """One case with its arrays under "arrays", after checking the file's hash."""
    cases = json.loads((VECTORS / manifest).read_text())["cases"]
    case = next(case for case in cases if case["name"].startswith(name))
    path = VECTORS / case["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == case["sha256"], f"{path} has changed"
    return case | {"arrays": {key: torch.from_numpy(np.array(value)) for key, value in load_file(path).items()}}


def read_model(case: dict[str, Any], rows: Tensor, backend: str = "sdpa") -> LlavaForConditionalGeneration:
    """A LLaVA with the case's language model, whose vision tower gives `rows` [image tokens, width]."""
    config = json.loads((VECTORS / "models" / f"{case['model']}.json").read_text())
    text = LlamaConfig(**{key: value for key, value in config.items() if key not in ("note", "model_type")})
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=CLIP, image_token_index=IMAGE))
    weights = {}
    for name, value in load_file(VECTORS / "models" / f"{case['model']}.safetensors").items():
        name = name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
        weights[name] = torch.from_numpy(value.astype(np.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("vision_tower" in name or "projector" in name for name in missing)
    model.set_attn_implementation(backend)

    images: Any = [rows]

    def image_features(pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=images)

    model.model.get_image_features = image_features
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 1
    return model.float().eval()


def expand(ids: Tensor, tokens: int) -> Tensor:
    """The ids with one IMAGE a visual token in place of the -200."""
    at = int((ids == -200).nonzero()[0])
    return torch.cat([ids[:at], torch.full((tokens,), IMAGE), ids[at + 1 :]])


def schedule_of(case: dict[str, Any]) -> Schedule:
    if "K" in case:
        return Schedule((Stage(case["K"], 1 - case["R"]),))
    return Schedule(tuple(map(Stage, case["layer_list"], case["image_token_ratio_list"])))


def single_row(case: dict[str, Any], backend: str) -> tuple[Any, dict[str, Tensor]]:
    tokens = case["image_tokens"] if isinstance(case["image_tokens"], int) else case["image_tokens"][0]
    ids = expand(case["arrays"]["input_ids"], tokens)
    rows = case["arrays"]["inputs_embeds"].float()[ids == IMAGE]
    return read_model(case, rows, backend), {"input_ids": ids[None], "pixel_values": torch.zeros(1, 3, 28, 28)}


INFERENCE = [
    pytest.param("pdrop/manifest.json", "p01", PyramidDrop(), id="pyramiddrop-24"),
    pytest.param("pdrop/manifest.json", "p02", PyramidDrop(), id="pyramiddrop-100-floor"),
    pytest.param("fastv/manifest_hf439.json", "h01", FastV(), id="fastv-24"),
    pytest.param("fastv/manifest_hf439.json", "h03", FastV(), id="fastv-25-half-to-even"),
]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("manifest", "name", "method"), INFERENCE)
def test_prefill_and_decoding(manifest: str, name: str, method: Any, backend: str) -> None:
    case = read_case(manifest, name)
    arrays, steps, (model, batch) = case["arrays"], case["decode_steps"], single_row(case, backend)
    with attach(model, method, schedule_of(case)) as trace:
        prefill = model(**batch, past_key_values=DynamicCache(config=model.config))
        out = model.generate(
            **batch,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for stage in range(len(trace.kept)):
        key = "" if "kept" in arrays else f"stage{stage}_"
        assert trace.kept[stage][0].tolist() == arrays[f"{key}kept"].tolist()
        largest = float(arrays[f"{key}scores"].max())
        assert trace.scores[stage][0].dtype == torch.float32
        torch.testing.assert_close(trace.scores[stage][0], arrays[f"{key}scores"], rtol=0, atol=SCORES * largest)
    places = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    dropped = torch.ones(len(places), dtype=torch.bool)
    dropped[trace.kept[-1][0]] = False
    left = torch.ones_like(batch["input_ids"][0], dtype=torch.bool)
    left[places[dropped]] = False
    torch.testing.assert_close(prefill.logits[0, left], arrays["prefill_logits"], rtol=0, atol=LOGITS)
    assert not prefill.logits[0, ~left].any()
    assert out.sequences[0, -steps - 1 :].tolist() == arrays["tokens"].tolist()
    decoded = torch.cat(out.logits[1:])
    torch.testing.assert_close(decoded, arrays["decode_logits"], rtol=0, atol=LOGITS)
    layers = out.past_key_values.layers
    assert [layer.keys.shape[2] for layer in layers] == arrays["cache_len_after_all"].tolist()
    for kind in ("key", "value"):
        if f"{kind}_cache_l2" in arrays:
            norms = torch.stack([getattr(layer, f"{kind}s").double().norm() for layer in layers])
            torch.testing.assert_close(norms, arrays[f"{kind}_cache_l2"], rtol=CACHE, atol=0)


@pytest.mark.parametrize("name", ["t01", "t02"], ids=["one-row", "two-ragged-rows"])
def test_training_loss_and_gradients(name: str) -> None:
    case = read_case("pdrop/manifest.json", name)
    arrays = case["arrays"]
    ids = torch.full(arrays["labels"].shape, 1)
    for row, (row_ids, mask) in enumerate(zip(arrays["input_ids"], arrays["attention_mask_ids"].bool())):
        full = expand(row_ids[mask], case["image_tokens"][row])
        ids[row, : len(full)] = full
    embeddings = arrays["inputs_embeds"].float().requires_grad_()
    model = read_model(case, embeddings[ids == IMAGE]).train()
    batch = {"input_ids": ids, "attention_mask": arrays["attention_mask"].long()}
    batch |= {"pixel_values": torch.zeros(1, 3, 28, 28), "labels": arrays["labels"]}
    with attach(model, PyramidDrop(), schedule_of(case)) as trace:
        out = model(**batch, use_cache=False)
        out.loss.backward()
    for stage, kept in enumerate(trace.kept):
        for row, indices in enumerate(kept):
            assert indices.tolist() == arrays[f"stage{stage}_b{row}_kept"].tolist()
            want = arrays[f"stage{stage}_b{row}_scores"]
            torch.testing.assert_close(trace.scores[stage][row], want, rtol=0, atol=SCORES * float(want.max()))
    places = [(row == IMAGE).nonzero()[:, 0] for row in ids]
    for row, length in enumerate(arrays["final_len"].tolist()):
        left = arrays["attention_mask"][row].bool().clone()
        left[places[row]] = False
        left[places[row][trace.kept[-1][row]]] = True
        assert int(left.sum()) == length
        torch.testing.assert_close(out.logits[row, left], arrays["logits"][row, :length], rtol=0, atol=LOGITS)
    assert abs(float(out.loss.detach()) - case["loss"]) < 1e-5
    compared = 0
    for parameter, norm in case["grad_norms"].items():
        if parameter == "model.embed_tokens.weight":  # here its text rows alone take part, there all of inputs_embeds
            continue
        ours = model.get_parameter(parameter.replace("model.", "model.language_model.", 1))
        assert abs(float(ours.grad.double().norm()) - norm) <= GRADIENTS * norm, parameter
        compared += 1
    assert compared == 74
    want = arrays["grad_inputs_embeds"]
    got = embeddings.grad[ids == IMAGE]
    torch.testing.assert_close(got, want[ids == IMAGE], rtol=0, atol=GRADIENTS * float(want.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(("manifest", "name", "method"), INFERENCE)
def test_the_oracle_itself_reproduces_them(manifest: str, name: str, method: Any) -> None:
    """The masked oracle of the other tests is held to the same numbers, else it would prove nothing."""
    case = read_case(manifest, name)
    arrays, (model, batch) = case["arrays"], single_row(case, "sdpa")
    rule = oracle.FASTV if isinstance(method, FastV) else oracle.PYRAMIDDROP
    boundaries = {stage.layer: stage.keep for stage in schedule_of(case)}
    truth = oracle.forward(model, batch, rule, boundaries, method.positions)
    for stage, kept in enumerate(truth.kept):
        key = "" if "kept" in arrays else f"stage{stage}_"
        assert kept[0] == arrays[f"{key}kept"].tolist()
        np.testing.assert_allclose(truth.scores[stage][0], arrays[f"{key}scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(truth.logits[0, truth.alive[0]], arrays["prefill_logits"], rtol=0, atol=LOGITS)
