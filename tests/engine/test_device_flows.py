"""Every flow on pretended CUDA devices: the same numbers as on the CPU, no operation on two devices, few waits.

pytest tests/engine/test_device_flows.py
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from pdrop import FastV, Method, PyramidDrop, RandomDrop, Schedule, SparseVLM, SparseVLMPlus, Stage, attach
from pdrop.conformance.families import fresh
from pdrop.engine.ranking import attention_rows
from pdrop.training.arguments import arguments_of
from pdrop.training.loop import PartsTrainer
from pdrop.training.parts import Rates
from tests.support.cases import HALVES, RAGGED, batch_of
from tests.support.pretended_cuda import OnDevice, Stream, aligned, bare, moved, pretended

GREEDY: dict[str, Any] = dict(do_sample=False, suppress_tokens=[2])
SECOND = torch.device("cuda:1")
Flow = Callable[[Any, Any, Any, Any], list[Any]]


def labels_of(batch: Any) -> torch.Tensor:
    """The last two tokens of each prompt are its answer."""
    labels: torch.Tensor = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    return labels


def beams(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    return [model.generate(**batch, **GREEDY, num_beams=2, max_new_tokens=3)]


def sampled(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    """Several answers per prompt."""
    out = model.generate(
        **batch, suppress_tokens=[2], do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=3
    )
    return [out]


def static(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    return [model.generate(**batch, **GREEDY, max_new_tokens=3, cache_implementation="static", disable_compile=True)]


def scored(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    out = model(**batch, labels=labels)
    return [out.loss, out.logits]


def trained(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    """The forward of a training step."""
    model.train()
    with torch.enable_grad():
        return [model(**batch, labels=labels, use_cache=False).loss.detach()]


def later_turn(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    """Text after an answer, on the same cache."""
    cache = model(**batch, use_cache=True).past_key_values
    ids = batch["input_ids"][:, -3:]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids)], 1)
    out = model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    step = model(input_ids=ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)
    return [out.logits, step.logits]


def uncached(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    return [model.generate(**batch, **GREEDY, max_new_tokens=3, use_cache=False)]


class Queue(Stream):
    """A queue of copies, in which nothing is waited for."""

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def offloaded(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    """With transformers' own cache that sends each layer's keys to the host; it needs CUDA's queues."""
    there = isinstance(batch["input_ids"], OnDevice)
    return [model.generate(**batch, **GREEDY, max_new_tokens=3, cache_implementation="offloaded" if there else None)]


def reading(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
    """All that a trace tells."""
    model(**batch, logits_to_keep=1)
    found = [row for boundary in [*trace.kept, *trace.order, *trace.scores] for row in boundary]
    made = [token for boundary in trace.merged for row in boundary for token in row]
    return [*found, [token.sources for token in made]]


FLOWS: dict[str, Flow] = {
    flow.__name__: flow for flow in (beams, sampled, static, scored, trained, later_turn, uncached)
}
METHODS: list[Method] = [PyramidDrop(), FastV(several=True), SparseVLM(), RandomDrop()]


def same(got: Any, want: Any) -> None:
    """To rounding: the pretended device calls other kernels here and there."""
    assert len(got) == len(want)
    for one, other in zip(got, want):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(bare(one), other, rtol=0, atol=1e-5)
        else:
            assert one == other


def both(
    flow: Flow, method: Method, schedule: Schedule, patch: pytest.MonkeyPatch, rows: Any = RAGGED, study: bool = False
) -> Any:
    """What a flow gives on the CPU and there; and what was counted there."""
    found: list[Any] = []
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, rows)
    labels = labels_of(batch)
    with torch.no_grad(), attach(model, method, schedule) as trace:
        trace.study = study
        found.append(flow(model, batch, labels, trace))
    moved(model.eval())
    there = {name: OnDevice(value) for name, value in batch.items()}
    with torch.no_grad(), pretended(patch) as seen, attach(model, method, schedule) as trace:
        trace.study = study
        found.append(flow(model, there, OnDevice(labels), trace))
    return *found, seen


