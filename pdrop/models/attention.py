"""The choice of torch's kernels for scaled-dot-product attention on CUDA, which is part of a run's identity.

By default torch prefers cuDNN's kernel on recent cards, which builds a plan for each new length of queries and keys, at
tens of milliseconds of host time each. Dropping multiplies the lengths, one per stage and decoding step. So scoring and
training prefer flash attention unless asked otherwise; if lengths repeat, as in timing, cuDNN's may be faster.

An order is named after its first kernel; if a kernel does not support a call (flash takes no mask and no float32), the
next in the order is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ORDERS = {
    "flash": ("flash", "efficient", "math"),
    "cudnn": ("cudnn", "flash", "efficient", "math"),
    "efficient": ("efficient", "math"),
    "math": ("math",),
}
DEFAULT = "flash"


def check_kernel(told: str, name: object) -> None:
    """Refuse a name that is not in ORDERS.

    Raises:
        ValueError: Naming what the user calls it, and the names.
    """
    if name not in ORDERS:
        raise ValueError(f"{told} is {', '.join([*ORDERS][:-1])} or {[*ORDERS][-1]}, not {name!r}")


def resolved(name: str | None, attn_implementation: str, device: str) -> str:
    """The order that a run uses; "" if there is no choice: not on CUDA, or without sdpa.

    Args:
        name: As asked for; None: DEFAULT.
        attn_implementation: As in transformers.
        device: "cpu", "cuda", "cuda:1".

    Raises:
        ValueError: If there is no order of this name.
    """
    if name is not None:
        check_kernel("sdpa_kernel", name)
    return (name or DEFAULT) if attn_implementation == "sdpa" and device.startswith("cuda") else ""


@contextmanager
def sdpa_order(name: str) -> Iterator[None]:
    """A block in which torch uses only the kernels of this order, in this order, in all threads. "": no change."""
    if not name:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel([kinds[kernel] for kernel in ORDERS[name]], set_priority=True):
        yield
