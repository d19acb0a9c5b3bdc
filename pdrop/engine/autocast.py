"""Ranking and merging are float32 even if the model runs under autocast; the model's own modules run as it does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")


def off(states: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `states`."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def as_here(states: Tensor, function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function` under the autocast that is active now, wherever it is called: for the model's own modules."""
    kind = states.device.type
    if not torch.is_autocast_enabled(kind):
        return function
    dtype = torch.get_autocast_dtype(kind)

    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with torch.autocast(kind, dtype=dtype):
            return function(*args, **kwargs)

    return called
