"""Dropping before layer 0: hides it from the rest of transformers.

`generate`, position ids and rotary deltas ask a cache for the prompt's length, and the cache asks its first layer. If
tokens were dropped before that layer, it holds fewer keys than the prompt has tokens. So the first layer of such a
cache knows how many are missing: it still reports the prompt's length, while masks are made for the keys that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DynamicLayer


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments: `cache` from transformers 5.24 on, `past_key_values` before."""
    found = given.get("past_key_values")
    return given.get("cache") if found is None else found


def returned_cache(output: Any) -> Any:
    """The cache that a forward returned, under either name."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


class EarlyLayer(DynamicLayer):
    """The first layer of a cache whose prompts lost `gone` places before layer 0."""

    gone = 0

    @property
    def held(self) -> int:
        """How many keys the layer holds."""
        return int(super().get_seq_length())

    def get_seq_length(self) -> int:
        """Tokens of the prompt and of what was generated, dropped ones included."""
        return self.held + self.gone

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of a mask for this many queries."""
        return self.held + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.gone = 0


@dataclass(frozen=True)
class Keys:
    """Stands in for a cache when a mask is made: this many keys, of which the queries are the last."""

    past: int
    is_compileable = False

    def get_query_offset(self, layer: int) -> int:
        """Keys before the first query."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer: int) -> tuple[int, int]:
        """(keys, offset) of a mask for this many queries."""
        return self.past + query_length, 0


def held(cache: Any, number: int) -> int:
    """Keys that layer `number` of a cache holds."""
    layer = cache.layers[number] if number < len(cache.layers) else None
    return layer.held if isinstance(layer, EarlyLayer) else int(cache.get_seq_length(number))


def lose(cache: Any, places: int) -> None:
    """Note that this forward's prompts have lost this many places before layer 0.

    Raises:
        ValueError: If the cache is of a kind that cannot tell its length from its keys.
    """
    first = cache.layers[0] if cache.layers else cache.layer_class_to_replicate()
    if not isinstance(first, EarlyLayer):
        if type(first) is not DynamicLayer or getattr(cache, "offloading", False):
            kind = f"{type(cache).__name__} of {type(first).__name__}"
            raise ValueError(f"dropping before layer 0 needs a cache that grows (DynamicCache), not a {kind}")
        early = EarlyLayer()
        early.__dict__.update(first.__dict__)  # a text turn may have filled it
        cache.layers[:1] = [early]
        first = early
    first.gone += places
