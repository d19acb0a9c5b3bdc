"""Loads a vision-language checkpoint, or says in one line why it cannot be loaded.

    checkpoint = load("llava-hf/llava-1.5-7b-hf", name="llava15_7b", dtype="bfloat16", device="cuda")
    checkpoint = load("package://pdrop.embedded/model", name="embedded")

A path is a folder, the name of a repository on the Hugging Face Hub, or `package://module/folder` inside an installed
package. `weights="random"` builds the same architecture from its config with seeded random weights, enough to measure
speed. Code that comes with a checkpoint is never executed.

Whatever could silently change a number is refused or pinned: weights that do not cover the model (transformers would
fill the gaps with random values), weights that are not numbers, a text-only checkpoint, and the image processor's
backend (torchvision and PIL resize differently; published numbers were made with PIL).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import re
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pdrop.models.processor import refuse_other_tower
from pdrop.models.quantised import made_whole, quantisation_of, refuse_other_dtype, refuse_quantised
from pdrop.models.weights import (
    DEEPEST,
    deepest_of,
    first_line,
    headers,
    read_json,
    refuse_depths,
    refuse_misfit,
    refuse_not_finite,
    weight_files,
)
from pdrop.record import Dtype

log = logging.getLogger(__name__)

Weights = Literal["pretrained", "random"]
DTYPES = get_args(Dtype)
IMAGE_BACKEND = "pil"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = (
    *("*config.json", "token*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)
SMALL = 64 << 20  # bytes; larger files are sampled for the fingerprint
BLOCKS, BLOCK = 256, 1 << 16  # how a large file is sampled, in addition to its header and size


@dataclass(eq=False)
class Checkpoint:
    """A loaded model with its processor."""

    name: str
    path: str
    revision: str | None
    weights: Weights
    fingerprint: str
    model: Any  # transformers PreTrainedModel, in eval mode
    processor: Any  # transformers ProcessorMixin

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; None without a processor."""
        return getattr(self.processor, "tokenizer", None)

    @functools.cached_property
    def second_tokenizer(self) -> Any:
        """A copy for other threads: a fast tokenizer is configured per call, and takes one call at a time."""
        return copy.deepcopy(self.tokenizer)

    @property
    def num_layers(self) -> int:
        """Layers of the language model's decoder."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)


def load(
    path: str,
    *,
    name: str,
    revision: str | None = None,
    weights: Weights = "pretrained",
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    device: str = "cpu",
    seed: int = 0,
) -> Checkpoint:
    """Load a checkpoint with its processor, in eval mode on `device`.

    Args:
        path: Folder, Hub repository, or "package://module/folder".
        name: Short name, for records and tables.
        revision: Branch, tag or commit on the Hub.
        weights: "pretrained", or "random" for seeded random weights of the same architecture.
        dtype: One of DTYPES.
        attn_implementation: As in transformers: "sdpa", "eager", "flash_attention_2", ...
        device: "cpu", "cuda", "cuda:1", "mps".
        seed: Seed of random weights.

    Raises:
        ValueError: If any of these is not available, with the remedy in the message.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    folder, config, processor = examine(path, revision=revision, weights=weights, device=device)
    import torch

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    quantised = quantisation_of(config) is not None
    if device.startswith("cuda") or quantised:  # load weights directly to the device; quantised weights cannot be moved
        options["device_map"] = {"": f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device}
    try:
        model, missing = _random(config, options, device, seed) if weights == "random" else _pretrained(folder, options)
    except (ImportError, ValueError) as error:
        if "attn" in str(error).lower() or "attention" in str(error).lower():
            raise ValueError(
                f"attn_implementation={attn_implementation!r} cannot be had here ({first_line(error)}): "
                "use sdpa or eager"
            ) from error
        if isinstance(error, ImportError):  # a package that its config needs, such as a quantisation library
            raise ValueError(f"{path}: {first_line(error)}") from error
        raise
    if missing:  # for weights whose headers cannot be checked, such as quantised ones
        raise ValueError(f"{path}: {len(missing)} weights are missing (such as {missing[0]}) and would be random")
    if weights == "pretrained":
        refuse_not_finite(model, path)
    if not quantised:
        model = model.to(device)
    elif made_whole(model):
        model = model.to(options["dtype"])
    else:
        refuse_other_dtype(model, options["dtype"], path)
    identity = fingerprint(folder, weights=weights, seed=seed)
    return Checkpoint(name, path, revision, weights, identity, model.eval(), processor)


