"""Weights: held against their config by the headers alone, refused where they are not numbers; configs that are none;
a checkpoint's own code.
"""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pdrop.models import weights
from pdrop.models.checkpoint import load, locate, read_config
from tests.support.saved_checkpoints import LAYERS, save_llava, save_llava_next, save_qwen2_5_vl

GONE = object()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("weights") / "llava")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def change(path, **changes):
    """Rewrite fields of a JSON file; part__field is a field of a part."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, inside = name.partition("__")
        node, key = (data[part], inside) if inside else (data, part)
        if value is GONE:
            del node[key]
        else:
            node[key] = value
    path.write_text(json.dumps(data))


MISFITS = {
    "no text_config": ({"text_config": GONE}, r"the model that it describes has 6,7\d\d,.*text_config is left out"),
    "no vision_config": ({"vision_config": GONE}, "the model that it describes has 303,"),
    "width": (
        {"text_config__hidden_size": 64},
        r"have other sizes \(such as lm_head.weight, \[100, 32\] where .*64\]\)",
    ),
    "heads": ({"text_config__head_dim": 16}, "have other sizes .*k_proj"),
    "vocabulary": ({"text_config__vocab_size": 10**13}, "the model that it describes has"),
    "tower": ({"vision_config__intermediate_size": 48}, "6 have other sizes .*mlp.fc1"),
    "tower's layers": ({"vision_config__num_hidden_layers": 3}, "16 are missing .*layers.2"),
    "picture": ({"vision_config__image_size": 10**6}, "the model that it describes has"),
    "more layers": ({"text_config__num_hidden_layers": LAYERS + 1}, "num_hidden_layers=5, where 1 to 4 are possible"),
    "a billion layers": ({"text_config__num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, where 1 to 4"),
    "fewer layers": ({"text_config__num_hidden_layers": 2}, "18 are of layers that it does not have .*layers.2"),
    "no layers": ({"text_config__num_hidden_layers": 0}, "num_hidden_layers=0, where 1 to 4 are possible"),
    "width beyond all memory": ({"text_config__hidden_size": 10**15}, "no model can be built as its config.json says"),
    "width is a word": ({"text_config__hidden_size": "many"}, "cannot read its config.json .*expected int, got str"),
    "no heads": ({"text_config__num_attention_heads": 0}, "cannot read its config.json"),
    "text_config is a number": ({"text_config": 5}, "cannot read its config.json"),
}


@pytest.mark.parametrize(("changes", "message"), MISFITS.values(), ids=MISFITS)
def test_a_config_of_other_sizes_is_refused_before_anything_is_built(copy, changes, message, monkeypatch):
    def built(*args, **kwargs):
        raise AssertionError("weights are read only once they fit")

    monkeypatch.setattr("pdrop.models.checkpoint._pretrained", built)
    change(copy / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(str(copy), name="x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [save_llava, save_llava_next, save_qwen2_5_vl])
def test_what_fits_passes_whatever_its_weights_are_called(tmp_path, save):
    folder = save(tmp_path / "saved")
    config, tensors = read_config(folder, "x"), weights.headers(folder, "x")
    weights.refuse_misfit(AutoModelForImageTextToText, config, tensors, "x")
    assert sum(map(torch.Size.numel, map(torch.Size, tensors.values()))) == sum(
        tensor.numel() for tensor in load_file(folder / "model.safetensors").values()
    )


def shard(folder):
    """Split model.safetensors in two, with an index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: held[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / weights.INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_those_of_the_index(copy, folder):
    index = shard(copy)
    assert weights.headers(copy, "x") == weights.headers(folder, "x")
    load(str(copy), name="x")
    (copy / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 files that .*index\.json names are not .*model-2\.safetensors"):
        locate(str(copy))
    index["weight_map"][next(iter(index["weight_map"]))] = "../../other.safetensors"
    (copy / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a file of .*index\.json becomes part of a path"):
        locate(str(copy))
    (copy / weights.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        locate(str(copy))


def test_pickles_are_named_and_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no \*\.safetensors weights.*pytorch_model\.bin is a pickle.*save_pretrained"
    ):
        locate(str(copy))


def test_an_adapter_is_no_checkpoint(copy):
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/other"}')
    with pytest.raises(ValueError, match="an adapter lies in this folder: merge it"):
        locate(str(copy))


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_damaged_files_are_named(copy, cut):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .*fetch it again"):
        load(str(copy), name="x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_weights_that_are_no_numbers_are_found_in_every_dtype(value, dtype):
    for size in (1, 7, 1000):
        tensor = torch.zeros(size, dtype=getattr(torch, dtype))
        assert weights.finite(tensor)
        tensor[-1] = value
        assert not weights.finite(tensor)


def test_other_tensors_are_no_trouble():
    eight = torch.ones(8, dtype=torch.float32).to(torch.float8_e4m3fn)
    assert weights.finite(eight) and weights.finite(torch.zeros(0)) and weights.finite(torch.zeros(3, device="meta"))
    eight.view(torch.uint8)[3] = 0x7F  # its NaN
    assert not weights.finite(eight)


def test_bytes_that_are_no_numbers_are_refused(copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    data[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"of its \d+ weight tensors are not finite \(such as .*the file is damaged"):
        load(str(copy), name="x")


def test_a_damaged_attention_weight_is_not_taken_for_a_missing_backend(copy):
    held = load_file(copy / "model.safetensors")
    name = next(name for name in sorted(held) if "self_attn.q_proj" in name)
    held[name][0, 0] = float("nan")
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^[^=]*: 1 of its \d+ weight tensors .*self_attn\.q_proj.* is damaged"):
        load(str(copy), name="x")


def test_values_that_a_dtype_cannot_hold_are_refused(copy):
    held = load_file(copy / "model.safetensors")
    held["lm_head.weight" if "lm_head.weight" in held else sorted(held)[0]][0, 0] = 1e5
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(str(copy), name="x", dtype="bfloat16").model is not None
    with pytest.raises(ValueError, match=r"1 of its \d+ weight tensors .*holds values that float16 cannot"):
        load(str(copy), name="x", dtype="float16")


BROKEN = ["", "{", "[]", '"x"', '{"a": }', "\x00\x01", "[" * 100_000]
FILES = ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_invalid_json_is_named(copy, file):
    assert (copy / file).is_file(), "every one of them is read"
    for text in BROKEN:
        (copy / file).write_text(text)
        with pytest.raises(ValueError, match=rf"{file} (is not valid JSON|holds a \w+, where)") as error:
            load(str(copy), name="x")
        assert "\n" not in str(error.value)


def test_invalid_json_is_named_at_the_door(copy):
    from pdrop.models.source import ModelSource

    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelSource.of("x", str(copy))


OWN_CODE = """import pathlib
pathlib.Path(r"{witness}").write_text("run")
class Own:
    from_pretrained = classmethod(lambda cls, *a, **k: cls())
"""
OWN = {
    "config": ("config.json", {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Own"}}),
    "model": ("config.json", {"auto_map": {"AutoModelForImageTextToText": "own.Own", "AutoConfig": "own.Own"}}),
    "processor": ("processor_config.json", {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}),
    "image processor": (
        "processor_config.json",
        {"image_processor": {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}},
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_code_that_comes_with_a_checkpoint_is_never_run(copy, tmp_path, kind, monkeypatch):
    witness, (file, changes) = tmp_path / "witness", OWN[kind]
    (copy / "own.py").write_text(OWN_CODE.format(witness=witness))
    change(copy / file, **changes)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask on the terminal
    if kind in ("model", "tokenizer"):  # here transformers has a class itself
        assert load(str(copy), name="x").model is not None
    else:
        with pytest.raises(ValueError, match=r"by code that comes with it alone .* never executed here"):
            load(str(copy), name="x")
    assert not witness.exists(), "it was run"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_with_its_remedy(copy, name):
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, not the file: git lfs pull"):
        load(str(copy), name="x")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"patch_size": GONE}, '"patch_size": 7'),
        ({"num_additional_image_tokens": GONE}, '"num_additional_image_tokens": 1'),
        ({"vision_feature_select_strategy": "full"}, '"vision_feature_select_strategy": "default"'),
    ],
)
def test_a_processor_that_counts_other_tokens_than_the_tower_is_refused(copy, changes, remedy):
    change(copy / "processor_config.json", **changes)
    with pytest.raises(ValueError, match=f"set in processor_config.json {remedy}"):
        load(str(copy), name="x")


def test_a_processor_that_shows_other_pictures_than_the_tower_takes_is_refused(copy):
    path = copy / "processor_config.json"
    said = json.loads(path.read_text())
    said["image_processor"]["crop_size"] = {"height": 14, "width": 14}
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"shows pictures of 14 pixels a side, its tower takes 28: set in .* to 28"):
        load(str(copy), name="x")
