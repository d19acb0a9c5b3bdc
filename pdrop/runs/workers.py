"""Many devices: a run's batches are answered by workers, each a process with its own device and model.

    python run.py -m workers=8 ratio=0.3,0.5,0.7          one node
    python run.py -m workers=16 workers.address=auto ...  a Ray cluster

Batches are made from the questions alone, so it does not matter which worker answers one: scores, samples and answers
are identical with any number of workers on devices of one kind. This process makes and distributes the batches, stores
answers as they arrive and scores them; workers load the task's pictures themselves (pdrop/runs/worker.py). They stay
for the whole sweep, and load a model once.

If a worker dies, its batches are given to others, and it is replaced. A batch on which three workers died fails the
run. An exception in a batch (out of memory, a broken picture) fails the run as it does in one process; there is no
fallback.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pdrop.runs.cluster import arrival, line_of, refuse_other_code, started_ray
from pdrop.runs.fleet import Fleet

if TYPE_CHECKING:
    from pdrop.evaluation.answers import Answer, AnswerStore, Question, QuestionError
    from pdrop.evaluation.generation import Answered
    from pdrop.evaluation.progress import Progress
    from pdrop.record import Cost
    from pdrop.runs.settings import Settings
    from pdrop.runs.worker import Loaded
    from pdrop.runs.worker_dials import Workers

log = logging.getLogger("pdrop")

DEATHS = 3  # worker deaths, on one batch or while loading, that fail a run
AHEAD = 2  # least number of batches queued at a worker, so that it never waits for this process
SILENCE = 60.0  # s without an answer or a new worker, after which a message says what is waited for


@dataclass(eq=False)
class Member:
    """One worker, as this process sees it."""

    number: int
    actor: Any
    about: dict[str, Any] | None = None  # host, process, device, once it is ready
    replaces: bool = False  # a dead worker, whose resources are free
    arrived: float = 0.0  # when it became ready, by the monotonic clock
    in_flight: deque[int] = field(default_factory=deque)  # batches, the one being answered first


class Team:
    """The workers of this process; made by `team`, and kept until it ends.

    Args:
        workers: How many, and the resources of each.
        device: The device that they use.
        kind: The class of each; None: pdrop.runs.worker.Worker. Tests of the distribution use another.
        depth: Batches that each prepares ahead while it answers another.
    """

    def __init__(self, workers: Workers, device: str, kind: type | None = None, depth: int = 0) -> None:
        import ray

        from pdrop.runs.worker import Worker

        self.workers, self.device, self.kind, self.started = workers, device, kind or Worker, 0
        self.depth, self.at_hand = depth, max(AHEAD, depth + 1)
        self.members: list[Member] = []
        self.starting: dict[Any, Member] = {}  # by the reference that resolves when the worker is ready
        self.early_deaths = 0  # in a row, before a worker was ready
        self.dashboard: str | None = None  # host:port, if Ray has one
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        self.owns_ray = not ray.is_initialized()  # otherwise it is the caller's
        if self.owns_ray:
            found = started_ray(workers)
            self.dashboard = getattr(found, "dashboard_url", None) or None
            if self.dashboard is not None:
                log.info("workers       Ray's dashboard: http://%s", self.dashboard)
        for _ in range(workers.count):
            self.hire()

    def close(self) -> None:
        """Kill the workers; shut Ray down if this team started it."""
        import ray

        for member in [*self.members, *self.starting.values()]:
            ray.kill(member.actor)
        if self.owns_ray:
            ray.shutdown()

    def hire(self, replacing: bool = False) -> None:
        """Start a worker; it becomes ready when resources are free, such as those of a dead worker."""
        import ray

        share, threads = self.workers.share(self.device), self.workers.threads
        # Ray restarts no worker and repeats no call by itself: that is decided here
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": share, "max_restarts": 0, "max_task_retries": 0}
        made: Any = ray.remote(self.kind).options(max_concurrency=self.depth + 1, **options)
        member = Member(self.started, made.remote(threads), replaces=replacing)
        self.started += 1
        self.starting[member.actor.__ray_call__.remote(arrival, self.device, self.workers.address)] = member

    def arrive(self, reference: Any) -> None:
        """Handle a worker that has become ready, or has died before.

        Raises:
            RuntimeError: If three in a row have died, or it has other code.
        """
        import ray

        member = self.starting.pop(reference)
        try:
            member.about, made_of = ray.get(reference)
        except ray.exceptions.RayError as error:
            self.early_deaths += 1
            self.hire(member.replaces)
            if self.early_deaths >= DEATHS:  # a sweep's next run finds those that start, and may fare better
                raise RuntimeError(
                    f"{DEATHS} workers in a row died before they were ready: {line_of(error)}"
                ) from error
            log.warning("worker %d died before it was ready (%s); another one starts", member.number, line_of(error))
            return
        self.early_deaths = 0
        if made_of is not None:
            try:
                refuse_other_code(member.about["host"], made_of)
            except RuntimeError:
                ray.kill(member.actor)
                self.hire(member.replaces)
                raise
        self.members.append(member)
        member.arrived, about = time.monotonic(), member.about
        log.debug("worker %d is process %s on %s (%s)", member.number, about["pid"], about["host"], about["device"])

    def lose(self, member: Member, error: BaseException) -> None:
        """Replace a worker that died."""
        log.warning("worker %d died (%s); its batches are asked again", member.number, line_of(error))
        self.members.remove(member)
        self.hire(replacing=True)

    def wait(self, references: Sequence[Any] = ()) -> list[Any]:
        """The references that are resolved, after waiting for at least one or for a starting worker, which is
        handled."""
        import ray

        while True:
            asked = [*references, *self.starting]
            there, _ = ray.wait(asked, num_returns=1, timeout=SILENCE, fetch_local=False)
            if there:
                break
            log.info("workers       %d are there, %d wait for room", len(self.members), len(self.starting))
        for reference in [one for one in there if one in self.starting]:
            self.arrive(reference)
        return [one for one in there if one in set(references)]

    def rest(self) -> None:
        """Wait until all workers are idle: batches of a failed run have ended, and replacements are ready."""
        import ray

        for member in list(self.members):
            try:
                ray.get(member.actor.rest.remote())  # runs after everything that was given to it before
            except ray.exceptions.RayError as error:
                self.lose(member, error)
        while any(member.replaces for member in self.starting.values()):
            self.wait()

    def one(self) -> Member:
        """A worker that is ready; waits for the first."""
        while not self.members:
            self.wait()
        return self.members[0]


_TEAM: list[Team] = []  # the team of this process, once there is one


def team(workers: Workers, device: str, depth: int) -> Team:
    """The workers of this process, started at first use, and replaced if others are asked for."""
    if _TEAM and (_TEAM[0].workers, _TEAM[0].device, _TEAM[0].depth) == (workers, device, depth):
        return _TEAM[0]
    dismiss()
    _TEAM.append(Team(workers, device, depth=depth))
    return _TEAM[0]


def dismiss() -> None:
    """Stop the workers of this process, and Ray if it was started for them."""
    while _TEAM:
        _TEAM.pop().close()


class TeamGenerator:
    """Answers like pdrop.evaluation.generation.Generator, with the workers of a team.

    Args:
        settings: The run's.
        those: The team; None: this process's team for the settings.
    """

    def __init__(self, settings: Settings, those: Team | None = None) -> None:
        import ray

        depth = settings.preparation.depth(settings.device)
        self.team = those or team(settings.workers, settings.device, depth)
        self.spec, self.here, self.settings = settings.spec, settings, ray.put(settings)
        self.stderr = sys.stderr  # while a task's code runs, and asks for answers, it is redirected

    def planned(self, questions: Sequence[Question]) -> list[list[Question]]:
        """The batches, as this process would make them with a model of its own."""
        from pdrop.evaluation import batching
        from pdrop.evaluation.picture_cache import of_process
        from pdrop.evaluation.prompts import PromptBuilder

        method, cache = self.here.method, of_process(self.here.preparation.cache_bytes)
        builder = PromptBuilder.of(self.here.source.without_model(), self.spec)
        return batching.planned(questions, builder, self.spec, cache, 1.0 if method is None else method.pixels)

    def loaded(self) -> Loaded:
        """A worker's information about the model that it has loaded."""
        found: Loaded = self.call("loaded")
        return found

    def timed(self, cost: Cost) -> Cost:
        """The cost with its times, measured by one worker while the others are idle."""
        self.team.rest()
        found: Cost = self.call("timed", cost)
        return found

    def call(self, name: str, *arguments: Any) -> Any:
        """Call one worker; if it dies, another.

        Raises:
            BaseException: What the worker raised.
            RuntimeError: If three workers died.
        """
        import ray

        for attempt in range(1, DEATHS + 1):
            member = self.team.one()
            try:
                return ray.get(getattr(member.actor, name).remote(self.settings, *arguments))
            except ray.exceptions.RayTaskError as error:
                raise cause_of(error) from error
            except ray.exceptions.RayError as error:
                self.team.lose(member, error)
                if attempt == DEATHS:
                    raise RuntimeError(
                        f"{DEATHS} workers died while they loaded the model: {line_of(error)}"
                    ) from error
        raise AssertionError("unreachable")

    def answer(
        self, questions: Sequence[Question], store: AnswerStore | None = None, progress: Progress | None = None
    ) -> Answered:
        """Ask the questions whose answers are not in the store, storing every batch as it arrives.

        Raises:
            QuestionError: If a question fails; it names the task and the documents.
        """
        from pdrop.evaluation.generation import Answered

        answers: dict[str, Answer] = {q.key: store[q] for q in questions if store is not None and q in store}
        planned = self.planned(questions)
        known = [all(question.key in answers for question in batch) for batch in planned]
        work = Work(self, planned, [number for number, done in enumerate(known) if not done])
        done = sum(len(batch) for batch, found in zip(planned, known) if found)
        reused = len(answers)
        if progress is not None and done and planned:
            progress(planned[0][0].task, done, len(questions))
        task, folder = questions[0].task if questions else "", store.path.parent if store is not None else None
        with redirect_stderr(self.stderr), Fleet(self.team, task, done, len(questions), folder) as fleet:
            for number, found, member in work.results():
                batch = planned[number]
                if store is not None:
                    store.add(((q, a) for q, a in zip(batch, found) if q.key not in answers), member.about or {})
                for question, answer in zip(batch, found):
                    answers.setdefault(question.key, answer)
                done += len(batch)
                if progress is not None:
                    progress(batch[0].task, done, len(questions))
                fleet.answered(member, len(batch))
        return Answered([answers[question.key] for question in questions], len(questions) - reused, reused)


