"""What a prefill and its answer hold: peak memory in a pass of its own, and the cache's bytes layer by layer.

On a GPU peaks are those of torch's allocator, allocated and reserved, without the weights. On a CPU the process is all
there is to see: the growth of its resident set to its highest mark, which Linux lets a process reset. Never measured in
the same pass as time.
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
    """Bytes of keys and values of each layer, counted on the tensors that are there; of a quantised cache the codes and
    their scales, and what it holds unquantised."""
    held = ("keys", "values", "_quantized_keys", "_quantized_values")
    return [sum(bytes_of(getattr(layer, name, None)) for name in held) for layer in cache.layers]


def bytes_of(held: Any) -> int:
    """Bytes of a tensor, or of all those in tuples, lists and dicts; of a tensor that is made of others, of these."""
    if isinstance(held, torch.Tensor):
        if (parts := getattr(held, "__tensor_flatten__", None)) is not None:
            return sum(bytes_of(getattr(held, name)) for name in parts()[0])
        return held.numel() * held.element_size()
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, (tuple, list)) else ()
    return sum(map(bytes_of, inside))


def peak(call: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Bytes that `call` needs at its peak on top of what is held before it.

    Returns:
        `allocated` and `reserved` on a GPU, `resident` on a CPU; None where the system does not tell.
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
    """What was held before does not count in `peak_since`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text("5")


def peak_since(device: torch.device) -> int | None:
    """The most that was held since `restart_peak`, in bytes: by torch on a GPU, by the process on a CPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident()["VmHWM"] if RESET.exists() else None


def give_back() -> None:
    """Freed memory goes back to the system, so that what `call` needs is seen to grow. Where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    gc.collect()
    if trim is not None:
        trim(0)


def resident() -> dict[str, int]:
    """The process's resident set and its highest mark, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}


def memory(
    model: torch.nn.Module, prefill: Callable[[], Any], answer: Callable[[], Any] | None, device: torch.device
) -> Mapping[str, Any]:
    """Peaks of a prefill and of an answer, and the cache after the prefill.

    Args:
        model: Whose weights are counted apart.
        prefill: Returns an output with its cache.
        answer: A whole answer; None: not measured.
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
