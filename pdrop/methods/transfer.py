"""Copies from host to device without waiting for the device, and back with one wait for all tensors.

A plain copy to CUDA, torch.tensor(numbers, device=device), first waits for all work queued there; so does each plain
copy back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor on the device, [n] int64."""
    import torch

    if numbers and min(numbers) == max(numbers):
        return torch.full((len(numbers),), numbers[0], device=device)
    return moved(torch.tensor(numbers, dtype=torch.long), device)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device: to CUDA from pinned memory, which is copied while the host continues."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def read_back(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies on the host, with one wait per device; in pinned memory if they come from CUDA."""
    import torch

    tensors = list(tensors)
    copies = [x.to("cpu", non_blocking=x.device.type == "cuda") for x in tensors]
    for device in {x.device for x in tensors if x.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies
