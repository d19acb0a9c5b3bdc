"""A worker: one process with a device and a model, which answers batches that it is given (pdrop/runs/workers.py).

It loads the model and the tasks itself, once each, and reads the pictures of the documents whose numbers it gets. It
may be called in several threads, which prepare batches; one at a time uses the model.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pdrop.evaluation.prefetch import DEPTH

if TYPE_CHECKING:
    from pdrop.evaluation.answers import Answer, Question
    from pdrop.evaluation.generation import Generator
    from pdrop.record import Cost
    from pdrop.runs.settings import Settings
    from pdrop.shapes import ModelSizes


@dataclass(frozen=True)
class Loaded:
    """What the main process needs to know about a model that it has not loaded.

    Attributes:
        sizes: The sizes of its architecture.
        itemsize: Bytes of a number.
        machine: The device's name and the threads of a worker, as in a record's environment.
    """

    sizes: ModelSizes
    itemsize: int
    machine: dict[str, Any]


class Worker:
    """Made as a Ray actor, with a device of its own.

    Args:
        threads: Of the CPU.
    """

    def __init__(self, threads: int) -> None:
        # before torch is imported, so that it starts as many
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
        self._run: str | None = None
        self._generator: Generator | None = None
        self._tasks: dict[tuple[str, str | None], Any] = {}
        self._loading, self._answering = threading.Lock(), threading.Lock()
        self._preparing = threading.Semaphore(DEPTH)
        self._asked, self._rests = 0, threading.Condition()  # batches under way

    def rest(self) -> None:
        """Return when no batch is in progress."""
        with self._rests:
            self._rests.wait_for(lambda: not self._asked)

    def about(self) -> dict[str, Any]:
        """Its host, process and device, once it is ready."""
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {"host": platform.node(), "pid": os.getpid(), "device": device}

    def loaded(self, settings: Settings) -> Loaded:
        """The sizes of the run's model, which is loaded if necessary."""
        from pdrop.environment import accelerator
        from pdrop.shapes import ModelSizes

        with self._loading, self._answering:
            checkpoint = local(settings).load()
            sizes = ModelSizes.from_config(checkpoint.model.config)
            return Loaded(sizes, checkpoint.model.dtype.itemsize, accelerator(local(settings).device))

    def answer(self, settings: Settings, questions: Sequence[Question]) -> list[Answer]:
        """The answers of a batch, in its order.

        Args:
            settings: The run's.
            questions: Without images.

        Raises:
            QuestionError: If a question fails.
        """
        with self._under_way():
            with self._loading:
                generator = self._under(local(settings))
                here = [self._with_images(settings, one) for one in questions]
            with self._preparing:
                parts = generator.prepare(here)
            answers: dict[str, Answer] = {}
            with self._answering, generator.attached() as trace:
                for part in parts:
                    answers |= zip((question.key for question in part.questions), generator.ask(part, trace))
            return [answers[question.key] for question in questions]

    def timed(self, settings: Settings, cost: Cost) -> Cost:
        """The cost with this worker's measurements under the run's timing protocol."""
        from pdrop.runs import timed

        here = local(settings)
        with ExitStack() as alone:  # nothing else may run here, not even the rest of a failed run
            alone.enter_context(self._loading)
            for _ in range(DEPTH):
                alone.enter_context(self._preparing)
            alone.enter_context(self._answering)
            if here.timed_alone:
                self._generator = self._run = None  # frees its model on the device; loaded again when needed
                timed.time_run(cost, here, None, timed.in_fresh_processes(here))
            else:
                timed.time_run(cost, here, here.load())
        return cost

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        with self._rests:
            self._asked += 1
        try:
            yield
        finally:
            with self._rests:
                self._asked -= 1
                self._rests.notify_all()

    def _under(self, settings: Settings) -> Generator:
        from pdrop.evaluation.generation import Generator

        if self._run != settings.spec.run_id or self._generator is None:
            self._generator = None  # another model is loaded when this one has left the device
            checkpoint = settings.load()
            self._generator = Generator(
                checkpoint, settings.method, settings.schedule, settings.spec, settings.preparation
            )
            self._run = settings.spec.run_id
        return self._generator

    def _with_images(self, settings: Settings, question: Question) -> Question:
        from pdrop.evaluation.batching import blame
        from pdrop.evaluation.lmms import load_tasks
        from pdrop.evaluation.requests import DocumentPictures

        spec, name = settings.spec, question.task
        place = name, spec.wrapper
        with blame([question]):
            if place not in self._tasks:
                self._tasks[place] = load_tasks([name], settings.task_folders, spec.wrapper)[name]
            pictures = DocumentPictures.of(self._tasks[place], question.doc_id, name, question.data)
        return replace(question, images=pictures)


def local(settings: Settings) -> Settings:
    """The settings for this process: Ray shows each worker its own device as the first."""
    return replace(settings, device="cuda") if settings.device.startswith("cuda") else settings
