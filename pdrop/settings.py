"""A run's settings, resolved to plain values, and the identity that follows from them. No torch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pdrop.environment import code_digest, versions
from pdrop.record import RunSpec, canonical_json
from pdrop.schedule import Schedule

if TYPE_CHECKING:
    from pdrop.latency import Protocol
    from pdrop.methods.base import Method


@dataclass(frozen=True)
class Settings:
    """A run's settings, resolved: no defaults left to fill in. See conf/run.yaml for what each means."""

    model: str
    path: str
    revision: str | None
    weights: Literal["pretrained", "random", "architecture"]  # the last: nothing but sizes, nothing runs
    dtype: str
    attn_implementation: str
    device: str
    batch_size: int
    prompt: str
    image_mode: str
    tasks: tuple[str, ...]
    task_folders: tuple[str, ...]
    limit: int | None
    seed: int
    max_new_tokens: int
    latency: Protocol
    results: Path
    experiment: str | None = None
    force: bool = False
    layers: tuple[int, ...] | None = None  # boundaries that the user fixed
    budget: str | None = None
    visual_tokens: int | None = None  # of the prompt that budgets and ledgers are reckoned with; None: the model's own
    text_tokens: int | None = None


def identity(
    settings: Settings,
    method_name: str,
    method: Method | None,
    schedule: Schedule,
    fingerprint: str,
    task_files: str,
) -> RunSpec:
    """The run's spec, with everything collapsed that cannot change its numbers."""
    latency = settings.latency
    timed = bool(schedule) and latency.measures
    protocol = [latency.spelled if timed else "off"]
    if timed or not settings.tasks:  # then the model's prompt is what is counted or timed
        sizes = {"images": 0 if timed or latency.images == 1 else latency.images}  # the protocol says its images
        sizes |= {"visual": settings.visual_tokens or 0, "text": settings.text_tokens or 0}
        protocol += [f"{name} {size}" for name, size in sizes.items() if size]
    parts = [] if method is None else method.parts
    sources = [source for part in parts if (source := inspect.getsourcefile(type(part))) is not None]
    arguments = {} if method is None else method.arguments()
    seeded = "seed" in arguments or settings.weights == "random"
    return RunSpec(
        model=settings.model,
        model_path=settings.path,
        revision=settings.revision,
        weights=settings.weights,
        model_fingerprint=fingerprint,
        method=method_name,
        method_args=canonical_json(arguments),
        schedule=str(schedule),
        positions=method.positions if method is not None and schedule else "original",
        tasks=settings.tasks,
        limit=settings.limit,
        seed=settings.seed if seeded else 0,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        device=settings.device.partition(":")[0],  # which of several like devices does not matter
        prompt=settings.prompt,
        image_mode=settings.image_mode,
        max_new_tokens=settings.max_new_tokens,
        latency=" ".join(protocol),
        versions=canonical_json(versions()),
        code=code_digest(*(Path(source).resolve() for source in sources)),
        task_files=task_files,
    )
