"""Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recipes.embedded.precision import matrix_dtype

_NOT_MATRICES = ("embed", "lm_head", "position", "heads.")


class Muon:
    """Momentum, then the nearest orthogonal matrix by five Newton-Schulz steps; matrices of one shape go together.

    `learning_rate` is the step of a matrix (in spectral norm, times sqrt(rows / columns) if it has more rows),
    `adam_rate` that of AdamW; `tower_scale` multiplies the rate of parameters whose name holds "vision_tower". In a
    process group, each process orthogonalizes a share of the matrices, and then they exchange them.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        adam_rate: float,
        tower_scale: float = 1.0,
        decay: float = 0.02,
        momentum: float = 0.95,
    ) -> None:
        self.learning_rate, self.adam_rate, self.decay, self.momentum = (
            learning_rate,
            adam_rate,
            decay,
            momentum,
        )
        self._groups: dict[tuple[int, int, float], list[nn.Parameter]] = {}
        rest: dict[float, list[nn.Parameter]] = {}
        for name, weight in named:
            factor = tower_scale if "vision_tower" in name else 1.0
            if weight.ndim == 2 and not any(word in name for word in _NOT_MATRICES):
                self._groups.setdefault((*weight.shape, factor), []).append(weight)
            else:
                rest.setdefault(factor, []).append(weight)
        self._buffers = {
            key: torch.zeros(len(group), *key[:2], device=group[0].device) for key, group in self._groups.items()
        }
        self._factors = list(rest)
        self._adam = torch.optim.AdamW(
            [{"params": group} for group in rest.values()],
            adam_rate,
            (0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )
        self.parameters = [weight for group in (*self._groups.values(), *rest.values()) for weight in group]

    @torch.no_grad()
    def step(self, scale: float, clip: float = 3.0) -> float:
        """One step at `scale` times the rates, gradients clipped to norm `clip` and then freed; returns their norm."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, clip))
        for factor, group in zip(self._factors, self._adam.param_groups):
            group["lr"] = self.adam_rate * scale * factor
        self._adam.step()
        directions = []
        for key, weights in self._groups.items():
            gradient = torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
            buffer = self._buffers[key].lerp_(gradient, 1 - self.momentum)
            directions.append(gradient.lerp(buffer, self.momentum))
        for (key, weights), update in zip(self._groups.items(), _orthogonal_shared(directions)):
            rate = self.learning_rate * scale * key[2]
            for weight, change in zip(weights, update):
                weight.mul_(1 - rate * self.decay).add_(change, alpha=-rate * max(1.0, key[0] / key[1]) ** 0.5)
        for weight in self.parameters:
            weight.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "muon": list(self._buffers.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint of the same parameters."""
        self._adam.load_state_dict(state["adam"])
        for buffer, saved in zip(self._buffers.values(), state["muon"], strict=True):
            buffer.copy_(saved)


def _orthogonal_shared(batches: list[Tensor]) -> list[Tensor]:
    """`_orthogonal` of each batch; every process of a group computes a part of each, and they exchange the parts."""
    workers = dist.get_world_size() if dist.is_initialized() else 1
    if workers == 1 or not batches:
        return [_orthogonal(batch) for batch in batches]
    flat = torch.zeros(sum(batch.numel() for batch in batches), device=batches[0].device)
    found = [part.view_as(batch) for part, batch in zip(flat.split([b.numel() for b in batches]), batches)]
    rank = dist.get_rank()
    for number, (batch, update) in enumerate(zip(batches, found)):
        mine = slice((rank + number) % workers, None, workers)  # odd groups reversed, to share the work evenly
        if batch[mine].shape[0]:
            update[mine] = _orthogonal(batch[mine])
    dist.all_reduce(flat)  # the others' parts are zeros here
    return found


def _orthogonal(batch: Tensor) -> Tensor:
    """Each matrix of float32 (n, rows, columns) with its singular values moved near 1."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.transpose(1, 2) if tall else batch
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(matrix_dtype(batch.device))
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    found: Tensor = (x.transpose(1, 2) if tall else x).float()
    return found
