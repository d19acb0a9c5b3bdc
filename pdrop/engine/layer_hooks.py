"""Hooks on the layers are there while a forward has something to do: in a plain decoding step they would only cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class LayerHooks:
    """Hooks that can be taken off and put back on. Whoever calls sees to it that one thread does so at a time."""

    def __init__(self, modules: Sequence[nn.Module], registers: Sequence[Callable[[], RemovableHandle]]):
        self.modules, self.registers = modules, registers
        self.handles: list[RemovableHandle] = []

    @property
    def are_on(self) -> bool:
        return bool(self.handles)

    def on(self) -> None:
        """There from the next call of a layer on."""
        self.handles = self.handles or [register() for register in self.registers]

    def off(self) -> None:
        """Without them a layer is called at once."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def alone(self) -> bool:
        """Whether no hook of others is among them, whose turn would change if these came back after it."""
        tables: Any = [table for m in self.modules for table in (m._forward_pre_hooks, m._forward_hooks)]
        return sum(map(len, tables)) == len(self.handles)
