"""Prefills in step: whose turn it is, what is timed, and what happens if one fails."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench import build, cases, prompt, twin
from benchmarks.in_step import Side, in_step, keep_memory
from pdrop.engine import attach
from pdrop.timing.paired import prefill


class Layer(nn.Module):
    """A layer that says when it runs, and takes time."""

    def __init__(self, said: list[str], name: str, seconds: float) -> None:
        super().__init__()
        self.said, self.name, self.seconds = said, name, seconds

    def forward(self, hidden: Tensor) -> Tensor:
        self.said.append(self.name)
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        return hidden


def side(said: list[str], name: str, layers: int, seconds: float = 0.0) -> Side:
    decoder = nn.Sequential(*(Layer(said, name, seconds) for _ in range(layers)))
    return Side(SimpleNamespace(get_decoder=lambda: SimpleNamespace(layers=decoder)), lambda: decoder(torch.zeros(1)))


def test_one_layer_each_in_turns_and_everybody_begins_once() -> None:
    said: list[str] = []
    found = in_step({"a": side(said, "a", 3), "b": side(said, "b", 3), "c": side(said, "c", 1)}, rounds=2)
    assert {name: len(samples) for name, samples in found.items()} == {"a": 2, "b": 2, "c": 2}
    rounds = ["".join(said[at : at + 7]) for at in range(0, 21, 7)]
    for one in rounds:
        assert sorted(one) == list("aaabbbc") and "c" in one[:3], one
        assert one.replace("c", "") in ("ababab", "bababa"), one
    assert len({one[0] for one in rounds}) > 1


def test_a_side_s_time_is_its_own() -> None:
    said: list[str] = []
    found = in_step({"slow": side(said, "s", 4, seconds=0.02), "quick": side(said, "q", 4)}, rounds=1)
    slow, quick = found["slow"][0], found["quick"][0]
    assert slow.cpu_ms >= 80 and slow.wall_ms >= 80
    assert quick.cpu_ms < 40 and quick.wall_ms < 80


def test_a_side_that_fails_ends_the_measurement_and_leaves_no_hook() -> None:
    said: list[str] = []
    fine, broken = side(said, "f", 3), side(said, "b", 3)

    def fails() -> None:
        broken.model.get_decoder().layers[0](torch.zeros(1))
        raise RuntimeError("the second layer is missing")

    with pytest.raises(RuntimeError, match="second layer is missing"):
        in_step({"fine": fine, "broken": Side(broken.model, fails)}, rounds=3)
    assert said.count("f") == 3
    assert all(not layer._forward_pre_hooks for one in (fine, broken) for layer in one.model.get_decoder().layers)


def test_what_cannot_be_in_step() -> None:
    one = side([], "a", 1)
    with pytest.raises(ValueError, match="a model each"):
        in_step({"a": one, "b": one}, rounds=1)
    with pytest.raises(ValueError, match="at least one round"):
        in_step({"a": one}, rounds=0)


def test_prefills_in_step_are_what_they_are_alone() -> None:
    model = build(layers=8, hidden=32, heads=2, intermediate=64)
    inputs, case = prompt(model, 24), cases(8)[0]
    plain, dropping = twin(model), twin(model)
    alone = prefill(model, inputs).logits
    with attach(model, case.method, case.schedule):
        dropped = prefill(model, inputs).logits
    outputs: dict[str, list[Tensor]] = {"plain": [], "dropping": []}
    with attach(dropping, case.method, case.schedule):
        sides = {
            name: Side(own, lambda own=own, name=name: outputs[name].append(prefill(own, inputs).logits))  # type: ignore[misc]
            for name, own in (("plain", plain), ("dropping", dropping))
        }
        in_step(sides, rounds=2)
    assert len(outputs["plain"]) == len(outputs["dropping"]) == 3
    assert all(torch.equal(one, alone) for one in outputs["plain"])
    assert all(torch.equal(one, dropped) for one in outputs["dropping"])


def faults(keeps: bool, answer: Any) -> None:
    """In a process of its own: page faults of large arrays that are made and freed; None if memory cannot be kept."""
    if keeps and not keep_memory():
        answer.send(None)
        return
    counted = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            np.ones(8 * 2**20)
        counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    answer.send(counted[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")
def test_kept_memory_is_not_mapped_anew() -> None:
    forks, found = multiprocessing.get_context("fork"), {}
    for keeps in (True, False):
        here, there = forks.Pipe(duplex=False)
        process = forks.Process(target=faults, args=(keeps, there))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        found[keeps] = here.recv()
    if found[True] is None:
        pytest.skip("this system's allocator cannot be told")
    assert found[True] < 200 and found[True] < found[False] / 10
