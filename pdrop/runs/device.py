"""Which device a command uses, why torch cannot use a GPU that is there, and whether its memory has ended.

A driver that is too old for torch, or one that is not ready, shows in different ways: torch counts the cards by asking
the driver's management library, and only finds out on first use that it cannot compute on them. Imports torch late.
"""

from __future__ import annotations

import logging
import warnings

from pdrop.runs import cards

log = logging.getLogger("pdrop")


def chosen(asked: str | None) -> str:
    """The device that was asked for; without one `cuda` if torch can use a GPU, otherwise the CPU, with a warning if
    there is a GPU.

    Raises:
        ValueError: If a GPU was asked for that is there and cannot be used; with the reason and the remedy.
    """
    if asked is not None and not asked.startswith("cuda"):
        return asked
    reason = unusable()
    if asked is not None:
        if reason is not None:
            raise ValueError(f"device={asked} cannot be had: {reason}")
        return asked
    if reason is not None:
        log.warning("this command runs on the CPU (device=cpu says so without this warning): %s", reason)
    return "cuda" if usable() else "cpu"


def usable() -> bool:
    """Whether torch can compute on a GPU; says nothing if not."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warning, whose reason `unusable` gives
        return torch.cuda.is_available()


def unusable() -> str | None:
    """Why torch cannot use the GPU of this machine, in a line with the remedy; None if it can, or if there is none."""
    import torch

    if usable():
        return None
    # CUDA_VISIBLE_DEVICES may be set where there is no GPU, and hides those that there are if it is empty
    if not torch.cuda.device_count() and not (cards.DRIVER.is_dir() and cards.visible()):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install another (docs/gpu.md#installing)"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        return (
            f"torch {torch.__version__}, which is built for CUDA {torch.version.cuda}, cannot use this machine's GPU: "
            f"{said} (docs/gpu.md#installing)"
        )
    return None


def of_the_device(error: BaseException) -> bool:
    """Whether an error is one of torch's for an accelerator: its allocator's, or its driver's."""
    return bool({"OutOfMemoryError", "AcceleratorError"} & {kind.__name__ for kind in type(error).__mro__})


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was caused by, is that a device has no memory left."""
    while error is not None:
        # the driver's errors, such as that of a card without room for a process, differ by their text alone
        if of_the_device(error) and "out of memory" in str(error):
            return True
        error = error.__cause__
    return False
