"""What dropping costs the host on CUDA, counted on a pretended device: waits for it, launches, mixed devices.

The table is a bound that a change may lower and must not raise without being seen. One wait of a prefill reads the
prompt; chance reads its ids, too. Of each method with two boundaries.

    pytest tests/engine/test_syncs.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop import FastV, Method, PyramidDrop, RandomDrop, Schedule, SparseVLM, SparseVLMPlus, attach
from pdrop.conformance.families import fresh
from pdrop.methods.transfer import on_device
from tests.support.cases import HALVES, RAGGED, batch_of
from tests.support.pretended_cuda import OnDevice, moved, pretended

METHODS: dict[str, Method] = {
    "PyramidDrop": PyramidDrop(),
    "PyramidDrop, original": PyramidDrop(positions="original"),
    "FastV": FastV(),
    "SparseVLM": SparseVLM(),
    "SparseVLM+": SparseVLMPlus(),
    "random": RandomDrop(),
}
# (waits of a prefill, launches of it, launches of a decoding step), one prompt and a padded batch; a step never waits
TABLE = {
    "PyramidDrop": {"one": (1, 165, 0), "ragged": (1, 203, 4)},
    "PyramidDrop, original": {"one": (1, 160, 0), "ragged": (1, 194, 0)},
    "FastV": {"one": (1, 154, 0), "ragged": (1, 188, 0)},
    "SparseVLM": {"one": (1, 397, 0), "ragged": (1, 543, 4)},
    "SparseVLM+": {"one": (1, 259, 0), "ragged": (1, 294, 0)},
    "random": {"one": (2, 89, 0), "ragged": (2, 115, 0)},
}
ROWS = {"one": RAGGED[:1], "ragged": RAGGED}


def counts(
    method: Method,
    rows: Any,
    patch: pytest.MonkeyPatch,
    steps: int = 3,
    schedule: Schedule = HALVES,
    family: str = "llava",
) -> Any:
    """(waits, launches) of the prefill and of the last decoding step, our own; and where each of both waited."""
    model = fresh(family, "sdpa", torch.float32).eval()
    batch = batch_of(family, model, rows)
    greedy: dict[str, Any] = dict(max_new_tokens=steps, do_sample=False, suppress_tokens=[2])
    with torch.no_grad(), attach(model, method, schedule):
        want = model.generate(**batch, **greedy)
    moved(model)
    there = {name: OnDevice(value) for name, value in batch.items()}
    found: list[tuple[int, int]] = []
    sites: list[Any] = []
    with torch.no_grad(), pretended(patch) as seen:
        model.register_forward_pre_hook(lambda *_: seen.clear())

        def note(*_: Any) -> None:
            found.append((seen.waits["own"], seen.launches["own"]))
            sites.append(dict(seen.sites))
            mixed.extend(seen.mixed)

        mixed: list[str] = []
        with attach(model, method, schedule):
            model.register_forward_hook(note)
            got = model.generate(**there, **greedy)
    assert not mixed
    assert torch.equal(got.there, want), "the same tokens as without the pretence"
    return found[0], found[-1], sites[0], sites[-1]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", METHODS)
def test_no_more_waits_and_launches_than_the_table_says(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (waits, launches), (step_waits, step_launches), where, step_where = counts(METHODS[name], ROWS[rows], monkeypatch)
    most_waits, most_launches, most_step_launches = TABLE[name][rows]
    assert step_waits == 0, step_where
    assert 0 < waits <= most_waits, where
    assert 0 < launches <= most_launches
    assert step_launches <= most_step_launches


def test_the_pretended_device_sees_what_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain copy waits, one from pinned memory and a filled tensor do not; two devices are noted; so is a launch."""
    with pretended(monkeypatch) as seen:
        device = torch.device("cuda:0")
        x = OnDevice(torch.arange(3))
        waits = [seen.waits["model"]]
        for make in (
            lambda: torch.tensor([1, 2, 3], device=device),
            lambda: torch.tensor([1, 2, 3]).to(device, non_blocking=True),
            lambda: on_device([1, 2, 3], device),
            lambda: on_device([2, 2, 2], device),
            lambda: x[torch.tensor([0, 1])],
            lambda: bool((x > 1).any()),
        ):
            made = make()
            assert isinstance(made, bool) or made.device == device
            waits.append(seen.waits["model"] + seen.waits["own"])
        assert [after - before for before, after in zip(waits, waits[1:])] == [1, 1, 0, 0, 1, 1]
        assert not seen.mixed
        launched = seen.launches["model"]
        torch.add(x, x)
        assert seen.launches["model"] == launched + 1
        torch.add(x, torch.arange(3))
        assert len(seen.mixed) == 1
