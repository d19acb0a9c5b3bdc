"""Checkpoints: what loads, what is refused and how, and what tells two of them apart."""

import shutil

import pytest
import torch
import transformers

from pdrop.models import checkpoint
from pdrop.models.checkpoint import fingerprint, load
from tests.support.saved_checkpoints import LAYERS, config, save_llava, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_folder_loads_with_pinned_image_processor(folder):
    loaded = load(str(folder), name="tiny", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert loaded.num_layers == LAYERS and loaded.model.config.image_token_id == 3
    assert type(loaded.processor.image_processor).__name__.endswith("Pil"), "torchvision resizes differently"
    assert loaded.fingerprint == fingerprint(folder)


def test_llavas_own_format_is_refused_by_its_name(copy):
    """As liuhaotian/llava-v1.5-7b is: config.json without a config of the tower, weights that nobody looks at."""
    (copy / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}')
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"LLaVA's own code .* give the converted checkpoint, such as llava-hf/llava"):
        load(str(copy), name="tiny")


def test_random_weights_need_no_weights_and_are_seeded(tmp_path):
    folder = save_llava(tmp_path / "bare", weights=False)
    first, again, other = (load(str(folder), name="r", weights="random", seed=seed) for seed in (0, 0, 1))
    weight = [m.model.lm_head.weight for m in (first, again, other)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])
    assert first.fingerprint == again.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match=r"no \*\.safetensors weights.*weights=random"):
        load(str(folder), name="bare")


def test_drawing_random_weights_leaves_the_generator_alone(tmp_path):
    folder = save_llava(tmp_path / "bare", weights=False)
    state = torch.get_rng_state()
    load(str(folder), name="r", weights="random", seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float31"}, "unknown dtype 'float31': choose one of float32"),
        ({"weights": "none"}, "weights is pretrained or random"),
        ({"device": "cuda:7"}, "device=cuda:7 cannot be had.*use device=cpu"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"attn_implementation": "no_such"}, "attn_implementation='no_such' cannot be had.*use sdpa or eager"),
    ],
)
def test_options_that_cannot_be_had(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load(str(folder), name="tiny", **options)
    assert "\n" not in str(error.value)


def test_missing_folder_and_missing_config(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load(str(tmp_path / "nothing"), name="x")
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        load(str(tmp_path), name="x")
    with pytest.raises(ValueError, match="no installed package pdrop_no_such"):
        load("package://pdrop_no_such/model", name="x")


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be fetched from the Hub.*give a folder") as error:
        load("nobody/no-such-model", name="x")
    assert "\n" not in str(error.value)


def test_a_language_model_is_no_vision_language_model(tmp_path):
    text = config().text_config
    transformers.LlamaForCausalLM(text).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a vision-language model: its config\.json says model_type 'llama'"):
        load(str(tmp_path), name="x")


def test_a_checkpoint_without_image_processor(copy):
    (copy / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="processor"):
        load(str(copy), name="x")


def test_weights_that_do_not_cover_the_model_are_refused(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing \(such as .*multi_modal_projector.*would be random"):
        load(str(copy), name="x")


def test_fingerprint_tells_weights_and_processing_apart(copy, monkeypatch):
    first = fingerprint(copy)
    (copy / "notes.md").write_text("not part of the model")
    assert fingerprint(copy) == first
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    second = fingerprint(copy)
    assert second != first
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "HUMAN"))
    third = fingerprint(copy)
    assert third != second
    monkeypatch.setattr(checkpoint, "SMALL", 8192)  # the large files' way: header, size, blocks
    sampled = fingerprint(copy)
    path.write_bytes(bytes(data[:100]) + b"\xff" + bytes(data[101:]))
    assert fingerprint(copy) != sampled


def test_a_hub_snapshot_is_named_by_its_commit(folder, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    assert fingerprint(snapshot) == commit[:16]