@pytest.mark.product(8)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_is_the_same_there(flow: str, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    want, got, seen = both(FLOWS[flow], method, HALVES, monkeypatch)
    same(got, want)
    assert not seen.mixed


@pytest.mark.product(1)
@pytest.mark.parametrize("method", [FastV(several=True), SparseVLM()], ids=lambda method: type(method).__name__)
def test_keys_that_were_sent_to_the_host_are_not_mixed_in(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Queue)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Queue())
    copied = OnDevice.to
    at_once = {"non_blocking": False}  # nobody waits here, and a copy that comes later would hold rubbish until then
    monkeypatch.setattr(OnDevice, "to", lambda self, *args, **kwargs: copied(self, *args, **kwargs | at_once))
    want, got, seen = both(offloaded, method, HALVES, monkeypatch)
    same(got, want)
    assert not seen.mixed


def training_step(method: Method | None, checkpointing: bool, patch: pytest.MonkeyPatch | None) -> Any:
    """Loss, gradients and what was counted after the forward and after the backward; without a patch on the CPU."""
    model = fresh("llava", "sdpa", torch.float32)
    batch = batch_of("llava", model, RAGGED)
    labels, counted = labels_of(batch), []
    if checkpointing:
        kwargs = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.train()
    with ExitStack() as stack:
        if patch is not None:
            patch.setattr(OnDevice, "differentiable", True)
            moved(model, trained=True)
            batch, labels = {name: OnDevice(value) for name, value in batch.items()}, OnDevice(labels)
            seen = stack.enter_context(pretended(patch))
        if method is not None:
            stack.enter_context(attach(model, method, HALVES))
        loss = model(**batch, labels=labels, use_cache=False).loss
        counted.append(0 if patch is None else (seen.waits["own"], seen.waits["model"]))
        loss.backward()
        counted.append(0 if patch is None else (seen.waits["own"], seen.waits["model"]))
        mixed = [] if patch is None else list(seen.mixed)
    gradients = {name: bare(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return bare(loss.detach()), gradients, counted, mixed


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_training_step_waits_once_and_its_backward_never(
    method: Method, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to read the prompts, besides what the model itself waits for; the same gradients, nothing on two devices."""
    want, gradients, *_ = training_step(method, checkpointing, None)
    with monkeypatch.context() as patch:
        _, _, alone, mixed = training_step(None, checkpointing, patch)
        assert not mixed
    with monkeypatch.context() as patch:
        got, found, counted, mixed = training_step(method, checkpointing, patch)
    assert not mixed and torch.equal(got, want) and set(found) == set(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)
    assert counted == [(own + 1, model) for own, model in alone]
    assert gradients and alone[0] == alone[1] == (0, 3)


def test_counting_a_training_s_tokens_waits_at_its_first_step_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What transformers' own Trainer waits for is waited for here, too, and no more from the second step on."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED)
    settings: Any = SimpleNamespace(
        micro_batch=4, accumulate=1, rates=Rates(0, 1e-3, 1e-3), bf16=False, tf32=False, device="cpu", parallel="none",
        seed=0, save_steps=2, log_steps=1, workers=0, arguments={}, parallel_arguments={},
    )  # fmt: skip
    arguments = arguments_of(settings, tmp_path, 3)
    assert arguments.include_num_input_tokens_seen == "no", "the Trainer's own count waits in each step"
    visual = torch.tensor([model.config.image_token_id])
    trainer = PartsTrainer(
        rates=settings.rates, lengths=[1], grouped=False, visual_ids=visual, model=model, args=arguments
    )
    labels = labels_of(batch)
    moved(model)
    there = {name: OnDevice(value) for name, value in (batch | {"labels": labels}).items()}
    waits, answers = [], OnDevice((labels != -100).sum())  # the Trainer has moved it there
    with torch.no_grad(), pretended(monkeypatch) as seen:
        for count in (partial(Trainer.compute_loss, trainer), *[trainer.compute_loss] * 3):
            seen.clear()
            count(model, dict(there), num_items_in_batch=answers)
            waits.append(seen.waits["own"] + seen.waits["model"])
        assert not seen.mixed
    assert waits[0] > 0 and waits == [waits[0], waits[0] + 2, waits[0], waits[0]], waits
    real = batch["attention_mask"].bool()
    expected = [len(real), int(real.sum()), int((batch["input_ids"] == visual).sum())]
    assert bare(trainer.counts).tolist() == [3 * count for count in expected]


@pytest.mark.parametrize("method", [FastV(several=True), SparseVLM()], ids=lambda method: type(method).__name__)
def test_what_a_trace_tells_is_read_at_once(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the prompt; then one each for scores and order, two for what was kept (of those that merged), one for
    what was made."""
    want, got, seen = both(reading, method, HALVES, monkeypatch)
    same(got, want)
    assert not seen.mixed
    assert seen.waits["own"] <= 1 + 1 + 1 + (3 if isinstance(method, SparseVLM) else 1), seen.sites


def test_the_study_waits_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def study(model: Any, batch: Any, labels: Any, trace: Any) -> list[Any]:
        model(**batch, logits_to_keep=1)
        layers = [layer for prompt in trace.attention for layer in prompt]
        assert len(layers) == len(batch["input_ids"]) * 6
        return [torch.tensor([layer.mass, layer.entropy, layer.top]) for layer in layers] + [
            layer.weights for layer in layers
        ]

    everything = Schedule(tuple(Stage(layer, 1.0) for layer in range(1, 6)))
    want, got, seen = both(study, PyramidDrop(positions="original"), everything, monkeypatch, study=True)
    same(got, want)
    assert not seen.mixed
    assert seen.waits["own"] == 2, seen.sites  # the prompt, and what was noted


@pytest.mark.product(3)
@pytest.mark.parametrize("split", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "method",
    [PyramidDrop(), FastV(several=True), SparseVLM(), SparseVLMPlus(), RandomDrop()],
    ids=lambda m: type(m).__name__,
)
def test_two_devices_under_a_map_give_the_same_tokens(
    method: Method, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers from `split` on are on another device, wherever the boundaries are."""
    model = fresh("llava", "sdpa", torch.float32).eval()
    batch = batch_of("llava", model, RAGGED)
    with torch.no_grad(), attach(model, method, HALVES):
        want = model.generate(**batch, **GREEDY, max_new_tokens=3)
    moved(model)
    decoder = model.get_decoder()
    for number, layer in enumerate(decoder.layers):
        if number >= split:
            moved(layer, SECOND)
        aligned(layer, SECOND if number >= split else torch.device("cuda:0"))
    aligned(decoder.norm, torch.device("cuda:0"))
    there = {name: OnDevice(value) for name, value in batch.items()}
    with torch.no_grad(), pretended(monkeypatch) as seen, attach(model, method, HALVES):
        got = model.generate(**there, **GREEDY, max_new_tokens=3)
    assert torch.equal(got.there, want)
    assert not seen.mixed, seen.mixed


def test_an_operation_on_two_devices_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended(monkeypatch) as seen:
        one, other = OnDevice(torch.ones(2)), OnDevice(torch.ones(2), SECOND)
        assert torch.add(other, other).device == SECOND and other.to("cuda:0").device.index == 0
        assert not seen.mixed
        torch.add(one, other)
        assert len(seen.mixed) == 1


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements that an operation made anew, as against a view."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        for made in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, made.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("place", [True, False], ids=["one place", "places"])
def test_grouped_query_ranking_copies_no_keys(place: bool) -> None:
    """Nothing as large as the keys in the cache is made: they are neither repeated for a group's heads nor copied."""
    model = fresh("qwen2_5_vl", "sdpa", torch.float32).eval()
    layer, width = model.get_decoder().layers[2], 300
    heads, size = model.get_decoder().config.num_key_value_heads, layer.self_attn.head_dim
    assert model.get_decoder().config.num_attention_heads > heads
    hidden, keys = torch.randn(1, width, 32), torch.randn(1, heads, width, size)
    rotary = (torch.randn(1, width, size), torch.randn(1, width, size))
    valid = torch.ones(1, width, dtype=torch.bool)
    asking: torch.Tensor | None = None
    most: int | range = range(width - 1, width)
    if not place:
        asking, most = torch.arange(width)[None] == width - 1, 1
    with Largest() as seen:
        rows = attention_rows(layer, hidden, rotary, valid, asking, most, keys)
    assert rows.probabilities.shape == (1, 4, 1, width)
    assert 4 * width <= seen.most < keys.numel()
    with Largest() as seen:
        keys.repeat_interleave(2, 1)
    assert seen.most == 2 * keys.numel(), "a copy would have been seen"
