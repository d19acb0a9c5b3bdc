"""The vision tower, for methods that read it: what is kept of its run, and which of its rows became which token.

If a method declares `Method.tower_layers`, pre-hooks keep the input of these layers and of the layer whose input is
projected, one tensor each, and nothing runs twice: attention rows and keys are computed from these on demand, with the
layers' own modules, so the tower may use any attention backend. `generate` runs the tower before the model; what was
kept is then tied to the tower's output and freed with it.

Supported are towers of layers with `layer_norm1`, `self_attn.q_proj` and `k_proj` (CLIP, SigLIP) in which each row
becomes one token after a `multi_modal_projector`, with or without newlines and cut padding; pictures and videos may
have separate towers (Video-LLaVA). Towers that end in a merger are in pdrop/engine/merging_tower.py. Shapes: P
pictures, tiles, crops and frames, R rows of each, d the tower's width.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pdrop.engine.pictures import newlines, pack, single_images, tiles_of
from pdrop.engine.sequence import Prompts
from pdrop.engine.visual import brought, encoded
from pdrop.methods.base import Method
from pdrop.methods.tower import Tile, Tower, layer_number
from pdrop.methods.transfer import moved, read_back

ASKED = 256  # rows of attention that are computed at once: a large picture has too many


class UnknownTower(ValueError):
    """A vision tower that cannot be read."""


class NoRuleForTower(UnknownTower):
    """A kind of vision tower that the method has no rule for."""


@dataclass
class Seen:
    """What was kept of one run of the tower.

    Attributes:
        inputs: Inputs of its layers, by number, [P, R, d]; the last layer's output under the number after it.
        called: Keyword arguments of each of these layers, and of the tower itself under -1.
        made: The tokens that it made, [tokens, D], if it ends in a merger.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    called: dict[int, dict[str, Any]] = field(default_factory=dict)
    made: Tensor | None = None


class RunsOfTheTower:
    """Keeps what a method reads of each run of the tower, per thread, until the forward that uses it ends.

    Attributes:
        tower: The tower.
        layers: Its layers.
        read: Numbers of the layers whose input is kept.
    """

    tower: nn.Module
    layers: list[Any]
    read: list[int]

    def __init__(self, vlm: Any):
        self.vlm, self.inner = vlm, getattr(vlm, "model", vlm)
        self.now = threading.local()

    def hooks(self) -> list[tuple[nn.Module, str, Callable[..., None]]]:
        """The hooks to register: module, "before" or "after" it runs, and the hook."""
        entering = [(self.layers[number], "before", self._entering(number)) for number in self.read]
        return [*entering, (self.tower, "after", self._done)]

    def _entering(self, number: int) -> Callable[..., None]:
        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running = self._running()
            running.inputs[number], running.called[number] = args[0] if args else kwargs["hidden_states"], kwargs

        return keep

    def _running(self) -> Seen:
        """What is kept of the current run in this thread."""
        if getattr(self.now, "seen", None) is None:
            self.now.seen = Seen()
        seen: Seen = self.now.seen
        return seen

    def _done(self, tower: nn.Module, args: Any, output: Any) -> None:
        """The tower has run: tie what was kept to its output."""
        self.now.latest, self.now.seen = self._running(), None
        output._pdrop_tower = self.now.latest

    def close(self) -> None:
        """A forward has ended."""
        self.now.latest = self.now.seen = None

    def asks(self, given: Mapping[str, Any]) -> list[Tensor]:
        """What `of` must know on the host: read with the prompts, so that there is one wait for the device.

        Args:
            given: The arguments of the model's forward; with no pictures among them, nothing is asked.
        """
        return []

    def of(self, given: Mapping[str, Any], prompts: Prompts) -> Tower:
        """The tower's states and attention for the pictures of a forward.

        Args:
            given: The arguments of the model's forward.
            prompts: Its prompts, with what `asks` named read beside them.

        Raises:
            UnknownTower: If it did not run while this was attached, or its rows cannot be matched with the tokens.
        """
        raise NotImplementedError

    def seen(self, made: Any) -> Seen:
        """What was kept of the run that made these features; of the latest run, if the forward itself ran the tower.

        Raises:
            UnknownTower: If it did not run while this was attached.
        """
        kept = getattr(self.now, "latest", None) if made is None else getattr(made, "_pdrop_tower", None)
        if kept is None:
            raise self.unknown("it has not run on these pictures since the method was attached")
        found: Seen = kept
        return found

    def unknown(self, why: str) -> UnknownTower:
        """The error for a forward whose tower rows cannot be identified."""
        return UnknownTower(
            f"what the vision tower of {type(self.vlm).__name__} made of these pictures is not known: {why}"
        )


