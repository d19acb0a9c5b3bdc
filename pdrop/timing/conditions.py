"""The conditions of a measurement, and whether two times may be compared.

A ratio of times measures dropping only if nothing else differs. So every measurement records its conditions, and
comparisons call `differences` first: other attention backends, dtypes, devices or numbers of threads make a comparison
meaningless, and a device that others use makes it doubtful.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from pdrop.environment import versions
from pdrop.record import differing_conditions
from pdrop.timing import nvidia

OTHERS_GIB = 2.0  # GPU memory in other processes: a driver's contexts take less
# what a process may hold outside torch's allocator: its context, and cuDNN's kernels, some for each shape
OWN_GIB = 2.0


def conditions(model: torch.nn.Module) -> dict[str, Any]:
    """The conditions under which `model` is measured now.

    Attention backends are read from the configs that the layers use, separately for decoder and tower; `sdpa_kernels`
    are torch's enabled kernels. `others_gib` is GPU memory of other processes, if the driver reports it; `outside_gib`
    is all memory of this process that is not torch's, including its context and kernels. `load` is the machine's
    running processes, mean of a minute.
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
        "sdpa_kernels": sdpa_kernels() if cuda else None,
        "cuda_libraries": libraries(weights.device) if cuda else None,
        "load": round(os.getloadavg()[0], 2),
        "others_gib": None,
        "outside_gib": None,
    }
    if cuda:
        free, total = torch.cuda.mem_get_info(weights.device)
        found["outside_gib"] = round((total - free - torch.cuda.memory_reserved(weights.device)) / 2**30, 2)
        found["others_gib"] = nvidia.others_gib(weights.device)
    return found


def sdpa_kernels() -> str:
    """Torch's enabled attention kernels, and environment variables that affect their order."""
    backends = torch.backends.cuda
    on = {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }
    said = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("TORCH_CUDNN_SDPA")]
    return ", ".join([*(name for name, enabled in on.items() if enabled), *said])


def libraries(device: torch.device) -> str:
    """The libraries that bring the kernels, and the generation of the card."""
    major, minor = torch.cuda.get_device_capability(device)
    found = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    found += [f"{name} {version}" for name, version in versions(("flash-attn", "kernels")).items()]
    return ", ".join([*found, f"sm_{major}{minor}"])


def tf32() -> bool:
    """Whether float32 products are rounded to TF32 on CUDA, by either of torch's two settings.

    Reading the older setting, allow_tf32, raises once anything in the process has used the newer one.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What forbids a comparison, in words; empty if it is allowed."""
    return differing_conditions(one, other)


def refuse_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse to compare what was measured under different conditions.

    Raises:
        ValueError: Naming what differs.
    """
    if found := differences(one, other):
        raise ValueError(f"these times may not be compared: {'; '.join(found)}")


def invalid(before: Mapping[str, Any], after: Mapping[str, Any], busy: bool = True) -> list[str]:
    """Why a measurement between these two moments is invalid; empty if it is valid.

    Args:
        before: The conditions then;
        after: and then.
        busy: Whether others that compute on this machine's cores make it so.
    """
    found = [f"changed while measuring: {text}" for text in differences(before, after)]
    busiest = max(c.get("others_gib") or 0.0 for c in (before, after))
    if busiest > OTHERS_GIB:
        found.append(f"others hold {busiest:.1f} GiB of the GPU")
    elif before.get("others_gib") is None and (outside := before.get("outside_gib") or 0.0) > OWN_GIB + OTHERS_GIB:
        found.append(f"{outside:.1f} GiB of the GPU are not torch's here: probably others hold them")
    if slowed := sorted({cause for c in (before, after) for cause in c.get("slowed") or ()}):
        found.append(f"the GPU was slowed down by {', '.join(slowed)}")
    if busy and before.get("device") == "cpu":
        # this process itself counts as much as it has threads; what the load was before says what others do
        others = before.get("load", 0.0) - (before.get("threads") or 1)
        spare = (before.get("cores") or 1) - (before.get("threads") or 1)
        if others > spare + 1:
            found.append(f"a load of {before['load']:.1f} on {before['cores']} cores: others compute here, too")
    return found
