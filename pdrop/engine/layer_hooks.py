"""Hooks on the layers, registered only while a forward needs them: in a plain decoding step they only cost time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class LayerHooks:
    """Hooks that can be removed and registered again. Not thread-safe: callers must hold a lock."""

    def __init__(self, modules: Sequence[nn.Module], registers: Sequence[Callable[[], RemovableHandle]]):
        self.modules, self.registers = modules, registers
        self.handles: list[RemovableHandle] = []

    @property
    def are_on(self) -> bool:
        return bool(self.handles)

    def on(self) -> None:
        """Register the hooks; they run from the next call of a layer on."""
        self.handles = self.handles or [register() for register in self.registers]

    def off(self) -> None:
        """Remove the hooks, so that torch takes its fast path for a layer without hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def alone(self) -> bool:
        """Whether no other hooks are registered; their order would change if these were registered again after them."""
        tables: Any = [table for m in self.modules for table in (m._forward_pre_hooks, m._forward_hooks)]
        return sum(map(len, tables)) == len(self.handles)