class TowerReader(RunsOfTheTower):
    """Reads a tower in which each row becomes one token, and finds which token.

    Args:
        vlm: The model.
        method: The method that reads the tower.
        layers: Numbers of the layers that are read.
        tower_name: The tower's attribute name in the model.
        cut: Whether its first row is not projected; None: as in the model's config.
    """

    def __init__(
        self,
        vlm: Any,
        method: Method,
        layers: tuple[float, ...],
        tower_name: str = "vision_tower",
        cut: bool | None = None,
    ):
        super().__init__(vlm)
        self.method = kind = type(method).__name__
        name = type(vlm).__name__
        tower = getattr(self.inner, tower_name, None)
        self.projector: Any = getattr(self.inner, "multi_modal_projector", None)
        encoder = getattr(tower, "encoder", tower)
        stack = getattr(encoder, "layers", None)
        refused = f"{kind} reads the vision tower, and that of {name} cannot be read: "
        if tower is None or self.projector is None or stack is None:
            raise UnknownTower(
                refused + "it has no `vision_tower` of `layers` and `multi_modal_projector`; divprune and the methods "
                "inside the decoder need none"
            )
        self.tower: nn.Module = tower
        self.layers = [getattr(layer, "_fsdp_wrapped_module", layer) for layer in stack]
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            if not hasattr(layer, "layer_norm1") or not all(
                hasattr(attention, p) for p in ("q_proj", "k_proj", "scale")
            ):
                raise UnknownTower(
                    refused + "its layers have no `layer_norm1`, `self_attn.q_proj`, `k_proj` and `scale`"
                )
        config = self.inner.config
        taken, count = getattr(config, "vision_feature_layer", -1), len(self.layers)
        if not isinstance(taken, int):
            raise UnknownTower(refused + f"several of its layers are projected together ({taken})")
        if outside := [n for n in layers if not -count <= n < count]:
            raise UnknownTower(refused + f"it has {count} layers, and layers {list(outside)} are asked for")
        # state k of count + 1 is the input of layer k; the last state is the last layer's output
        self.projected = taken % (count + 1)
        self.read = sorted({layer_number(n, count) for n in layers} | {self.projected} - {count})
        vision = config.vision_config
        self.classes = int(vision.model_type == "clip_vision_model")
        if not self.classes and any(part.class_token for part in method.parts):
            raise NoRuleForTower(f"{kind} ranks by the vision tower's class token, and that of {name} has none")
        strategy = getattr(config, "vision_feature_select_strategy", "full")
        self.first = int(strategy == "default" if cut is None else cut)
        self.side = vision.image_size // vision.patch_size

    def hooks(self) -> list[tuple[nn.Module, str, Callable[..., None]]]:
        """As the base class, and a hook that keeps the last layer's output if that is projected."""
        last = self.projected == len(self.layers)
        left: list[tuple[nn.Module, str, Callable[..., None]]] = [(self.layers[-1], "after", self._left)]
        return [*(left if last else []), *super().hooks()]

    def _left(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._running().inputs[len(self.layers)] = output[0] if isinstance(output, tuple) else output

    # ---------------------------------------------------------------- what a method sees

    def asks(self, given: Mapping[str, Any]) -> list[Tensor]:
        """Where the newlines of the features are; before features are made, the sizes that they follow from."""
        made = encoded(given).get("video" if brought("video", given, encoded(given)) else "image")
        if not hasattr(self.inner, "pack_image_features"):
            return []
        if made is not None:
            return list(newlines(self.inner, list(made.pooler_output)).values())
        return [given[name] for name in sized(given)]

    def of(self, given: Mapping[str, Any], prompts: Prompts) -> Tower:
        kind = "video" if brought("video", given, encoded(given)) else "image"
        made, total = encoded(given).get(kind), sum(prompts.visual_counts)
        seen = self.seen(made)
        states = seen.inputs[self.projected]
        if kind == "video" and total != len(states) * (states.shape[1] - self.first):
            raise self.unknown(
                f"the {total} tokens of videos are not rows of their {len(states)} frames, but pooled from several, or "
                f"pictures come with them; {self.method} needs a row for each: divprune and the methods inside the "
                "decoder need none"
            )
        if made is None:
            given = {**given, **dict(zip(sized(given), prompts.beside))}
        entries = self._entries(given, made, states, prompts.beside)
        if sum(len(rows) for rows in entries) != total:
            raise self.unknown(f"its rows make {sum(map(len, entries))} tokens, and the prompts have {total}")
        source = torch.full(prompts.ids.shape, -1)
        visual = prompts.host.visual
        if self.first < self.classes:  # class tokens that reach the language model
            entries = [rows.masked_fill(rows % states.shape[1] < self.classes, -1) for rows in entries]
        source[visual] = torch.cat([*entries, torch.empty(0, dtype=torch.long)])
        places = [row.nonzero()[:, 0] for row in visual]
        pictures = grouped(entries, places, [states.shape[1] - self.classes] * len(states), states.shape[1])
        layers = [Looked(layer, seen.inputs.get(number), self.classes) for number, layer in enumerate(self.layers)]
        device = prompts.ids.device
        return Tower(
            states,
            self.classes,
            moved(source, device),
            pictures,
            lambda layer: layers[layer_number(layer, len(layers))].rows,
            lambda layer: layers[layer_number(layer, len(layers))].received,
            lambda layer: layers[layer_number(layer, len(layers))].read,
            lambda layer: layers[layer_number(layer, len(layers))].keys,
            lambda layer: layers[layer_number(layer, len(layers))].asking[:, :, 0],
            self.projector,
        )

    def _entries(self, given: Mapping[str, Any], made: Any, states: Tensor, newline: Sequence[Tensor]) -> list[Tensor]:
        """For each picture in the order of the prompts, the row of each of its tokens, counted through all tiles.

        Args:
            given: The arguments of the model's forward, sizes on the host.
            made: The features, if the tower has made them before.
            states: The projector's input, [P, R, d].
            newline: Which rows of each of the features are newlines, on the host.
        """
        per = states.shape[1] - self.first
        packs = hasattr(self.inner, "pack_image_features")
        if made is not None:
            known: dict[int, Tensor] = {}
            tiles, ones = 0, list(made.pooler_output)  # indexing a tensor makes new objects each time
            ends = dict(zip({id(one): one for one in ones}, newline))  # copies for beams are the same tensors
            for one in ones:
                if id(one) not in known:
                    numbers, count = self._of_feature(one, ends[id(one)]) if packs else whole(len(one), per)
                    if len(numbers) != len(one):
                        raise self.unknown(f"{len(one)} tokens are not rows of {per}")
                    known[id(one)] = self._rows(numbers, per, tiles)
                    tiles += count
            if tiles != len(states):
                raise self.unknown(f"the tokens are of {tiles} tiles, and {len(states)} went through it")
            return [known[id(one)] for one in ones]
        sizes = given.get("image_sizes")
        if packs and sizes is not None:
            sizes = sizes.tolist() if isinstance(sizes, Tensor) else [list(size) for size in sizes]
            found, tiles = [], 0
            for size, tiled in zip(sizes, single_images(given, len(sizes))):
                numbers, count = self._packed(size, per, tiled)
                found.append(self._rows(numbers, per, tiles))
                tiles += count
            return found
        return [self._rows(torch.arange(per), per, tile) for tile in range(len(states))]

    def _rows(self, numbers: Tensor, per: int, tiles: int) -> Tensor:
        """Patch numbers (`per` for each tile; -1: newline) as rows of the tower, after the rows of `tiles` tiles."""
        tile, patch = numbers.clamp(min=0) // per, numbers.clamp(min=0) % per
        rows = (tiles + tile) * (per + self.first) + self.first + patch
        return rows.masked_fill(numbers < 0, -1)

    def _packed(self, size: list[int], per: int, tiled: bool) -> tuple[Tensor, int]:
        """The patch of each token of a picture, and its tiles, found by letting the model itself pack numbers."""
        count = tiles_of(self.inner, size, tiled)
        numbers = torch.arange(count * per, dtype=torch.float64).view(count, per)
        found = pack(self.inner, numbers, size, newline=-1)
        if not torch.equal(found, found.round()):
            raise self.unknown("the model scales so large a picture's features down")
        return found.long(), count

    def _of_feature(self, one: Tensor, newline: Tensor) -> tuple[Tensor, int]:
        """The patch of each token of a picture of which only the features [tokens, D] are known, and its tiles.

        Newlines (`newline` [tokens] bool, on the host) give the rows of the joined picture, and these the smallest grid
        of tiles that it can have been cut from. If there is none, the result has another length than the features.
        """
        vision, ends = self.inner.config.vision_config, newline.nonzero()[:, 0].tolist()
        side, small = self.side, self.side**2
        head = torch.arange(small)
        if len(one) <= small + 1:
            return torch.cat([head, torch.full((max(0, len(one) - small),), -1)]), 1
        width, height = ends[0] - small if ends else 0, len(ends)
        grids = {(h // vision.image_size, w // vision.image_size) for h, w in self.inner.config.image_grid_pinpoints}
        fits = [
            (down, across)
            for down, across in grids
            if (down * side == height and across * side >= width) or (across * side == width and down * side >= height)
        ]
        if not fits:
            return head, 1
        down, across = min(fits, key=lambda grid: grid[0] * grid[1])
        numbers = (torch.arange(down * across * small) + small).view(down, across, side, side)
        joined = numbers.permute(0, 2, 1, 3).reshape(down * side, across * side)
        top, left = (down * side - height) // 2, (across * side - width) // 2
        joined = joined[top : top + height, left : left + width]
        rows = torch.cat([joined, torch.full((height, 1), -1)], 1).flatten()
        return torch.cat([head, rows]), down * across + 1


class TowersApart(RunsOfTheTower):
    """Reads separate towers for pictures and videos (Video-LLaVA); class tokens of frames are projected."""

    def __init__(self, vlm: Any, method: Method, layers: tuple[float, ...]):
        super().__init__(vlm)
        self.readers = {
            "image": TowerReader(vlm, method, layers, "image_tower"),
            "video": TowerReader(vlm, method, layers, "video_tower", cut=False),
        }

    def hooks(self) -> list[tuple[nn.Module, str, Callable[..., None]]]:
        return [hook for reader in self.readers.values() for hook in reader.hooks()]

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()

    def of(self, given: Mapping[str, Any], prompts: Prompts) -> Tower:
        kinds = [kind for kind in self.readers if brought(kind, given, encoded(given))]
        if len(kinds) != 1:
            raise self.unknown("pictures and videos come in one call: give them to the model in calls of their own")
        return self.readers[kinds[0]].of(given, prompts)


def sized(given: Mapping[str, Any]) -> list[str]:
    """The arguments of a forward that say how pictures are tiled, those that are tensors."""
    return [name for name in ("image_sizes", "batch_num_images") if isinstance(given.get(name), Tensor)]


def whole(tokens: int, per: int) -> tuple[Tensor, int]:
    """The patches of whole tiles, and how many tiles."""
    return torch.arange(tokens // per * per), tokens // per


def grouped(entries: Sequence[Tensor], places: list[Tensor], sizes: Sequence[int], rows: int) -> list[list[list[Tile]]]:
    """The tiles of each prompt's pictures.

    Args:
        entries: For each picture, the row of each of its tokens, [tokens]; -1: none.
        places: For each prompt, the places of its visual tokens.
        sizes: For each tile, how many rows are its own.
        rows: From a tile's first row to the next one's.
    """
    found, left = [], list(entries)
    for own in places:
        pictures: list[list[Tile]] = []
        first = 0
        while first < len(own):
            entry = left.pop(0)
            there = own[first : first + len(entry)]
            tile = torch.where(entry < 0, -1, entry // rows)
            tiles = [Tile(n, tuple(there[tile == n].tolist()), sizes[n]) for n in tile.unique().tolist() if n >= 0]
            pictures.append(tiles)
            first += len(entry)
        found.append(pictures)
    return found


class Looked:
    """Attention of one tower layer with input `states` [P, R, d]; each part is computed once, when asked for."""

    def __init__(self, layer: nn.Module, states: Tensor | None, classes: int):
        self.attention: Any = layer.self_attn
        self.norm: Any = layer.layer_norm1
        self.states, self.classes = states, classes

    @functools.cached_property
    def normed(self) -> Tensor:
        """The input of the query and key projections, [P, R, d]."""
        if self.states is None:
            raise ValueError("this layer of the vision tower is not kept: name it in the method's tower_layers")
        states: Tensor = self.norm(self.states)
        return states

    def heads(self, projected: Tensor) -> Tensor:
        """[P, R, d] -> [P, heads, R, head size]."""
        split: Tensor = projected.unflatten(-1, (-1, self.attention.head_dim)).transpose(1, 2)
        return split

    @functools.cached_property
    def keys(self) -> Tensor:
        """[P, heads, R, head size]."""
        return self.heads(self.attention.k_proj(self.normed))

    @functools.cached_property
    def asking(self) -> Tensor:
        """The class token's query, or all rows' queries if there is none, [P, heads, 1 or R, head size]."""
        return self.heads(self.attention.q_proj(self.normed[:, :1] if self.classes else self.normed))

    @functools.cached_property
    def read(self) -> Tensor:
        """`rows` on the host."""
        return read_back([self.rows])[0]

    @functools.cached_property
    @torch.no_grad()
    def rows(self) -> Tensor:
        """Their attention, the mean over these queries, [P, heads, R] float32."""
        wide = torch.promote_types(self.keys.dtype, torch.float32)  # in half precision dozens of tokens tie
        logits = (self.asking.to(wide) * self.attention.scale) @ self.keys.to(wide).transpose(-1, -2)
        rows: Tensor = logits.softmax(-1).mean(2).float()
        return rows

    @functools.cached_property
    @torch.no_grad()
    def received(self) -> Tensor:
        """The mean over the rows of all queries, [P, heads, R] float32."""
        if not self.classes:
            return self.rows
        queries, wide = (
            self.heads(self.attention.q_proj(self.normed)),
            torch.promote_types(self.keys.dtype, torch.float32),
        )
        total = received(queries.to(wide), self.keys.to(wide), self.attention.scale)
        return (total / queries.shape[2]).float()


def received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each key gets from all queries together, [..., heads, n, head size] each -> [..., heads, n]."""
    found = torch.zeros(keys.shape[:-1], dtype=keys.dtype, device=keys.device)
    for some in queries.split(ASKED, -2):
        found += ((some * scale) @ keys.transpose(-1, -2)).softmax(-1).sum(-2)
    return found
