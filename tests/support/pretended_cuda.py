"""Pretended CUDA devices: tensors that say cuda:0 (or another) and are computed on the CPU.

While it is on, every operation is counted: what would be launched, what would make the host wait for the device, and
what would fail because its tensors are on two devices. Each is counted for the project's own code ("own") or the
model's ("model"), by who stands in the call stack. What it cannot tell: how long anything takes, and what a kernel
computes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pdrop

ENGINE = (f"{Path(pdrop.__file__).parent}/engine/", f"{Path(pdrop.__file__).parent}/methods/")
CUDA = torch.device("cuda:0")
# nothing is launched for these
VIEWS = set(
    [
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "detach",
        "alias",
        "t",
        "reshape",
        "unbind",
        "split",
        "split_with_sizes",
        "chunk",
        "as_strided",
        "diagonal",
        "lift_fresh",
        "_reshape_alias",
        "unflatten",
        "narrow",
        "mT",
        "flatten",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
    ]
)
WAITS = set(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "item",
        "unique_consecutive",
        "_unique2",
        "repeat_interleave",
        "linalg_matrix_rank",
        "_linalg_check_errors",
    ]
)
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_device_constructors()  # noted by torch at first use: the real ones
real_sdpa, real_tensor = torch.nn.functional.scaled_dot_product_attention, torch.tensor


class Seen:
    """What was counted since `clear`, by "own" and "model"."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing yet."""
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.mixed: list[str] = []
        self.pinned: list[Tensor] = []
        self.coming: list[tuple[Tensor, Tensor]] = []  # copies to the host that have not been waited for
        self.sites: Counter[str] = Counter()  # where the own waits were

    def wait(self, what: str) -> None:
        """The host would wait."""
        whose, site = owner()
        self.waits[whose] += 1
        if whose == "own":
            self.sites[f"{what} at {site}"] += 1


class Stream:
    """The device's queue."""

    def synchronize(self) -> None:
        """What was copied to the host is there."""
        SEEN.wait("synchronize")
        for copy, there in SEEN.coming:
            copy.copy_(there)
        SEEN.coming.clear()


SEEN = Seen()


def owner() -> tuple[str, str]:
    """Whose code runs, and where."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(ENGINE):
            return "own", f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "model", ""


class OnDevice(Tensor):
    """A tensor that says it is on `device`. `there`: where it really is."""

    there: Tensor
    # whether torch itself takes it for one of the CPU: autograd asks a real driver for the streams of others
    differentiable = False
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, there: Tensor, device: torch.device = CUDA) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, there.size(), strides=there.stride(), storage_offset=there.storage_offset(), dtype=there.dtype,
            device=torch.device("cpu") if OnDevice.differentiable else device,
        )  # fmt: skip

    def __init__(self, there: Tensor, device: torch.device = CUDA) -> None:
        self.there, self.said = there, device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.said

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __getitem__(self, index: Any) -> Any:
        if OnDevice.differentiable:
            return super().__getitem__(index)
        index, tensors = bare_index(index)
        if tensors:
            SEEN.launches[owner()[0]] += 1
        return OnDevice(self.there[index], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        if OnDevice.differentiable:
            return super().__setitem__(index, value)
        index, _ = bare_index(index)
        SEEN.launches[owner()[0]] += 1
        if isinstance(value, Tensor) and value.ndim and not isinstance(value, OnDevice):
            SEEN.wait("copy")
        self.there[index] = bare(value)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.there})"

    def __invert__(self) -> Any:
        return torch.bitwise_not(self)

    def contiguous(self, *args: Any, **kwargs: Any) -> Any:
        if self.there.is_contiguous():
            return self
        return torch.clone(self, memory_format=torch.contiguous_format)

    def new_tensor(self, data: Any, dtype: Any = None, **_: Any) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        copies = kwargs.pop("copy", False)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        if args and isinstance(args[0], Tensor):
            device = args[0].device
        if device is None or (device.type == "cuda" and device.index in (None, self.device.index)):
            if dtype in (None, self.dtype):
                return torch.clone(self) if copies else self
            return super().to(dtype)
        asked = dict(dtype=dtype, device=device, non_blocking=non_blocking)
        return handle(torch.ops.aten._to_copy.default, (self,), asked)

    def nonzero(self, *args: Any, **kwargs: Any) -> Any:
        SEEN.wait("nonzero")
        return OnDevice(self.there.nonzero(), self.device)

    def item(self) -> Any:
        SEEN.wait("item")
        return self.there.item()

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        SEEN.wait("cpu")
        return self.there

    def tolist(self) -> Any:
        SEEN.wait("tolist")
        return self.there.tolist()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __index__(self) -> int:
        return int(self.item())

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(function, args, kwargs or {})


def pin(x: Tensor) -> Tensor:
    """In pinned memory: copying it from there does not make the host wait."""
    assert not isinstance(x, OnDevice), "only tensors of the host can be pinned"
    SEEN.pinned.append(x)
    return x


def bare(x: Any) -> Any:
    """Without the pretence."""
    return x.there if isinstance(x, OnDevice) else x


def bare_index(index: Any) -> tuple[Any, bool]:
    """An index without the pretence, and whether there are tensors in it."""
    parts = index if isinstance(index, tuple) else (index,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    for part in tensors:
        if part.dtype in (torch.bool, torch.uint8):
            SEEN.wait("index by a mask")
        elif isinstance(part, OnDevice) and not part.ndim:
            SEEN.wait("index by a number")  # torch reads it
        elif not isinstance(part, OnDevice) and part.ndim:
            SEEN.wait("index from the host")
    if any(isinstance(part, list) for part in parts):
        SEEN.wait("index by a list")
    found = tuple(bare(part) for part in parts)
    return (found if isinstance(index, tuple) else found[0]), bool(tensors)


def dispatched(function: Any, args: Any, kwargs: Any) -> Any:
    """One operation that torch calls. Its own casts, by autocast and derivatives, name the device that it takes the
    tensor to be on; copies to the host begin in `OnDevice.to`."""
    if OnDevice.differentiable and function is torch.ops.aten._to_copy.default and isinstance(args[0], OnDevice):
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    return handle(function, args, kwargs)


def handle(function: Any, args: Any, kwargs: Any) -> Any:
    """One operation."""
    name = function.overloadpacket.__name__
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there, here = [x for x in leaves if isinstance(x, OnDevice)], [x for x in leaves if not isinstance(x, OnDevice)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if OnDevice.differentiable and there and name.startswith("new_") and asked is not None and asked.type == "cpu":
        asked = None  # a derivative's: made like the tensor that torch takes for one of the CPU
    if not there and (asked is None or asked.type != "cuda"):
        return function(*args, **kwargs)
    if name == "_to_copy" and asked is not None and bool(there) != (asked.type == "cuda"):
        if there and kwargs.get("non_blocking"):
            copy = torch.full(args[0].there.shape, 77, dtype=torch.uint8).to(kwargs.get("dtype") or args[0].dtype)
            SEEN.coming.append((copy, args[0].there.to(copy.dtype)))
            SEEN.launches[owner()[0]] += 1
            return copy
        pinned = not there and kwargs.get("non_blocking") and any(here[0] is x for x in SEEN.pinned)
        if not pinned and args[0].numel():
            SEEN.wait("copy")
    elif name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        SEEN.wait("copy")
    elif here and there and name in INDEXED and isinstance(args[0], OnDevice):
        # of what was written into, a derivative is the same with zeros there: made where torch takes the tensor to be
        if not (OnDevice.differentiable and name == "index_put" and not torch.is_grad_enabled() and not args[2].any()):
            SEEN.wait("index from the host")
    elif (there and any(x.ndim for x in here)) or (
        len({x.device for x in there if x.ndim}) > (2 if "copy" in name else 1)
    ):
        SEEN.mixed.append(f"{name} at {owner()}")
    if name in WAITS or (
        name in INDEXED and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    ):
        SEEN.wait(name)
    home = asked if asked is not None else next((x.device for x in there if x.ndim), there[0].device)
    home = CUDA if home.index is None else home
    back = {id(x.there): x for x in there}
    bare_args, bare_kwargs = tree_map(bare, args), tree_map(bare, kwargs)
    if asked is not None:
        bare_kwargs["device"] = torch.device("cpu")
    out = function(*bare_args, **bare_kwargs)
    if name not in VIEWS and any(isinstance(x, Tensor) and x.numel() for x in tree_leaves(out)):
        SEEN.launches[owner()[0]] += 1
    if name in ("_local_scalar_dense", "equal", "is_nonzero") or (asked is not None and asked.type == "cpu"):
        return out

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return back[id(x)] if id(x) in back else OnDevice(x, home)

    return tree_map(wrapped, out)


class Mode(TorchDispatchMode):
    """New tensors are made there, if asked."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(function, args, kwargs or {})


def sdpa(query: Any, key: Any, value: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
    """As one launch."""
    if not isinstance(query, OnDevice) or (OnDevice.differentiable and torch.is_grad_enabled()):
        return real_sdpa(query, key, value, attn_mask=attn_mask, **kwargs)
    if any(x is not None and not isinstance(x, OnDevice) for x in (key, value, attn_mask)):
        SEEN.mixed.append("sdpa")
    SEEN.launches[owner()[0]] += 1
    if len({x.device for x in (query, key, value, attn_mask) if x is not None}) > 1:
        SEEN.mixed.append("sdpa")
    out = real_sdpa(bare(query), bare(key), bare(value), attn_mask=bare(attn_mask), **kwargs)
    return OnDevice(out, query.device)


def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.tensor reads what lies there."""
    return real_tensor(tree_map(lambda x: x.tolist() if isinstance(x, OnDevice) else x, data), *args, **kwargs)


def moved(model: torch.nn.Module, device: torch.device = CUDA, trained: bool = False) -> None:
    """The model there; `trained`: with gradients."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.nn.Parameter(OnDevice(bare(parameter.data), device), requires_grad=trained)
                module._parameters[name] = there
        for held in (module._buffers, vars(module)):
            for name, value in list(held.items()):
                if isinstance(value, Tensor):
                    held[name] = OnDevice(bare(value), device)


def aligned(module: torch.nn.Module, device: torch.device) -> None:
    """Its inputs are brought to `device` in its forward and in those of its parts, as under a device map."""

    def brought(x: Any) -> Any:
        return x.to(device) if isinstance(x, OnDevice) and x.device != device else x

    def forward(inner: Any, *args: Any, **kwargs: Any) -> Any:
        args = tree_map(brought, args)
        return inner(*args, **{k: v if k == "past_key_values" else tree_map(brought, v) for k, v in kwargs.items()})

    for part in module.modules():
        part.forward = partial(forward, part.forward)


@contextmanager
def pretended(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """While there is such a device. For derivatives set OnDevice.differentiable before anything is moved there."""
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    patch.setattr(torch, "tensor", tensor)
    patch.setattr(Tensor, "pin_memory", lambda self, *_: pin(self))
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    SEEN.clear()
    try:
        with Mode():
            yield SEEN
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
