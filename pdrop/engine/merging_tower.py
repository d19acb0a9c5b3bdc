"""Vision towers that end in a merger: several patches, a square of them, make one token (Qwen2-VL and its successors).

Supported are towers `visual` of `blocks` with `norm1` and `attn.qkv`, and a `merger`, over pictures of any size in one
row of patches. If layers attend in windows, the patches are ordered window by window, and the tokens are put back into
the picture's order after the merger; tokens here are in the picture's order.

Shapes: N patches of a run, m of them per token, P pictures and frames of videos, R tokens of the largest.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.vision_utils import get_vision_window_index

from pdrop.engine.sequence import Prompts
from pdrop.engine.tower import (
    NoRuleForTower,
    RunsOfTheTower,
    Seen,
    TowerReader,
    TowersApart,
    UnknownTower,
    grouped,
    received,
)
from pdrop.engine.visual import encoded
from pdrop.methods.base import Method
from pdrop.methods.tower import Tower, layer_number
from pdrop.methods.transfer import moved, read_back


def reader(vlm: Any, method: Method) -> RunsOfTheTower | None:
    """The reader of a model's vision tower for a method; None if the method does not read the tower.

    Raises:
        UnknownTower: If the tower cannot be read; NoRuleForTower: if the method has no rule for such towers.
    """
    looks, kind = method.looks_at(), type(method).__name__
    if looks is None:
        return None
    inner = getattr(vlm, "model", vlm)
    if hasattr(inner, "image_tower") and hasattr(inner, "video_tower"):
        return TowersApart(vlm, method, looks)
    tower = getattr(inner, "visual", None)
    if tower is None or not hasattr(tower, "merger"):
        return TowerReader(vlm, method, looks)
    merged = method.looks_at_merged()
    if merged is None:
        raise NoRuleForTower(
            f"{kind} reads the vision tower, and that of {type(vlm).__name__} makes one token of several patches: its "
            "authors have no rule for that; divprune, visionzip, holov, hiprune and cdpruner_embeddings have"
        )
    return MergingTowerReader(vlm, tower, kind, merged)


class MergingTowerReader(RunsOfTheTower):
    """Reads a tower with a merger: which patches each token was made of, and the attention to them."""

    def __init__(self, vlm: Any, tower: Any, method: str, layers: tuple[float, ...]):
        super().__init__(vlm)
        self.tower = tower
        self.layers = [getattr(block, "_fsdp_wrapped_module", block) for block in getattr(tower, "blocks", ())]
        known = all(hasattr(layer, "norm1") and hasattr(getattr(layer, "attn", None), "qkv") for layer in self.layers)
        if not self.layers or not known:
            raise UnknownTower(
                f"{method} reads the vision tower, and that of {type(vlm).__name__} cannot be read: it has no `blocks` "
                "with `norm1` and `attn.qkv`"
            )
        self.read = sorted({layer_number(layer, len(self.layers)) for layer in layers})
        self.merges = int(tower.spatial_merge_size) ** 2

    def hooks(self) -> list[tuple[nn.Module, str, Callable[..., None]]]:
        """As the base class, and a hook that keeps the tower's arguments."""
        return [(self.tower, "before", self._called), *super().hooks()]

    def _called(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._running().called[-1] = {**kwargs, "grid_thw": grids}

    def _done(self, tower: nn.Module, args: Any, output: Any) -> None:
        self._running().made = output.pooler_output
        super()._done(tower, args, output)

    def asks(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Frames, height and width of each picture, [n, 3], in patches."""
        kinds = [kind for kind in ("image", "video") if self._brought(given, kind)]
        if len(kinds) != 1:
            return []
        made = encoded(given).get(kinds[0])
        if made is None:
            grids = given.get(f"{kinds[0]}_grid_thw")
        else:
            grids = self.seen(made).called[-1]["grid_thw"]
        return [] if grids is None else [grids]

    def of(self, given: Mapping[str, Any], prompts: Prompts) -> Tower:
        """The tower's states and attention for the pictures of a forward: see `TowerReader.of`."""
        kinds = [kind for kind in ("image", "video") if self._brought(given, kind)]
        if len(kinds) > 1:
            raise self.unknown("images and videos come in one call: give them to the model in calls of their own")
        made = encoded(given).get(kinds[0]) if kinds else None
        seen = self.seen(made)
        run = TowerRun(seen, self.tower, self.merges, prompts.beside[0].tolist())
        entries = list(run.entries)
        if made is not None:  # copies for beams are the same tensors
            numbers = {id(one): number for number, one in enumerate({id(o): o for o in made.pooler_output}.values())}
            entries = [entries[numbers[id(one)]] for one in made.pooler_output]
        total = sum(prompts.visual_counts)
        if sum(map(len, entries)) != total:
            raise self.unknown(f"it made {sum(map(len, entries))} tokens, and the prompts have {total}")
        source, visual = torch.full(prompts.ids.shape, -1), prompts.host.visual
        source[visual] = torch.cat([*entries, torch.empty(0, dtype=torch.long)])
        places = [row.nonzero()[:, 0] for row in visual]
        layers = [LookedMerging(run, layer, number) for number, layer in enumerate(self.layers)]
        return Tower(
            run.padded(run.made, 0),
            0,
            moved(source, prompts.ids.device),
            grouped(entries, places, run.sizes, run.longest),
            lambda layer: layers[layer_number(layer, len(layers))].rows,
            lambda layer: layers[layer_number(layer, len(layers))].rows,
            lambda layer: layers[layer_number(layer, len(layers))].read,
            lambda layer: layers[layer_number(layer, len(layers))].keys,
            no_class_token,
            lambda states: states,
            self.merges,
        )

    def _brought(self, given: Mapping[str, Any], kind: str) -> bool:
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
        return encoded(given).get(kind) is not None or given.get(pixels) is not None


def no_class_token(layer: float) -> Tensor:
    """Stands in for the class token's query, which these towers lack.

    Raises:
        ValueError: Always.
    """
    raise ValueError("this vision tower has no class token, whose query is asked for")


class TowerRun:
    """One run of the tower: its pictures, and the order of its patches.

    Attributes:
        made: The tokens, in the order of the pictures, [N / m, D].
        sizes: Tokens of each picture or frame.
        longest: The largest of these.
    """

    def __init__(self, seen: Seen, tower: Any, merges: int, grids: list[list[int]]):
        assert seen.made is not None
        self.seen, self.tower, self.merges, self.made, self.grids = seen, tower, merges, seen.made, grids
        self.sizes = [h * w // merges for frames, h, w in self.grids for _ in range(frames)]
        self.longest = max(self.sizes, default=0)

    @property
    def entries(self) -> Iterator[Tensor]:
        """For each picture or video, the row of each of its tokens, counted through all P * R."""
        frame = 0
        for frames, height, width in self.grids:
            tokens = torch.arange(height * width // self.merges)
            yield (torch.arange(frame, frame + frames)[:, None] * self.longest + tokens).flatten()
            frame += frames

    @functools.cached_property
    def windows(self) -> tuple[Tensor, Tensor] | None:
        """The tokens in the order of the windows [N / m], and where each window begins and the last one ends; None:
        there are no windows. On the host."""
        tower = self.tower
        if not hasattr(tower, "window_size"):
            return None
        found: tuple[Tensor, Tensor] = get_vision_window_index(
            torch.tensor(self.grids), tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return found

    @functools.cached_property
    def order(self) -> Tensor | None:
        """Each token's place in the order of the windows, [N / m]; None: the same order."""
        if self.windows is None:
            return None
        index: Tensor | None = self.seen.called[-1].get("window_index")
        places = (self.windows[0] if index is None else index).argsort()
        return places if places.device == self.made.device else moved(places, self.made.device)

    def bounds(self, number: int) -> list[int]:
        """Where each group of patches that attend to each other in a layer begins, and the end of the last group.

        A group is a frame or a window, and each frame has a window of its own: as many groups as frames are the frames.
        """
        ends: Tensor = self.seen.called[number]["cu_seqlens"]
        groups = [[0, *accumulate(size * self.merges for size in self.sizes)]]
        groups += [] if self.windows is None else [self.windows[1].tolist()]
        found = next((group for group in groups if len(group) == len(ends)), None)
        return read_back([ends])[0].tolist() if found is None else found

    def padded(self, values: Tensor, dim: int) -> Tensor:
        """Values of the tokens along `dim` [.., N / m, ..] by picture, padded with zeros: [P, .., R, ..]."""
        parts = [part.movedim(dim, 0) for part in values.split(self.sizes, dim)]
        return pad_sequence(parts, batch_first=True).movedim(1, dim + 1)


class LookedMerging:
    """Attention of one layer; each part is computed once, when asked for."""

    def __init__(self, run: TowerRun, layer: Any, number: int):
        self.run, self.layer, self.number = run, layer, number

    @functools.cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys with their rotary positions, in the order of the windows, [heads, N, head size]."""
        states, called = self.run.seen.inputs.get(self.number), self.run.seen.called.get(self.number)
        if states is None or called is None:
            raise ValueError("this layer of the vision tower is not kept: name it in the method's merged_tower_layers")
        attention: Any = self.layer.attn
        # under autocast states are in half precision; ranking is in float32
        normed = self.layer.norm1(states.to(self.layer.norm1.weight.dtype))
        query, key, _ = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(query, key, *called["position_embeddings"])
        return query.transpose(0, 1), key.transpose(0, 1)

    @functools.cached_property
    def keys(self) -> Tensor:
        """Mean over the patches of each token, [P, heads, R, head size]."""
        return self.run.padded(self.in_place(self.rotated[1].unflatten(1, (-1, self.run.merges)).mean(2)), 1)

    def in_place(self, values: Tensor) -> Tensor:
        """Values of tokens in the order of the windows [heads, N / m, ...], put into the picture's order."""
        return values if self.run.order is None else values[:, self.run.order]

    @functools.cached_property
    def read(self) -> Tensor:
        """`rows` on the host."""
        return read_back([self.rows])[0]

    @functools.cached_property
    @torch.no_grad()
    def rows(self) -> Tensor:
        """Attention that each token's patches get, mean over all rows of its picture, [P, heads, R] float32."""
        queries, keys = self.rotated
        wide = torch.promote_types(keys.dtype, torch.float32)  # in half precision dozens of tokens tie
        bounds = self.run.bounds(self.number)
        parts = [
            received(queries[:, first:end].to(wide), keys[:, first:end].to(wide), self.layer.attn.scaling)
            for first, end in zip(bounds, bounds[1:])
        ]
        tokens = self.in_place(torch.cat(parts, 1).unflatten(1, (-1, self.run.merges)).sum(2))
        asked = torch.tensor([size * self.run.merges for size in self.run.sizes], dtype=wide)
        return (self.run.padded(tokens, 1) / moved(asked, tokens.device)[:, None, None]).float()
