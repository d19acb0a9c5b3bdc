"""A fair comparison under flash attention: no layer asks the device whether its rows are packed sequences.

Given position ids, transformers' flash attention finds out in each layer, of a prefill of one prompt, by a wait for
the device. After a boundary the engine hands layers none, so that dropping would gain the unpruned model's waits: 24 to
30 of them. Here neither side has them, for what is timed is not packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from pdrop.engine.architecture import read_architecture


@contextmanager
def rows_not_packed(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """A block in which the decoder's layers get no position ids, under flash attention. Rotary embeddings, which are
    made before the layers, stay. With position ids of the caller's own nothing changes."""
    architecture = read_architecture(model)
    kind = str(architecture.decoder.config._attn_implementation or "")
    if "flash" not in kind or inputs.get("position_ids") is not None:
        yield
        return
    handles = [layer.register_forward_pre_hook(without_ids, with_kwargs=True) for layer in architecture.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_ids(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What goes into a layer, without position ids."""
    return args, kwargs | {"position_ids": None}
