"""A model's source, resolved once before anything is loaded: its identity, its sizes, how to load it.

    source = ModelSource.of("llava15_7b", "llava-hf/llava-1.5-7b-hf")
    source.layers, source.sizes, source.one_image
    checkpoint = source.load(dtype="bfloat16", attn_implementation="sdpa", device="cuda")

A source is a value: equal sources are the same model. The last model loaded is kept.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pdrop.models import checkpoint, shipped
from pdrop.models.weights import read_json
from pdrop.shapes import Images, ModelSizes, PromptSize

if TYPE_CHECKING:
    from pdrop.models.checkpoint import Checkpoint, Weights

log = logging.getLogger("pdrop")

TEXT_TOKENS = 60  # default for a prompt: a system message, a question and how to answer it


@dataclass(frozen=True)
class ModelSource:
    """A model before it is loaded. Made by `of`.

    Attributes:
        name: Its name in folders and tables.
        path: A folder, a repository on the Hub, or package://module/folder.
        revision: Branch, tag or commit on the Hub.
        weights: "pretrained"; "random", seeded, from the config alone; "architecture": sizes only, nothing runs.
        seed: Seed of random weights; 0 otherwise.
        stands_in: The shipped architecture (see shipped.py) that replaces the checkpoint, which needs no network and no
            processor. None: the checkpoint itself.
        fingerprint: 16 hex digits over everything that makes the model.
        layers: Layers of the decoder.
        visual_tokens, text_tokens: Size of the prompt for budgets and breakdowns; None: the model's own.
    """

    name: str
    path: str
    revision: str | None
    weights: Literal["pretrained", "random", "architecture"]
    seed: int
    stands_in: str | None
    fingerprint: str
    layers: int
    visual_tokens: int | None = None
    text_tokens: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        path: str,
        *,
        revision: str | None = None,
        weights: Weights = "pretrained",
        seed: int = 0,
        asked: bool = True,
        visual_tokens: int | None = None,
        text_tokens: int | None = None,
    ) -> ModelSource:
        """Resolve a model's source. A Hub repository is downloaded, unless a shipped architecture is enough.

        Args:
            asked: Whether it will answer questions, which needs weights and a processor. If not, and the weights of a
                shipped architecture are not on this machine, only its sizes are used.

        The others are as the attributes.

        Raises:
            ValueError: If there is no such model, or it is not available.
        """
        checkpoint.check_weights(weights)
        known, seed = shipped.of_checkpoint(path), seed if weights == "random" else 0
        there = weights != "pretrained" or asked or known is None or checkpoint.at_hand(path, revision)
        if not there:
            log.info("%s: no weights here, so its cost in closed form; model.weights=random times it, too", path)
        stands_in = known if not asked and (weights == "random" or not there) else None
        kind = weights if there else "architecture"
        if stands_in is None:
            fingerprint, layers = _described(path, revision, weights, seed)
        else:
            fingerprint = shipped.fingerprint(stands_in, kind, seed, [visual_tokens, text_tokens])
            layers = int(shipped.read(stands_in).get_text_config(decoder=True).num_hidden_layers)
        return cls(name, path, revision, kind, seed, stands_in, fingerprint, layers, visual_tokens, text_tokens)

    @property
    def loadable(self) -> bool:
        """Whether there is a model to load; otherwise only its cost in closed form is known."""
        return self.weights != "architecture"

    @functools.cached_property
    def family(self) -> tuple[str, str]:
        """model_type of the config and of its text model, such as ("llava_next", "mistral")."""
        known = self.stands_in or shipped.of_checkpoint(self.path)
        config = checkpoint.read_config(self._folder, self.path) if known is None else shipped.read(known)
        return config.model_type, config.get_text_config(decoder=True).model_type

    @functools.cached_property
    def multimodal_rope(self) -> bool:
        """Whether a visual token's position is of three numbers (time, height, width), as Qwen's are; without
        transformers."""
        known = self.stands_in or shipped.of_checkpoint(self.path)
        told = read_json(self._folder / "config.json", self.path) if known is None else shipped.entry(known)
        return '"mrope_section"' in json.dumps(told)

    def unchanged(self) -> bool:
        """Whether `of` would still return this value, checked without transformers.

        Raises:
            ValueError: If the model is no longer available.
        """
        if self.stands_in is None:
            return _fingerprint(self.path, self.revision, self.weights, self.seed) == self.fingerprint
        return self.loadable or not checkpoint.at_hand(self.path, self.revision)

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """From the config alone.

        Raises:
            ValueError: If the cost of such a model is not known.
        """
        known = shipped.of_checkpoint(self.path)
        if known is not None:
            return ModelSizes.from_config(shipped.read(known))
        return ModelSizes.from_config(checkpoint.read_config(self._folder, self.path))

    @functools.cached_property
    def one_image(self) -> PromptSize | None:
        """The model's prompt with one image, for which budgets and costs are computed; None if its size depends on the
        image and is not given."""
        known, text = shipped.of_checkpoint(self.path), self.text_tokens
        own = None if known is None else shipped.reference_prompt(known)
        if own is not None and self.visual_tokens in (None, own.visual):
            return own if text is None else replace(own, text=text)
        tower = self.sizes.tower
        visual = self.visual_tokens or tower.tokens
        if visual is None:
            return None
        side = round(visual**0.5) * tower.merge
        images: Images = tower.crops(visual) if tower.grid is not None else [(1, side, side)]
        return PromptSize(TEXT_TOKENS if text is None else text, visual, images=images)

    def load(self, dtype: str = "float32", attn_implementation: str = "sdpa", device: str = "cpu") -> Checkpoint:
        """Load the model, which is kept until another is loaded, so that further runs do not load it again.

        A shipped architecture has no processor.

        Raises:
            ValueError: If it cannot be loaded this way; the message has the remedy.
        """
        if not self.loadable:
            raise ValueError(f"{self.path}: no weights are here to run; model.weights=random measures without them")
        asked = (self, dtype, attn_implementation, device)
        if asked not in _last:
            forget()  # before another is loaded: a device may not have room for two
            _last.append(asked)
        return _loaded(*asked)

    def without_model(self) -> Checkpoint:
        """The checkpoint with its processor and without the model, for a process that asks others for answers.

        Raises:
            ValueError: As `load`, as far as can be checked without reading weights.
        """
        return _without_model(self)

    def check(self, device: str = "cpu") -> None:
        """Refuse what `load` would refuse, as far as can be checked without reading weights or using the device.

        Raises:
            ValueError: With the remedy in the message.
        """
        if self.stands_in is not None:
            checkpoint.check_device(device)
        elif self.weights != "architecture":
            checkpoint.examine(self.path, revision=self.revision, weights=self.weights, device=device)

    @property
    def _folder(self) -> Path:
        pretrained = self.weights == "pretrained"
        return checkpoint.locate(self.path, revision=self.revision, weights="pretrained" if pretrained else "random")


@functools.cache
def _described(path: str, revision: str | None, weights: Weights, seed: int) -> tuple[str, int]:
    """(fingerprint, decoder layers) of a checkpoint, read once per process."""
    folder = checkpoint.locate(path, revision=revision, weights=weights)
    text = read_json(folder / "config.json", path).get("text_config")
    layers = text.get("num_hidden_layers") if isinstance(text, dict) else None
    if not isinstance(layers, int):  # missing in the config if it is the architecture's default
        layers = checkpoint.read_config(folder, path).get_text_config(decoder=True).num_hidden_layers
    return _fingerprint(path, revision, weights, seed), int(layers)


@functools.cache
def _fingerprint(path: str, revision: str | None, weights: Weights, seed: int) -> str:
    folder = checkpoint.locate(path, revision=revision, weights=weights)
    return checkpoint.fingerprint(folder, weights=weights, seed=seed)


@functools.lru_cache(maxsize=1)
def _without_model(source: ModelSource) -> Checkpoint:
    assert source.weights != "architecture"
    _, _, processor = checkpoint.examine(source.path, revision=source.revision, weights=source.weights, device="cpu")
    named = (source.name, source.path, source.revision, source.weights, source.fingerprint)
    return checkpoint.Checkpoint(*named, model=None, processor=processor)


_last: list[tuple[ModelSource, str, str, str]] = []  # what `_loaded` was called with last


def forget() -> None:
    """Release the last model loaded, which frees its device memory if nothing else holds it."""
    if _last:
        _last.clear()
        _loaded.cache_clear()
        gc.collect()


@functools.lru_cache(maxsize=1)
def _loaded(source: ModelSource, dtype: str, attn_implementation: str, device: str) -> Checkpoint:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "device": device}
    options["seed"] = source.seed
    assert source.weights != "architecture"
    if source.stands_in is None:
        named: dict[str, Any] = {"name": source.name, "revision": source.revision, "weights": source.weights}
        return checkpoint.load(source.path, **named, **options)
    checkpoint.check_device(device)
    model = shipped.build(source.stands_in, **options)
    return checkpoint.Checkpoint(
        source.name, source.path, source.revision, source.weights, source.fingerprint, model, None
    )
