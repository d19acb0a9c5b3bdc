"""What a run reads: its checkpoint and its task files, identified before anything is loaded."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pdrop import architectures
from pdrop.settings import Settings
from pdrop.shapes import Images, ModelSizes, PromptSize

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint

log = logging.getLogger("pdrop")

TEXT_TOKENS = 60  # of a prompt where nobody says: a system sentence, a question and how to answer it
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


def without_weights(settings: Settings) -> Settings:
    """The settings themselves; or, where nothing is scored and the weights are not here, those of a ledger.

    A ledger needs an architecture that is shipped (pdrop/architectures), and no network.
    """
    from pdrop import checkpoint

    if settings.tasks or settings.weights != "pretrained" or architectures.of_checkpoint(settings.path) is None:
        return settings
    if checkpoint.at_hand(settings.path, settings.revision):
        return settings
    log.info("%s: no weights here, so its ledger in closed form; model.weights=random times it, too", settings.path)
    off = replace(settings.latency, name="off", pairs=0)
    return replace(settings, weights="architecture", latency=off)


def shipped(settings: Settings) -> str | None:
    """The shipped architecture that stands for the checkpoint, where no weights or tokeniser are needed of it."""
    if settings.tasks or settings.weights == "pretrained":
        return None
    return architectures.of_checkpoint(settings.path)


def describe(settings: Settings) -> tuple[str, int]:
    """(fingerprint, decoder layers) of what a run is made with, without loading weights."""
    name = shipped(settings)
    if name is None:
        return describe_checkpoint(settings.path, settings.revision, settings.weights, weight_seed(settings))
    prompt = [settings.visual_tokens, settings.text_tokens]
    layers = architectures.read(name).get_text_config(decoder=True).num_hidden_layers
    return architectures.fingerprint(name, settings.weights, weight_seed(settings), prompt), int(layers)


@functools.cache
def describe_checkpoint(path: str, revision: str | None, weights: Any, seed: int) -> tuple[str, int]:
    """The same of a checkpoint."""
    from pdrop import checkpoint

    folder = checkpoint.locate(path, revision=revision, weights=weights)
    text = json.loads((folder / "config.json").read_text(encoding="utf8")).get("text_config") or {}
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):  # left out where it is the architecture's default: transformers knows it
        layers = checkpoint.read_config(folder, path).get_text_config(decoder=True).num_hidden_layers
    return checkpoint.fingerprint(folder, weights=weights, seed=seed), int(layers)


def sizes(settings: Settings) -> ModelSizes:
    """The model's sizes, from its config alone."""
    from pdrop import checkpoint

    if (name := architectures.of_checkpoint(settings.path)) is not None:
        return ModelSizes.from_config(architectures.read(name))
    folder = checkpoint.locate(settings.path, revision=settings.revision, weights=settings.weights)  # type: ignore[arg-type]
    return ModelSizes.from_config(checkpoint.read_config(folder, settings.path))


def reference_prompt(settings: Settings) -> PromptSize:
    """The model's prompt, which budgets and ledgers are of; where nothing is scored with `latency.images` images.

    Raises:
        ValueError: If its size depends on the image, and nobody has said it.
    """
    if (prompt := known_prompt(settings)) is None:
        raise ValueError(f"how many visual tokens a prompt of {settings.model} has depends on its image: say it, "
                         "model.visual_tokens=1296")  # fmt: skip
    return prompt


def known_prompt(settings: Settings) -> PromptSize | None:
    """The same; None where nobody has said its size."""
    prompt = one_image(settings)
    return prompt if prompt is None or settings.tasks else prompt.times(settings.latency.images)


def one_image(settings: Settings) -> PromptSize | None:
    """The model's prompt with one image; None where nobody has said its size."""
    name, text = architectures.of_checkpoint(settings.path), settings.text_tokens
    known = architectures.reference_prompt(name) if name is not None else None
    if known is not None and settings.visual_tokens in (None, known.visual):
        return known if text is None else replace(known, text=text)
    tower = sizes(settings).tower
    visual = settings.visual_tokens or tower.tokens
    if visual is None:
        return None
    images: Images
    images = tower.crops(visual) if tower.grid is not None else [(1, side := round(visual**0.5) * tower.merge, side)]
    return PromptSize(TEXT_TOKENS if text is None else text, visual, images=images)


def load(settings: Settings) -> Checkpoint:
    """The loaded checkpoint, kept until another is asked for: a further cell costs its own forward passes only.

    A shipped architecture with random weights has no processor.
    """
    return load_once(
        shipped(settings),
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
    architecture: str | None,
    path: str,
    name: str,
    revision: str | None,
    weights: Any,
    dtype: str,
    attention: str,
    device: str,
    seed: int,
) -> Checkpoint:
    """See `load`."""
    from pdrop import checkpoint

    if architecture is not None:
        checkpoint.check_device(device)
        options = {"dtype": dtype, "attn_implementation": attention, "device": device, "seed": seed}
        model = architectures.build(architecture, **options)  # type: ignore[arg-type]
        identity = architectures.fingerprint(architecture, weights, seed)
        return checkpoint.Checkpoint(name, path, revision, weights, identity, model, None)
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
