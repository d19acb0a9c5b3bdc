"""The precision in which a device multiplies matrices fastest."""

from __future__ import annotations

import torch


def matrix_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 if the device multiplies it in hardware (a GPU since Ampere, AMX, AVX-512 BF16), otherwise float32.

    Without that, bfloat16 products are emulated: on a processor with AVX2 only they took five times as long as float32.
    """
    if torch.device(device).type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        capable = found.get("amx_bf16") or found.get("avx512_bf16")
    return torch.bfloat16 if capable else torch.float32
