"""What a run reads: its checkpoint and its task files, identified before anything is loaded."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from pdrop.settings import Settings

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint

DATA_FILE = re.compile(r"[\w./-]+\.(?:parquet|jsonl?|csv|arrow)\b")


@functools.cache
def task_digest(tasks: tuple[str, ...], folders: tuple[str, ...]) -> str:
    """12 hex digits over the files of tasks that do not come with lmms-eval, and the local data they name; else "".

    Raises:
        ValueError: If a task is unknown; close matches are named.
    """
    from pdrop.scoring import task_index

    installed = task_index.installed_folder()
    found = {path for paths in task_index.find(tasks, folders).values() for path in paths}
    own = {folder for folder in (path.parent for path in found) if installed not in folder.parents}
    if not own:
        return ""
    digest = hashlib.sha256()
    for folder in sorted(own):
        files = {path for path in folder.iterdir() if path.is_file()}
        named = {folder / name for file in files for name in DATA_FILE.findall(file.read_text(errors="replace"))}
        for path in sorted({path.resolve() for path in files | named if path.is_file()}):
            digest.update(f"{path.name}:".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


@functools.cache
def describe(path: str, revision: str | None, weights: Any, seed: int) -> tuple[str, int]:
    """(fingerprint, decoder layers) of a checkpoint, without loading its weights."""
    from pdrop import checkpoint

    folder = checkpoint.locate(path, revision=revision, weights=weights)
    text = json.loads((folder / "config.json").read_text(encoding="utf8")).get("text_config") or {}
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):  # left out where it is the architecture's default: transformers knows it
        layers = checkpoint.read_config(folder, path).get_text_config(decoder=True).num_hidden_layers
    return checkpoint.fingerprint(folder, weights=weights, seed=seed), int(layers)


def load(settings: Settings) -> Checkpoint:
    """The loaded checkpoint, kept until another is asked for: a further cell costs its own forward passes only."""
    return load_once(
        settings.path,
        settings.model,
        settings.revision,
        settings.weights,
        settings.dtype,
        settings.attn_implementation,
        settings.device,
        weight_seed(settings),
    )


@functools.lru_cache(maxsize=1)
def load_once(
    path: str, name: str, revision: str | None, weights: Any, dtype: str, attention: str, device: str, seed: int
) -> Checkpoint:
    """See `load`."""
    from pdrop import checkpoint

    return checkpoint.load(
        path,
        name=name,
        revision=revision,
        weights=weights,
        dtype=dtype,
        attn_implementation=attention,
        device=device,
        seed=seed,
    )


def weight_seed(settings: Settings) -> int:
    """The seed, as far as it makes the weights."""
    return settings.seed if settings.weights == "random" else 0


def accelerator(device: str) -> dict[str, Any]:
    """What only torch knows of the machine: the device's name, threads."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"device_name": name, "threads": torch.get_num_threads()}