def examine(path: str, *, revision: str | None, weights: Weights, device: str) -> tuple[Path, Any, Any]:
    """All checks that are possible before weights are read; the device is not used. Arguments as in `load`.

    Returns:
        The folder, its config and its processor.

    Raises:
        ValueError: As `load` does.
    """
    check_weights(weights)
    check_device(device)
    folder = locate(path, revision=revision, weights=weights)
    check_json(folder, path)
    tensors = headers(folder, path) if weights == "pretrained" else None
    if tensors is not None:
        refuse_depths(read_json(folder / "config.json", path), path, deepest_of(tensors))
    config = read_config(folder, path)
    refuse_quantised(config, weights, device, path)
    if tensors is not None:
        from transformers import AutoModelForImageTextToText

        refuse_misfit(AutoModelForImageTextToText, config, tensors, path)
    processor = _processor(folder, path)
    refuse_other_tower(processor, config, path)
    return folder, config, processor


def locate(path: str, *, revision: str | None = None, weights: Weights = "pretrained") -> Path:
    """The local folder of `path`; a Hub repository is downloaded (its weights only if `weights` needs them).

    Raises:
        ValueError: If there is none, or it lacks config or weights.
    """
    if path.startswith("package://"):
        module, _, inside = path.removeprefix("package://").partition("/")
        try:
            folder = Path(str(files(module))) / inside
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: there is no installed package {module}") from error
    else:
        folder = Path(path).expanduser()
        if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            folder = _download(path, revision, weights)
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder, and no name of a Hub repository (owner/name) either")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path}: no config.json in this folder, so it is not a Hugging Face checkpoint")
    if '"mm_vision_tower"' in (folder / "config.json").read_text(encoding="utf8", errors="replace"):
        raise ValueError(
            f"{path} has the format of LLaVA's own code (haotian-liu/LLaVA), which transformers does not load: give "
            "the converted checkpoint, such as llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf or "
            "llava-hf/llava-onevision-qwen2-7b-ov-hf"
        )
    if (folder / "adapter_config.json").is_file():  # transformers would load another model, the one it names
        raise ValueError(f"{path}: an adapter lies in this folder: merge it into its model (merge_and_unload) and save")
    if weights == "pretrained":
        weight_files(folder, path)
    return folder


def _download(path: str, revision: str | None, weights: Weights) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted_files(weights)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: no such folder, and it cannot be fetched from the Hub ({first_line(error)}); "
            "give a folder with the checkpoint, or check name, revision, network and login"
        ) from error


def wanted_files(weights: Weights) -> list[str]:
    """Patterns of the files to download from a repository: its weights only if needed."""
    return list(OTHER_FILES + (WEIGHT_FILES if weights == "pretrained" else ()))


def at_hand(path: str, revision: str | None = None) -> bool:
    """Whether a checkpoint is available without the network: a folder, or a Hub repository downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if path.startswith("package://") or Path(path).expanduser().exists():
        return True
    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return False
    return any(folder.glob("*.safetensors"))


def read_config(folder: Path, path: str) -> Any:
    """The config of a vision-language checkpoint.

    Raises:
        ValueError: If transformers does not know it, or it is not a vision-language model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    refuse_depths(read_json(folder / "config.json", path), path, DEEPEST)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a field of a wrong kind raises whatever its use raises
        refuse_own_code(error, path)
        raise ValueError(f"{path}: transformers cannot read its config.json ({first_line(error)})") from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{path} is not a vision-language model: its config.json says model_type {config.model_type!r}; "
            "give a checkpoint that transformers loads as image-text-to-text"
        )
    return config


