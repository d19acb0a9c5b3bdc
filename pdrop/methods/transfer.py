"""Whole numbers of the host as a tensor on the device, without waiting for the device.

A plain copy to CUDA, torch.tensor(numbers, device=device), first waits for all that is queued there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64."""
    import torch

    if numbers and min(numbers) == max(numbers):
        return torch.full((len(numbers),), numbers[0], device=device)
    return moved(torch.tensor(numbers, dtype=torch.long), device)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device: to CUDA from pinned memory, which can be read while the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
