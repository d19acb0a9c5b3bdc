"""In which precision this machine multiplies matrices fastest."""

from __future__ import annotations

import torch


def matrix_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it (AMX, AVX-512 BF16, a GPU), else float32.

    Elsewhere bfloat16 products are emulated: on a processor with AVX2 only they took five times as long as float32.
    """
    capable = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or capable.get("amx_bf16") or capable.get("avx512_bf16"):
        return torch.bfloat16
    return torch.float32
