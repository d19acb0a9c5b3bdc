"""How much an evaluation costs in addition to the model, as ratios of interleaved runs.

    make bench-evaluation      (about 10 CPU minutes; python -m benchmarks.bench_evaluation idle: one part alone)

    command     the whole command, one question at once / `python -m lmms_eval` with its own wrapper (llava_hf), the
                same model, tasks and questions: CPU seconds of the processes
    answering   eight questions at once in this process / that wrapper, which takes one: CPU seconds, models and tasks
                loaded
    sweep       a part of the demo's sweep / the same by another checkout of pdrop (--before FOLDER; without one this
                part is left out), whose scores must be equal: CPU seconds of the processes
    idle        a device that takes 25 ms per question, simulated by a sleep, fed with JPEG pictures of 640 x 480 in
                CLIP's processing at 336 pixels: wall time / what the device takes. With and without prefetch; each
                picture asked about once, and 18 times (as POPE's)

CPU seconds are the better number on a machine that others use, too; `idle` is wall time, and means nothing on a machine
whose cores are all in use. lmms-eval's wrappers import `decord`, for videos; if it is not installed, an empty module
replaces it. The record is written to results/bench/.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.records import Session

MODEL = Path(__file__).resolve().parents[1] / "pdrop" / "embedded" / "model"
TASKS_FOLDER = MODEL.parent / "tasks"
TASKS = ("embedded_existence", "embedded_counting", "embedded_document")
SWEEP = ("-m", "experiments=demo", "method=none,pyramiddrop,fastv", "ratio=0.5")
DEVICE_S = 0.025  # seconds of the simulated device per question
BATCH = 8
WANTED = {"command": 0.7, "answering": 0.4, "sweep": 1 / 1.2, "idle": 1.1}  # at most


def stand_in(folder: Path) -> Path:
    """A folder with an empty `decord`, for PYTHONPATH."""
    (folder / "decord.py").write_text("VideoReader = cpu = None\n")
    return folder


def cpu_of(command: Sequence[str], cwd: Path, more: dict[str, str]) -> float:
    """CPU seconds of a command and its children.

    Raises:
        RuntimeError: If it fails; with its output.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(command, cwd=cwd, env={**os.environ, **more}, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_turns(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """The time of each side, round by round; every second round in the opposite order."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(sides[name]())
            print(f"  {name} {taken[name][-1]:.2f} s", flush=True)  # noqa: T201
    return taken


def ratio(taken: dict[str, list[float]], this: str, other: str) -> float:
    return median(taken[this]) / median(taken[other])


# ---------------------------------------------------------------------- against lmms-eval


def command(rounds: int, limit: int) -> dict[str, Any]:
    """Both whole commands, one question at a time."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        # the child imports pdrop from here, and `decord` where it is not installed
        paths = os.pathsep.join([str(MODEL.parents[2]), str(stand_in(place))])
        more = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        asked = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1", "--limit", str(limit)]
        asked += ["--model_args", f"pretrained={MODEL},device_map=cpu,dtype=float32", "--device", "cpu"]
        asked += ["--tasks", ",".join(TASKS), "--include_path", str(TASKS_FOLDER)]
        ours = [sys.executable, str(MODEL.parents[2] / "run.py"), "method=none", "latency=off", "batch_size=1"]
        ours += [f"tasks=[{','.join(TASKS)}]", f"limit={limit}", "device=cpu", "protocol=lmms_eval", "force=true"]
        ours += [f"results={place}/results", f"hydra.run.dir={place}/hydra"]
        taken = in_turns(
            rounds,
            lmms_eval=lambda: cpu_of(asked, place, more),
            pdrop=lambda: cpu_of(ours, place, more),
        )
    return {"cpu_s": taken, "ratio": ratio(taken, "pdrop", "lmms_eval"), "questions": limit * len(TASKS)}


def answering(rounds: int, limit: int) -> dict[str, Any]:
    """The same questions answered by both in this process, with loaded models."""
    said: dict[str, list[str]] = {}
    taken = in_turns(rounds, lmms_eval=by_wrapper(limit, said), pdrop=by_generator(limit, said))
    equal = sum(one == other for one, other in zip(said["pdrop"], said["lmms_eval"], strict=True))
    return {
        "cpu_s": taken,
        "ratio": ratio(taken, "pdrop", "lmms_eval"),
        "questions": len(said["pdrop"]),
        "equal_answers": equal,
    }


def by_generator(limit: int, said: dict[str, list[str]]) -> Callable[[], float]:
    """Ask and score as a run does; puts the answers into `said`, and returns CPU seconds."""
    from pdrop.cli.compose import settings
    from pdrop.evaluation.generation import Generator
    from pdrop.evaluation.lmms import load_tasks, score

    dials = {"tasks": list(TASKS), "method": "none", "latency": "off", "device": "cpu", "limit": limit}
    found = settings(dials | {"batch_size": BATCH, "protocol": "lmms_eval"})
    checkpoint = found.load()

    def side() -> float:
        generator = Generator(checkpoint, found.method, found.schedule, found.spec, found.preparation)
        emptied(generator)
        tasks = load_tasks(found.spec.tasks)
        started = time.process_time()
        said["pdrop"] = []
        for task in tasks.values():
            with tempfile.TemporaryDirectory() as folder:
                output = score(
                    task,
                    lambda questions: generator.answer(questions).answers,
                    rows=list(range(limit)),
                    seed=0,
                    folder=Path(folder),
                )
            said["pdrop"] += answers_of(output)
        return time.process_time() - started

    return side


def by_wrapper(limit: int, said: dict[str, list[str]]) -> Callable[[], float]:
    """Ask and score as lmms-eval does with its own model; puts the answers into `said`, and returns CPU seconds."""
    from pdrop.evaluation.lmms import import_lmms_eval

    sys.modules.setdefault("decord", types.ModuleType("decord"))
    for name in ("VideoReader", "cpu"):
        if not hasattr(sys.modules["decord"], name):
            setattr(sys.modules["decord"], name, None)
    evaluator = import_lmms_eval()
    from lmms_eval.models.chat.llava_hf import LlavaHf

    model = LlavaHf(pretrained=str(MODEL), device="cpu", device_map="cpu", dtype="float32")
    model.clean = lambda: None  # lmms-eval would delete the weights after a call
    options = {"process_with_media": False, "reasoning_tags": None, "agentic_trace_mode": "basic"}

    def side() -> float:
        manager = evaluator.TaskManager(include_defaults=False, include_path=[str(TASKS_FOLDER)], model_name="llava_hf")
        tasks = [evaluator.get_task_dict([name], manager, "chat") for name in TASKS]
        started = time.process_time()
        said["lmms_eval"] = []
        for task in tasks:
            with tempfile.TemporaryDirectory() as folder, quiet():
                output = evaluator.simple_evaluate(
                    model=model,
                    tasks=list(task.values()),
                    task_manager=object(),
                    bootstrap_iters=0,
                    log_samples=True,
                    limit=limit,
                    verbosity="WARNING",
                    cli_args=types.SimpleNamespace(**options, output_path=folder),
                )
            said["lmms_eval"] += answers_of(output)
        return time.process_time() - started

    return side


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without lmms-eval's progress bars and log lines."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def emptied(generator: Any) -> None:
    """A generator whose picture cache holds nothing from the round before."""
    limit = generator.cache.limit
    generator.cache.resize(0)
    generator.cache.resize(limit)


def answers_of(output: dict[str, Any]) -> list[str]:
    """A task's answers in the order of its documents."""
    (samples,) = output["samples"].values()
    return [str(sample["filtered_resps"][0]).strip() for sample in sorted(samples, key=lambda one: one["doc_id"])]


# ---------------------------------------------------------------------- against another checkout


def sweep(rounds: int, before: Path, limit: int) -> dict[str, Any]:
    """A part of the demo's sweep by this checkout and by another; all scores must be equal.

    Raises:
        RuntimeError: If they are not.
    """
    scores: dict[str, dict[str, float]] = {}

    def side(name: str, root: Path) -> float:
        with tempfile.TemporaryDirectory() as place:
            dials = [
                *SWEEP,
                f"limit={limit}",
                "device=cpu",
                f"results={place}/results",
                f"hydra.sweep.dir={place}/hydra",
            ]
            more = {"PYTHONPATH": str(root), "PDROP_CACHE": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
            seconds = cpu_of([sys.executable, str(root / "run.py"), *dials], root, more)
            scores[name] = scores_of(Path(place) / "results")
        return seconds

    taken = in_turns(rounds, before=lambda: side("before", before), now=lambda: side("now", MODEL.parents[2]))
    if scores["now"] != scores["before"]:
        raise RuntimeError("the two checkouts' scores differ")
    return {"cpu_s": taken, "ratio": ratio(taken, "now", "before"), "scores": len(scores["now"])}


def scores_of(store: Path) -> dict[str, float]:
    """Every score of a store's records."""
    found: dict[str, float] = {}
    for path in sorted(store.glob("runs/*/record.json")):
        record = json.loads(path.read_text(encoding="utf8"))
        run = f"{record['spec']['method']} {record['spec']['schedule']}"
        for task, result in record["results"].items():
            found |= {f"{run} {task} {name}": score["value"] for name, score in result["scores"].items()}
    return found


# ---------------------------------------------------------------------- a device that sleeps


def idle(rounds: int, questions: int) -> dict[str, Any]:
    """Wall time / the device's own, for each way to feed it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from pdrop.cli.compose import settings
    from pdrop.evaluation.answers import Answer
    from pdrop.evaluation.generation import Generator, Prepared
    from pdrop.evaluation.prefetch import DEPTH, Preparation

    class Sleeping(Generator):
        """A device that takes this long per question, while the processor is free."""

        def ask(self, part: Prepared, trace: Any) -> list[Answer]:
            time.sleep(DEVICE_S * len(part.questions))
            return [Answer(prompt, "", 1, 1, 1, [1], ["1"]) for prompt in part.prompts]

    found = settings({"method": "none", "latency": "off", "device": "cpu", "batch_size": BATCH, "tasks": list(TASKS)})
    checkpoint = copy.copy(found.load())
    checkpoint.processor = copy.copy(checkpoint.processor)
    checkpoint.processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    spec = replace(found.spec, max_new_tokens=1)

    def side(depth: int, repeats: int, gib: float) -> float:
        asked = photographed(questions, repeats)
        generator = Sleeping(checkpoint, None, found.schedule, spec, Preparation(depth, gib))
        emptied(generator)
        started = time.perf_counter()
        generator.answer(asked)
        return time.perf_counter() - started

    taken = in_turns(
        rounds,
        serial=lambda: side(0, 1, 0.0),
        prefetch=lambda: side(DEPTH, 1, 2.0),
        serial_of_18=lambda: side(0, 18, 2.0),
        prefetch_of_18=lambda: side(DEPTH, 18, 2.0),
    )
    device = DEVICE_S * questions
    ratios = {name: median(values) / device for name, values in taken.items()}
    return {"wall_s": taken, "device_s": device, "ratios": ratios, "ratio": ratios["prefetch"], "questions": questions}


def photographed(number: int, repeats: int) -> list[Any]:
    """Questions about JPEG pictures of 640 x 480, this many per picture."""
    from pdrop.evaluation.requests import DocumentPictures

    files = []
    for seed in range(-(-number // repeats)):
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480))
        noise = Image.fromarray(draw.integers(0, 256, (480, 640, 3), dtype=np.uint8))
        file = io.BytesIO()
        Image.blend(coarse, noise, 0.1).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return [asked_about(n, files[n // repeats], DocumentPictures) for n in range(number)]


def asked_about(number: int, file: bytes, pictures: Any) -> Any:
    """A question about the picture in a file."""
    from pdrop.evaluation.answers import Question

    def document() -> dict[str, Any]:
        image = Image.open(io.BytesIO(file))
        image.load()
        return {"image": image}

    def visual(found: dict[str, Any]) -> list[Any]:
        return [found["image"].convert("RGB")]

    def blank() -> dict[str, Any]:
        return {"image": Image.new("RGB", Image.open(io.BytesIO(file)).size)}

    text = f"Is there a {'red ' * (number % 7)}dog in the image?"
    return Question("t", number, 0, text, pictures(visual, document, blank, f"t {number}"), {}, None, str(number))


# ---------------------------------------------------------------------- the program


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*WANTED, []], help="which; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=24, help="questions per task, of command and answering")
    parser.add_argument("--before", type=Path, help="another checkout of pdrop, for sweep")
    parser.add_argument("--sweep-limit", type=int, default=100, help="questions per task, of sweep")
    parser.add_argument("--questions", type=int, default=360, help="of idle")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    given = parser.parse_args(arguments)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "command": lambda: command(given.rounds, given.limit),
        "answering": lambda: answering(given.rounds, given.limit),
        "sweep": lambda: sweep(given.rounds, given.before.resolve(), given.sweep_limit),
        "idle": lambda: idle(given.rounds, given.questions),
    }
    wanted = given.parts or [name for name in parts if name != "sweep" or given.before is not None]
    if "sweep" in wanted and given.before is None:
        parser.error("sweep: say which other checkout, --before FOLDER")
    session, found = Session(), dict[str, Any]()
    for name in wanted:
        print(f"== {name}", flush=True)  # noqa: T201
        found[name] = parts[name]()
        verdict = "" if found[name]["ratio"] <= WANTED[name] else "  MORE THAN WANTED"
        print(f"== {name}: x{found[name]['ratio']:.3f}, wanted at most {WANTED[name]:.2f}{verdict}", flush=True)  # noqa: T201
    print(session.said(session.publish(given.out, "evaluation", {"wanted": WANTED, "parts": found})))  # noqa: T201
    return int(any(found[name]["ratio"] > WANTED[name] for name in found))


if __name__ == "__main__":
    sys.exit(main())
