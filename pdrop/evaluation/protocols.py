"""Protocols: settings as for a model's published numbers, as in lmms-eval's own wrapper, or as in its checkpoint.

A protocol is a file of conf/protocols/: settings by family (a config's model_type), as plain values. It sets everything
that affects a number before anything is dropped: template and system message, how pictures are prepared and how large
they may be, how long an answer may get, which of a task's prompts is used. Each becomes a field of RunSpec under its
own name; a dial of that name takes precedence. docs/protocols.md gives the source of each value. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from pdrop.record import (
    FrameSampling,
    ImageBackend,
    ImageMode,
    ImagePlacing,
    PromptStyle,
    Stop,
    canonical_json,
    check_word,
)

ANY = "*"  # a family's name that matches all
NOTHING = "none"  # a dial's word for no system message, or no wrapper, where the protocol has one
WORDS: dict[str, Any] = {
    "prompt": PromptStyle,
    "image_mode": ImageMode,
    "image_backend": ImageBackend,
    "stop": Stop,
    "image_placing": ImagePlacing,
    "frame_sampling": FrameSampling,
}


@dataclass(frozen=True)
class FamilySettings:
    """A protocol's settings for one family; fields that are also in RunSpec are documented there.

    Attributes:
        lengths: Answer tokens for tasks of these names that set none; `*` in a name matches anything, and of several
            matching names the longest counts.
        sampled: How the published answers were sampled (ours are greedy). None: they were not.
    """

    prompt: PromptStyle
    image_mode: ImageMode
    max_new_tokens: int
    system: str | None = None
    image_backend: ImageBackend = "pil"
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    frames: int = 8
    frame_sampling: FrameSampling = "middles"
    fps: float | None = None
    min_frame_pixels: int | None = None
    max_frame_pixels: int | None = None
    max_video_pixels: int | None = None
    frame_times: bool = False
    wrapper: str | None = None
    stop: Stop = "task"
    image_placing: ImagePlacing = "marked"
    lengths: Mapping[str, int] | None = None
    sampled: str | None = None

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            check_word(name, getattr(self, name), get_args(words))


SETTINGS = tuple(field.name for field in fields(FamilySettings) if field.name not in ("lengths", "sampled"))


def of_family(protocol: str, families: Mapping[str, Mapping[str, Any]], family: str, text: str) -> FamilySettings:
    """A protocol's settings for a family.

    Args:
        protocol: Its name, for the message.
        families: The content of its file.
        family: model_type of the checkpoint's config.
        text: model_type of its text model's config.

    Raises:
        ValueError: If the protocol has no settings for this family.
    """
    for name in (f"{family}/{text}", family, ANY):
        if name in families:
            return FamilySettings(**families[name])
    known = ", ".join(families)
    raise ValueError(
        f"protocol={protocol} says nothing of {family} with {text} ({known}): use protocol=checkpoint, and say what is "
        "known of its published numbers by model.prompt, model.image_mode, max_new_tokens, ..."
    )


def settle(settings: FamilySettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a RunSpec: the protocol's, except those that a dial sets.

    Args:
        settings: The protocol's settings for the family.
        given: The dials, by the fields' names; None: not set. "none": without the protocol's system message or wrapper.
    """
    found = {name: getattr(settings, name) if given.get(name) is None else given[name] for name in SETTINGS}
    found |= {name: None for name in ("system", "wrapper") if found[name] == NOTHING}
    # an explicit answer length applies to all tasks
    lengths = settings.lengths if given.get("max_new_tokens") is None else None
    return found | {"lengths": canonical_json(dict(lengths)) if lengths else ""}
