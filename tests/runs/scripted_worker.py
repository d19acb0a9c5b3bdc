"""A worker without a model, which does what its questions say; as a program, a command that has two of them."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

from pdrop.evaluation.answers import Answer, Question, QuestionError


class Scripted:
    def __init__(self, threads: int) -> None:
        self.busy_until = 0.0

    def about(self) -> dict[str, Any]:
        return {"host": platform.node(), "pid": os.getpid(), "device": None}

    def answer(self, settings: Any, questions: list[Question]) -> list[Answer]:
        for question in questions:
            if question.text == "broken":
                raise QuestionError(f"task {question.task}, doc_id {question.doc_id}: its picture is broken")
            if question.text.startswith("slow"):
                time.sleep(float(question.text.partition(" ")[2]))
                self.busy_until = time.time()
        return [Answer("", str(one.doc_id), 1, 1, 1, [1], ["1"]) for one in questions]

    def rest(self) -> None:
        """One call after the other: there is nothing under way."""

    def timed(self, settings: Any, cost: Any) -> float:
        return time.time()

    def was_busy_until(self) -> float:
        return self.busy_until


def asked(*texts: str) -> list[Question]:
    return [Question("t", number, 0, text, lambda: []) for number, text in enumerate(texts)]


def main() -> None:
    from pdrop.cli.compose import settings
    from pdrop.runs.worker_dials import Workers
    from pdrop.runs.workers import Team, TeamGenerator

    plain = settings({"tasks": ["embedded_counting"], "batch_size": 2, "latency": "off", "device": "cpu", "workers": 2})
    team = Team(Workers(2), "cpu", Scripted)
    while team.starting:
        team.wait()
    print(*(member.about["pid"] for member in team.members if member.about), flush=True)
    TeamGenerator(plain, team).answer(asked(*["slow 0.1"] * 100_000))


if __name__ == "__main__":
    sys.exit(main())
