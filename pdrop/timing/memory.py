"""Memory of a prefill and its answer: the peak, in a separate pass, and the cache's bytes per layer.

On a GPU peaks are those of torch's allocator, allocated and reserved, without the weights. On a CPU only the process
can be measured: the growth of its resident set to its peak, which Linux lets a process reset. Never measured in the
same pass as time.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pdrop.engine.early import returned_cache

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def cache_bytes(cache: Any) -> list[int]:
    """Bytes of keys and values of each layer, counted on the actual tensors; for a quantised cache codes, scales and
    the unquantised rest."""
    held = ("keys", "values", "_quantized_keys", "_quantized_values")
    return [sum(bytes_of(getattr(layer, name, None)) for name in held) for layer in cache.layers]


def bytes_of(held: Any) -> int:
    """Bytes of a tensor, or of all tensors in tuples, lists and dicts; for a composite tensor, of its parts."""
    if isinstance(held, torch.Tensor):
        if (parts := getattr(held, "__tensor_flatten__", None)) is not None:
            return sum(bytes_of(getattr(held, name)) for name in parts()[0])
        return held.numel() * held.element_size()
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, (tuple, list)) else ()
    return sum(map(bytes_of, inside))


def peak(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Peak bytes that `call` needs above what was held before it.

    Returns:
        `allocated` and `reserved` on a GPU, `resident` on a CPU; None if the system does not report it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        restart_peak(device)
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        call()
        torch.cuda.synchronize(device)
        return {
            "allocated": torch.cuda.max_memory_allocated(device) - held,
            "reserved": torch.cuda.max_memory_reserved(device) - reserved,
        }
    if not RESET.exists():  # no Linux
        call()
        return {"resident": None}
    give_back()
    restart_peak(device)
    before = resident()["VmRSS"]
    call()
    return {"resident": max(0, resident()["VmHWM"] - before)}


def restart_peak(device: torch.device) -> None:
    """Start a new peak for `peak_since`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text("5")


def peak_since(device: torch.device) -> int | None:
    """The peak since `restart_peak`, in bytes: of torch on a GPU, of the process on a CPU.

    None if the system does not report it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident()["VmHWM"] if RESET.exists() else None


def give_back() -> None:
    """Return freed memory to the system, if the C library can, so that growth during `call` is visible."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    gc.collect()
    if trim is not None:
        trim(0)


def resident() -> dict[str, int]:
    """The process's resident set and its peak, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}


def memory(
    model: torch.nn.Module, prefill: Callable[[], Any], answer: Callable[[], Any] | None, device: torch.device
) -> Mapping[str, Any]:
    """Peaks of a prefill and of an answer, and the cache after the prefill.

    Args:
        model: The model, whose weights are counted separately.
        prefill: Returns an output with its cache.
        answer: Generates a whole answer; None: not measured.
        device: The model's.
    """
    cache = returned_cache(prefill())
    layers = cache_bytes(cache)
    del cache
    return {
        "weights": weight_bytes(model),
        "prefill": peak(prefill, device),
        "answer": None if answer is None else peak(answer, device),
        "kv_per_layer": layers,
    }
