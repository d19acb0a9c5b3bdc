"""The conditions of a measurement, and whether two times may be compared at all.

A ratio of times says something of dropping only if nothing else differs. So every measurement notes its conditions, and
whoever compares asks `differences` first: other attention backends, dtypes, devices or numbers of threads make a
comparison meaningless, and a device that others use makes it doubtful.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from pdrop.record import EQUAL_CONDITIONS

OTHERS_GIB = 2.0  # of the GPU's memory outside this process: a driver's contexts take less


def conditions(model: torch.nn.Module) -> dict[str, Any]:
    """The conditions under which `model` is measured now.

    Attention backends are read off the configs that the layers look at, of decoder and tower apart. `others_gib` is
    memory of the GPU that this process does not hold; `load` the machine's running processes, mean of a minute.
    """
    weights = next(model.parameters())
    config: Any = model.config
    decoder, tower = config.get_text_config(decoder=True), getattr(config, "vision_config", None)
    cuda = weights.device.type == "cuda"
    found: dict[str, Any] = {
        "device": weights.device.type,
        "device_name": torch.cuda.get_device_name(weights.device) if cuda else None,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "attention_decoder": decoder._attn_implementation,
        "attention_tower": getattr(tower, "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "tf32": tf32() if cuda else None,
        "load": round(os.getloadavg()[0], 2),
        "others_gib": None,
    }
    if cuda:
        free, total = torch.cuda.mem_get_info(weights.device)
        found["others_gib"] = round((total - free - torch.cuda.memory_reserved(weights.device)) / 2**30, 2)
    return found


def tf32() -> bool:
    """Whether float32 products are rounded to TF32 on CUDA, by whichever of torch's two ways that was asked for.

    The older way of asking, allow_tf32, raises once anything in the process has used the newer one.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What forbids a comparison, in words; empty where it may be made."""
    return [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in EQUAL_CONDITIONS
        if one.get(name) != other.get(name)
    ]


def refuse_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse to compare what was measured under different conditions.

    Raises:
        ValueError: Naming what differs.
    """
    if found := differences(one, other):
        raise ValueError(f"these times may not be compared: {'; '.join(found)}")


def invalid(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Why a measurement between these two moments is invalid; empty where it is valid."""
    found = [f"changed while measuring: {text}" for text in differences(before, after)]
    busiest = max(c.get("others_gib") or 0.0 for c in (before, after))
    if busiest > OTHERS_GIB:
        found.append(f"others hold {busiest:.1f} GiB of the GPU")
    if before.get("device") == "cpu":
        # this process itself counts as much as it has threads; what the load was before says what others do
        others = before.get("load", 0.0) - (before.get("threads") or 1)
        spare = (before.get("cores") or 1) - (before.get("threads") or 1)
        if others > spare + 1:
            found.append(f"a load of {before['load']:.1f} on {before['cores']} cores: others compute here, too")
    return found
