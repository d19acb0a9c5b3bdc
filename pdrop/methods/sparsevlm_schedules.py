"""SparseVLM's schedules: its published lists of counts, and the boundaries of v1, which needs no counts.

sparsevlm(num_layers=32, budget=192)        # Schedule('3:300t 7:200t 16:110t')
sparsevlm_v1(num_layers=32)                 # Schedule('3:adaptive 7:adaptive 16:adaptive 20:adaptive')
"""

from __future__ import annotations

from collections.abc import Sequence

from pdrop.schedule import Schedule, Stage, check_ratio

# Visual tokens of 576 kept on the output of layers 2, 6 and 15 of 32, by the name of the budget. (The budget is what
# the authors count; with merged tokens 206.5, 145.4, 114.1 and 82.3 enter a layer on average.)
SPARSEVLM = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
SPARSEVLM_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


def sparsevlm(
    num_layers: int = 32,
    ratio: float | None = None,
    budget: int | None = None,
    layers: Sequence[int] | None = None,
    shares: bool = False,
    plus: bool = False,
) -> Schedule:
    """SparseVLM's published lists (its code at 26a5f48), by name or scaled to a ratio.

    Boundaries are 3, 7 and 16 of 32 layers, before which its code cuts, and in proportion for other depths.

    Args:
        num_layers: Layers of the decoder.
        ratio: The share that stays at the first boundary. The other boundaries keep the proportions of the list for
            192: at 300/576 this is that list.
        budget: A list by its name instead, 192, 128, 96 or 64: counts, whatever the prompt's size. Takes precedence
            over `ratio`.
        layers: Three explicit boundaries.
        shares: The list's counts as shares of 576, for prompts of other sizes.
        plus: SparseVLM+'s lists.

    Raises:
        ValueError: If neither is given or there is no such list, or the boundaries do not fit the layers.
    """
    lists = SPARSEVLM_PLUS if plus else SPARSEVLM
    if budget is None and ratio is None:
        raise ValueError("give sparsevlm a ratio, or the name of a published list as budget")
    if budget is not None and budget not in lists:
        raise ValueError(f"budget is one of the published lists, {', '.join(map(str, lists))}, not {budget!r}")
    if layers is None:
        layers = in_proportion((3, 7, 16), num_layers)
    if len(layers) != 3:
        raise ValueError(f"SparseVLM's lists are for three boundaries, not layers={list(layers)}")
    if budget is None:
        check_ratio(ratio)
        scale = (ratio or 0.0) / lists[192][0]
        stages = [Stage(layer, scale * tokens) for layer, tokens in zip(layers, lists[192])]
    elif shares:
        stages = [Stage(layer, tokens / 576) for layer, tokens in zip(layers, lists[budget])]
    else:
        stages = [Stage(layer, tokens=tokens) for layer, tokens in zip(layers, lists[budget])]
    return Schedule(tuple(stages)).check(num_layers)


def sparsevlm_v1(num_layers: int = 32, layers: Sequence[int] | None = None) -> Schedule:
    """The four boundaries of SparseVLM v1 (its code at 91fb6d9), whose numbers the method finds prompt by prompt.

    They are 3, 7, 16 and 20 of 32 layers, before which its code cuts, and in proportion for other depths.

    Args:
        num_layers: Layers of the decoder.
        layers: Explicit boundaries, any number of them.

    Raises:
        ValueError: If the boundaries do not fit the layers.
    """
    if layers is None:
        layers = in_proportion((3, 7, 16, 20), num_layers)
    return Schedule(tuple(Stage(layer, adaptive=True) for layer in layers)).check(num_layers)


def in_proportion(layers: Sequence[int], num_layers: int) -> list[int]:
    """Boundaries of a 32-layer decoder at the same relative depth of another, rising from 1 on."""
    found: list[int] = []
    for layer in layers:
        found.append(max(1 + (found[-1] if found else 0), round(layer * num_layers / 32)))
    return found
