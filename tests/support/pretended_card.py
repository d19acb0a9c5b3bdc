"""A pretended card: what torch.cuda says of one, so that whole commands run with device=cuda without one.

    with card(monkeypatch) as seen:
        run.main()                  # loads onto cuda:0, answers, times by events, asks for memory

What is computed and seen is that of tests/support/pretended_cuda.py, in its form with derivatives: to torch itself the
tensors are the CPU's. Autocast of CUDA is that of the CPU. What it cannot do: torch.compile for the card, streams (an
offloaded cache), a second process, and anything of real time or memory.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.pretended_cuda import CUDA, SEEN, OnDevice, Seen, pretended

NAME, GIB = "NVIDIA H100 80GB HBM3", 1 << 30
TOTAL, FREE, ALLOCATED, RESERVED = 80 * GIB, 77 * GIB, GIB, 2 * GIB  # so 1 GiB is nobody's of torch
WAITS = "called a synchronizing CUDA operation"
real_to, real_wait = torch._C.TensorBase.to, Seen.wait


class Event:
    """A moment, which must be recorded before it is read."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at, "an event that was not recorded"

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds."""
        assert self.timed and later.timed and 0 < self.at <= later.at
        return (later.at - self.at) * 1000


class InProcess:
    """Stands in for ProcessPoolExecutor: another process would know nothing of the pretence."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Any, *given: Any) -> Any:
        found = function(*given)
        return SimpleNamespace(result=lambda: found)


def index_of(device: Any, cards: int) -> int:
    """The card's number, if there is such a card."""
    number = device if isinstance(device, int) else torch.device("cuda" if device is None else device).index or 0
    if number >= cards:
        raise RuntimeError(f"CUDA error: invalid device ordinal {number}")
    return int(number)


def moving(self: Tensor, *given: Any, **named: Any) -> Any:
    """Tensor.to, for which a plain `cuda` is the current card: torch would ask the driver."""

    def whole(x: Any) -> Any:
        return CUDA if x == "cuda" or (isinstance(x, torch.device) and x == torch.device("cuda")) else x

    return real_to(self, *map(whole, given), **{name: whole(x) for name, x in named.items()})


def functions(cards: int) -> dict[str, Any]:
    """torch.cuda's, by name."""

    def told(value: Any) -> Any:
        def tell(device: Any = None) -> Any:
            index_of(device, cards)
            return value

        return tell

    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=TOTAL, uuid="0-0", multi_processor_count=132)
    state = torch.zeros(16, dtype=torch.uint8)
    does_nothing = ("empty_cache", "init", "manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")
    # an object for each name: torch.compile's tables refuse one with several
    nothing: dict[str, Any] = {name: lambda *_, name=name: None for name in does_nothing}
    return nothing | {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: cards,
        "current_device": lambda: 0,
        "set_device": told(None),
        "synchronize": told(None),
        "reset_peak_memory_stats": told(None),
        "get_device_name": told(NAME),
        "get_device_capability": told((9, 0)),
        "get_device_properties": told(properties),
        "mem_get_info": told((FREE, TOTAL)),
        "memory_allocated": told(ALLOCATED),
        "memory_reserved": told(RESERVED),
        "max_memory_allocated": told(ALLOCATED + GIB),
        "max_memory_reserved": told(RESERVED + GIB),
        "memory_stats": told({"reserved_bytes.all.allocated": RESERVED}),
        "get_rng_state": lambda device="cuda": state,
        "get_rng_state_all": lambda: [state] * cards,
        "Event": Event,
    }


def warn_of_waits(patch: pytest.MonkeyPatch, mode: str) -> None:
    """torch.cuda.set_sync_debug_mode: the first call says that it is a prototype."""

    def wait(self: Seen, what: str) -> None:
        real_wait(self, what)
        warnings.warn(WAITS, stacklevel=2)

    if mode == "warn":
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
            stacklevel=2,
        )
    patch.setattr(Seen, "wait", wait if mode == "warn" else real_wait)


@contextmanager
def card(patch: pytest.MonkeyPatch, cards: int = 1) -> Iterator[Seen]:
    """While there is such a card."""
    patch.setattr(OnDevice, "differentiable", True)
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the pretence is of one thread
    for name, function in functions(cards).items():
        patch.setattr(torch.cuda, name, function)
        if hasattr(torch.cuda.random, name):
            patch.setattr(torch.cuda.random, name, function)
    patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warn_of_waits(patch, mode))
    stream = SimpleNamespace(is_capturing=lambda: False)
    patch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)
    patch.setattr(Tensor, "to", moving)
    for name in ("untyped_storage", "storage", "data_ptr"):  # where weights are saved
        patch.setattr(OnDevice, name, lambda self, name=name: getattr(self.there, name)(), raising=False)
    patch.setattr(OnDevice, "__reduce_ex__", lambda self, protocol: self.there.__reduce_ex__(protocol))
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # data cannot be exchanged
    patch.setattr("pdrop.runs.timed.ProcessPoolExecutor", InProcess)
    no_inference_mode(patch)
    autocast_of_the_cpu(patch)
    with pretended(patch):
        yield SEEN


def no_inference_mode(patch: pytest.MonkeyPatch) -> None:
    """Inference mode becomes no_grad: its tensors cannot be wrapped."""
    mode = torch.autograd.grad_mode.inference_mode

    def enter(self: Any) -> None:
        self.instead = torch.no_grad()
        self.instead.__enter__()

    patch.setattr(mode, "__enter__", enter)
    patch.setattr(mode, "__exit__", lambda self, *error: self.instead.__exit__(*error))


def autocast_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Autocast of CUDA is that of the CPU, by which the pretended tensors are computed."""

    def here(kind: str) -> str:
        return "cpu" if kind == "cuda" else kind

    begin, on, dtype = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(self: Any, device_type: str, *given: Any, **named: Any) -> None:
        begin(self, here(device_type), *given, **named)

    patch.setattr(torch.autocast, "__init__", init)
    patch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": on(here(kind)))
    patch.setattr(torch, "get_autocast_dtype", lambda kind: dtype(here(kind)))
