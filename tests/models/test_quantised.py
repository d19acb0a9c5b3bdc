"""Quantised checkpoints: what a CPU can run is loaded and drops; what cannot be had is one line with the remedy."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from pdrop import FastV, PyramidDrop, Schedule, SparseVLM, Stage, attach
from pdrop.models import checkpoint
from pdrop.models.checkpoint import load, read_config
from pdrop.models.quantised import kind_of, refuse_training
from pdrop.timing.memory import bytes_of, cache_bytes
from pdrop.training.start import read_part
from tests.support.saved_checkpoints import LAYERS, save_llava

IDS = torch.tensor([[1, 20, 21, *[3] * 16, 30, 31, 32]])
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
FP8 |= {"modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"]}
# (quantization_config, what must be installed)
MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes_4bit": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "bitsandbytes_8bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "gptqmodel"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "optimum"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed_tensors"),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "x", "_data": {}}}}, "torchao"),
    "hqq": ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    "quanto": ({"quant_method": "quanto", "weights": "int8"}, "optimum"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("quantised") / "plain")


def told(plain: Path, folder: Path, settings: Any, part: str | None = None) -> Path:
    """The checkpoint with a quantization_config."""
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drops(model: Any) -> None:
    """Answers, with fewer tokens after each boundary."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    for method in (PyramidDrop(), FastV(), SparseVLM()):
        schedule = Schedule((Stage(2, 0.5),) if isinstance(method, FastV) else (Stage(1, 0.5), Stage(3, 0.25)))
        with torch.inference_mode(), attach(model, method, schedule) as trace:
            out = model.generate(
                input_ids=IDS, attention_mask=torch.ones_like(IDS), pixel_values=pixels, max_new_tokens=3,
                min_new_tokens=3, do_sample=False,
            )  # fmt: skip
        assert out.shape[1] == IDS.shape[1] + 3 and len(trace.kept[0][0]) == 8
        assert trace.scores[0][0].dtype == torch.float32


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_library_is_one_line_with_how_to_install_it(plain: Path, tmp_path: Path, kind: str) -> None:
    settings, library = MISSING[kind]
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed here")
    folder = told(plain, tmp_path / "model", settings)
    with pytest.raises(ValueError, match=rf"weights are quantised \({kind}\).*device=cpu") as error:
        load(str(folder), name="x")
    assert "\n" not in str(error.value)
    assert "pip install" in str(error.value) or (kind == "hqq" and "github.com" in str(error.value))


def test_kinds_that_transformers_does_not_read_are_refused(plain: Path, tmp_path: Path) -> None:
    """It would ignore the entry, and read packed numbers as weights."""
    for number, settings in enumerate(({"quant_method": "odd"}, {})):
        with pytest.raises(ValueError, match=r"quantization_config of quant_method .*does not read: it reads aqlm"):
            load(str(told(plain, tmp_path / str(number), settings)), name="x")
    inside = told(plain, tmp_path / "inside", MISSING["awq"][0], "text_config")
    with pytest.raises(ValueError, match=r"quantised \(awq\)|fit its config"):
        load(str(inside), name="x")


def test_random_weights_would_not_be_quantised(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantised \(fp8\); random ones would not be.*model\.weights=pretrained"):
        load(str(told(plain, tmp_path / "model", FP8)), name="x", weights="random")


def test_they_are_not_trained_nor_taken_over(plain: Path, tmp_path: Path) -> None:
    folder = told(plain, tmp_path / "model", FP8)
    with pytest.raises(ValueError, match=r"quantised \(fp8\), which cannot be trained here"):
        read_part(transformers.AutoModelForImageTextToText, folder, "part", torch.float32)
    with pytest.raises(ValueError, match=r"quantised \(fp8\), which cannot be trained here"):
        refuse_training(read_config(folder, "whole"), "whole")
    refuse_training(read_config(plain, "plain"), "plain")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes with them")
def test_fp8_is_made_whole_where_it_cannot_be_computed_with(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = told(plain, tmp_path / "model", FP8)
    whole, packed = load_file(folder / "model.safetensors"), {}
    for name, weight in whole.items():
        if "language_model" not in name or not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        blocks = weight.reshape(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        packed[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        packed[name.replace(".weight", ".weight_scale_inv")] = scale
    assert len(packed) == len(whole) + 7 * LAYERS
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.bfloat16, torch.float32):
        model = load(str(folder), name="x", dtype=str(dtype).removeprefix("torch.")).model
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert "made whole on loading" in caplog.text
        drops(model)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    want = dict(load(str(plain), name="x").model.named_parameters())[name]
    torch.testing.assert_close(dict(model.named_parameters())[name], want, rtol=0.07, atol=0.01)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_loads_in_place_and_drops(plain: Path, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    wanted: Any = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    made = transformers.AutoModelForImageTextToText.from_pretrained(
        plain, dtype=torch.float16, quantization_config=transformers.BitsAndBytesConfig(**wanted),
        device_map={"": "cpu"},
    )  # fmt: skip
    folder = shutil.copytree(plain, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    made.save_pretrained(folder)
    model = load(str(folder), name="x", dtype="float16").model
    assert kind_of(model.config) == f"bitsandbytes_{bits}bit"
    assert "bitsandbytes" in type(model.model.language_model.layers[0].self_attn.q_proj).__module__
    drops(model)


def test_a_quantised_cache_is_counted_whole(plain: Path) -> None:
    model = load(str(plain), name="x").model
    tokens = IDS.shape[1] - 16 + 8
    pixels = torch.zeros(1, 3, 28, 28)
    with torch.inference_mode(), attach(model, PyramidDrop(), Schedule((Stage(2, 0.5),))):
        cache = transformers.QuantizedCache("fp8", config=model.config)
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), pixel_values=pixels, past_key_values=cache)
    found = cache_bytes(cache)
    one = 2 * 2 * 8  # keys and values, 2 heads of 8, a byte each
    assert found == [one * n + 2 * 4 for n in (IDS.shape[1], IDS.shape[1], tokens, tokens)], "codes, and two scales"
    nested = ({"scale": torch.zeros(3), "shape": (2, 4)}, [torch.zeros(2, dtype=torch.int8)], None, 7)
    assert bytes_of(nested) == 3 * 4 + 2
    assert bytes_of(TwoTensor(torch.zeros(3), torch.zeros(3))) == 2 * 3 * 4, "composed of codes and scales, say"


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("device", "place"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")])
def test_weights_are_loaded_onto_their_device(
    plain: Path, monkeypatch: pytest.MonkeyPatch, device: str, place: str, quantised: bool
) -> None:
    """Not by way of the host: quantised ones cannot be moved, and others would be read twice."""
    seen: list[Any] = []

    def pretrained(folder: Path, options: Any) -> Any:
        seen.append(options.get("device_map"))
        raise RuntimeError("that will do")

    monkeypatch.setattr(checkpoint, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(checkpoint, "quantisation_of", lambda config: {"quant_method": "any"} if quantised else None)
    monkeypatch.setattr(checkpoint, "_pretrained", pretrained)
    with pytest.raises(RuntimeError, match="that will do"):
        load(str(plain), name="x", device=device)
    assert seen == [{"": place} if quantised or device != "cpu" else None]
