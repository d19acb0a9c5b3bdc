"""In which precision a device multiplies matrices fastest."""

from __future__ import annotations

import torch


def matrix_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware (a GPU, AMX, AVX-512 BF16), else float32.

    Elsewhere bfloat16 products are emulated: on a processor with AVX2 only they took five times as long as float32.
    """
    capable = torch.cpu.get_capabilities()
    if torch.device(device).type != "cpu" or capable.get("amx_bf16") or capable.get("avx512_bf16"):
        return torch.bfloat16
    return torch.float32