def refuse_own_code(error: BaseException, path: str) -> None:
    """Turn transformers' error for a checkpoint that needs its own code into one with a remedy.

    Raises:
        ValueError: If that is what the error is about.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{path} can be loaded by code that comes with it alone (auto_map), which is never executed here: give a "
            "checkpoint whose architecture transformers has itself"
        ) from error


def check_json(folder: Path, path: str) -> None:
    """Refuse configs and tokenizer files that are not valid JSON; transformers ignores some and misreports others.

    Raises:
        ValueError: Naming file and place.
    """
    for pattern in OTHER_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.suffix == ".json":
                read_json(file, path)


def check_weights(weights: str) -> None:
    """Refuse a value of `weights` other than the two known ones.

    Raises:
        ValueError: Naming the two.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"model.weights is {' or '.join(get_args(Weights))}, not {weights!r}")


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: Naming the devices there are.
    """
    import torch

    kind, _, number = device.partition(":")
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in available or (number and not number.isdigit()):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:1 or mps")
    if int(number or 0) >= available[kind]:
        here = ", ".join(f"{n} {k}" for k, n in available.items() if n)
        raise ValueError(f"device={device} cannot be had: this machine has {here} for torch; use device=cpu")


def _pretrained(folder: Path, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model, and the names of the weights that its files lack."""
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **options
    )
    model, loading = loaded
    return model, sorted(loading["missing_keys"])


def _random(config: Any, options: dict[str, Any], device: str, seed: int) -> tuple[Any, list[str]]:
    import torch
    from transformers import AutoModelForImageTextToText

    options = {name: value for name, value in options.items() if name != "device_map"}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False, **options), []


def _processor(folder: Path, path: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if not hasattr(processor, "image_processor"):
            raise ValueError("it has a tokenizer, but no preprocessor_config.json")
        # pinned separately: video processors only have the torchvision backend
        processor.image_processor = AutoImageProcessor.from_pretrained(
            folder, backend=IMAGE_BACKEND, trust_remote_code=False
        )
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError) as error:
        refuse_own_code(error, path)
        raise ValueError(f"{path}: transformers cannot load its processor ({first_line(error)})") from error
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    log.debug("%s: image processor %s", path, type(processor.image_processor).__name__)
    return processor


def image_processor(checkpoint: Checkpoint, backend: str) -> Any:
    """A copy of a checkpoint's image processor with another backend: "pil" or "torchvision".

    Raises:
        ValueError: If the processor does not have this backend.
    """
    if backend == IMAGE_BACKEND:
        return copy.deepcopy(checkpoint.processor.image_processor)
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:  # transformers only chooses the backend by saved files
        checkpoint.processor.image_processor.save_pretrained(folder)
        try:
            return AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False)
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(
                f"{checkpoint.path}: image_backend={backend} cannot be had ({first_line(error)}): use {IMAGE_BACKEND}"
            ) from error


def fingerprint(folder: Path | str, *, weights: Weights = "pretrained", seed: int = 0) -> str:
    """16 hex digits over weights, configs, tokenizer and processor files, which identify the model.

    Files up to 64 MiB are hashed whole, larger ones by header, size and sampled blocks. A Hub snapshot is named by
    its commit. Random weights: the configs and the seed.
    """
    folder = Path(folder)
    commit = re.fullmatch(r"[0-9a-f]{40}", folder.name)
    if commit and folder.parent.name == "snapshots" and weights == "pretrained":
        return folder.name[:16]
    wanted = OTHER_FILES + (WEIGHT_FILES if weights == "pretrained" else ())
    paths = {path for pattern in wanted for path in folder.glob(pattern)}
    digest = hashlib.sha256(json.dumps([weights, seed if weights == "random" else None]).encode())
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        digest.update(_content(path))
    return digest.hexdigest()[:16]


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= SMALL:
        return path.read_bytes()
    parts = []
    with path.open("rb") as file:
        for block in range(BLOCKS):  # the first one holds the header of a safetensors file
            file.seek(max(0, size - BLOCK) * block // (BLOCKS - 1))
            parts.append(file.read(BLOCK))
    return b"".join(parts)
