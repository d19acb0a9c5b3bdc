"""Several threads on one attached model: each forward has a state of its own, and none outlives the block.

pytest tests/engine/test_threads.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from pdrop import FastV, PyramidDrop, RandomDrop, attach
from pdrop.conformance.families import fresh
from tests.support.cases import GREEDY, HALVES, batch_of, kept_of, picture

PROMPTS = (((3, 5),), ((2, 4, 6), (6, 2)), ((7,), (3, 9)), ((12, 3),))
STEPS = 6


def answer(model: Any, batch: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        options = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": GREEDY["suppress_tokens"]}
        return model.generate(**batch, **options | more)


def in_step(threads: int) -> Callable[..., None]:
    """A hook in which the threads wait for each other, so that their forwards run into each other layer by layer."""
    barrier = threading.Barrier(threads)

    def meet(*_: Any) -> None:
        barrier.wait(timeout=60)

    return meet


@pytest.mark.parametrize(
    "method", [PyramidDrop(), FastV(several=True), RandomDrop()], ids=lambda method: type(method).__name__
)
def test_four_threads_get_the_answers_of_one(method: Any) -> None:
    """Each meets the others before every third layer of every forward; traces and names are each thread's own."""
    model = fresh("llava")
    batches = [batch_of("llava", model, rows) for rows in PROMPTS]
    names = [[f"{number}-{row}" for row in range(len(rows))] for number, rows in enumerate(PROMPTS)]
    with attach(model, method, HALVES) as trace:
        wanted = []
        for batch, samples in zip(batches, names):
            trace.samples = samples
            wanted.append((answer(model, batch), kept_of(trace), trace.tokens))
        trace.samples = None
        for layer in model.get_decoder().layers[::3]:
            layer.register_forward_pre_hook(in_step(len(batches)))

        def work(number: int) -> Any:
            trace.samples = names[number]
            return answer(model, batches[number]), kept_of(trace), trace.tokens

        with ThreadPoolExecutor(len(batches)) as pool:
            got = list(pool.map(work, range(len(batches))))
        assert trace.samples is None and trace.prefills == 2 * len(batches)
    for (tokens, kept, entering), (want, kept_before, entering_before) in zip(got, wanted):
        assert torch.equal(tokens, want)
        assert (kept, entering) == (kept_before, entering_before)


def test_a_streamers_thread_is_read_in_the_thread_that_attached() -> None:
    model = fresh("llava")
    batch = batch_of("llava", model, PROMPTS[0])
    with attach(model, PyramidDrop(), HALVES) as trace:
        answer(model, batch_of("llava", model, PROMPTS[1]))
        worker = threading.Thread(target=answer, args=(model, batch))
        worker.start()
        worker.join()
        assert trace.visual == [16] and trace.prefills == 2


class Pausing(BaseStreamer):
    """Stops `generate` until it may go on: before its first forward, where the prompt is put, or later."""

    def __init__(self, at: int) -> None:
        self.at, self.put_so_far, self.paused, self.go_on = at, 0, threading.Event(), threading.Event()

    def put(self, value: Any) -> None:
        self.put_so_far += 1
        if self.put_so_far == self.at:
            self.paused.set()
            assert self.go_on.wait(timeout=60)

    def end(self) -> None:
        """Nothing."""


@pytest.mark.parametrize(("at", "use_cache"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("again", [False, True], ids=["unattached", "attached-anew"])
def test_a_generation_that_outlives_the_block_is_refused(at: int, use_cache: bool, again: bool) -> None:
    """Its next forward raises; other threads are not concerned, and then nothing is left on the model."""
    model = fresh("llava")
    batch, streamer = batch_of("llava", model, PROMPTS[0]), Pausing(at)
    want, before = answer(model, batch), picture(model)
    with ThreadPoolExecutor(1) as pool:
        with attach(model, PyramidDrop(), HALVES):
            dropped = answer(model, batch)
            late = pool.submit(answer, model, batch, streamer=streamer, use_cache=use_cache)
            assert streamer.paused.wait(timeout=60)
        if again:
            with attach(model, PyramidDrop(), HALVES):
                assert torch.equal(answer(model, batch), dropped)
                streamer.go_on.set()
                with pytest.raises(RuntimeError, match=r"PyramidDrop.*has ended.*join the thread"):
                    late.result(timeout=60)
        else:
            assert torch.equal(answer(model, batch), want)
            streamer.go_on.set()
            with pytest.raises(RuntimeError, match=r"PyramidDrop.*has ended.*join the thread"):
                late.result(timeout=60)
        assert torch.equal(pool.submit(answer, model, batch).result(timeout=60), want), "the same thread, a new call"
    assert picture(model) == before


def test_a_block_waits_for_the_forward_that_runs() -> None:
    model = fresh("llava")
    batch = batch_of("llava", model, PROMPTS[0])
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(timeout=60)

    model.get_decoder().layers[4].register_forward_pre_hook(hold)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool, attach(model, PyramidDrop(), HALVES) as trace:
        want = model(**batch).logits
        forward = pool.submit(torch.no_grad()(lambda: model(**batch).logits))
        assert inside.wait(timeout=60)
        threading.Timer(0.2, go_on.set).start()
    assert torch.equal(forward.result(timeout=60), want)
    assert trace.prefills == 2


def test_two_threads_attach_one_after_the_other_only() -> None:
    model = fresh("llava")
    start, results = threading.Barrier(4), []

    def work() -> None:
        attachment = attach(model, PyramidDrop(), HALVES)
        start.wait(timeout=60)
        try:
            with attachment:
                start.wait(timeout=60)
            results.append("attached")
        except RuntimeError as error:
            results.append(str(error))
            start.wait(timeout=60)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("attached") == 1 and sum("attached to this model already" in one for one in results) == 3