# a batch's number, its answers, and the worker that gave them
Part = tuple[int, list["Answer"], Member]


class Work:
    """The batches to be answered, distributed as workers have room.

    Args:
        generator: The generator of the run.
        planned: All batches of the questions.
        wanted: Numbers of the batches to ask, in order.
    """

    def __init__(self, generator: TeamGenerator, planned: Sequence[Sequence[Question]], wanted: Sequence[int]) -> None:
        self.generator, self.team, self.planned = generator, generator.team, planned
        self.waiting = deque(wanted)
        self.asked: dict[Any, tuple[Member, int]] = {}  # by the reference that resolves when the batch is answered
        self.deaths: dict[int, int] = defaultdict(int)
        self.suspects: set[int] = set()  # batches queued at a worker when it died: each is asked alone

    def results(self) -> Iterator[Part]:
        """The batches with their answers, as they arrive.

        Raises:
            QuestionError: If a batch could not be answered, or three workers died on it.
        """
        try:
            while self.waiting or self.asked:
                self.hand_out()
                for reference in self.team.wait([*self.asked]):
                    if (found := self.collect(reference)) is not None:
                        yield found
        finally:  # after a failure or an interrupt nothing is left running that a next run would wait for
            self.forget()

    def hand_out(self) -> None:
        """Give batches to the workers that have fewest, until each has enough queued."""
        while self.waiting and (free := [m for m in self.team.members if self.room(m)]):
            member, number = min(free, key=lambda m: len(m.in_flight)), self.waiting.popleft()
            plain = [replace(question, images=elsewhere) for question in self.planned[number]]
            reference = member.actor.answer.remote(self.generator.settings, plain)
            member.in_flight.append(number)
            self.asked[reference] = (member, number)

    def room(self, member: Member) -> bool:
        """Whether a worker can take the next batch; a suspect one is asked alone, to see if it kills the worker."""
        assert self.waiting
        if self.waiting[0] in self.suspects or self.suspects & set(member.in_flight):
            return not member.in_flight
        return len(member.in_flight) < self.team.at_hand

    def collect(self, reference: Any) -> Part | None:
        """A batch's answers; None if its worker died, and the batch is queued again."""
        import ray

        if reference not in self.asked:  # its worker has died on another batch
            return None
        member, number = self.asked[reference]
        try:
            answers: list[Answer] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from error
        except ray.exceptions.RayError as error:
            self.bury(member, error)
            return None
        del self.asked[reference]
        member.in_flight.remove(number)
        self.suspects.discard(number)
        return number, answers, member

    def bury(self, member: Member, error: BaseException) -> None:
        """Put the batches of a dead worker back first, each to be asked alone: one of them may have killed it.

        Raises:
            QuestionError: If three workers have died on a batch.
        """
        at_hand = list(member.in_flight)
        self.suspects.update(at_hand)
        self.deaths[at_hand[0]] += 1
        for reference in [one for one, (whose, _) in self.asked.items() if whose is member]:
            del self.asked[reference]
        member.in_flight.clear()
        self.waiting.extendleft(reversed(at_hand))
        self.team.lose(member, error)
        if self.deaths[at_hand[0]] >= DEATHS and len(at_hand) == 1:
            raise died_of(self.planned[at_hand[0]], error)

    def forget(self) -> None:
        """Cancel queued batches; running ones end in their workers and are ignored."""
        import ray

        for reference, (member, _) in self.asked.items():
            ray.cancel(reference)
            member.in_flight.clear()
        self.asked.clear()


def elsewhere() -> list[Any]:
    """Replaces a question's images, which its worker reads itself."""
    raise RuntimeError("a question that was sent to a worker has its images there")


def died_of(batch: Sequence[Question], error: BaseException) -> QuestionError:
    """The error of a batch on which workers die."""
    from pdrop.evaluation.answers import QuestionError

    documents = ", ".join(str(question.doc_id) for question in batch)
    return QuestionError(
        f"task {batch[0].task}, doc_id {documents}: {DEATHS} workers died of this batch ({line_of(error)}); "
        "where memory ran out, use a smaller batch_size or fewer workers"
    )


def cause_of(error: Any) -> BaseException:
    """What a worker raised."""
    cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    return cause
