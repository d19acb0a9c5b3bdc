"""What is timed in a run, and where: in this process, or in fresh ones that hold nothing else.

A sweep's process has warm caches, leftovers on the device and threads of libraries; `latency=full` therefore measures
each cell in processes of its own. What such a process needs goes to it as JSON, and what it found comes back as JSON;
the model is built there again.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdrop import architectures
from pdrop.inputs import known_prompt, load, one_image
from pdrop.record import Cost, Interval
from pdrop.schedule import Schedule
from pdrop.settings import Settings
from pdrop.shapes import PromptSize

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint
    from pdrop.methods.base import Method

log = logging.getLogger("pdrop")

QUESTION = "What is shown in this picture, and where in it? Answer with a single word or phrase."
NOISE_SIDE = 336  # pixels of the square picture that is timed, where the model's prompt does not say its size


def timing_inputs(checkpoint: Checkpoint, settings: Settings) -> Any:
    """What is timed, the same in every run: the model's prompt of noise pictures and a question, `batch_size` times."""
    if (make := preprocessing(checkpoint, settings)) is not None:
        inputs = make()
    else:
        prompt = one_image(settings)
        assert prompt is not None  # only shipped architectures come without a processor
        config = checkpoint.model.config
        inputs = architectures.noise_prompt(config, prompt, batch=settings.batch_size, images=settings.latency.images)
    device, dtype = checkpoint.model.device, checkpoint.model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def preprocessing(checkpoint: Checkpoint, settings: Settings) -> Callable[[], Any] | None:
    """Makes the timed inputs from pictures and text; None where there is no processor."""
    if checkpoint.processor is None:
        return None
    import numpy as np
    from PIL import Image

    from pdrop.scoring.prompts import Prompter

    images = settings.latency.images
    known = one_image(settings)
    size = (NOISE_SIDE, NOISE_SIDE) if known is None else picture_size(known, checkpoint.model.config)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    prompter = Prompter(checkpoint.processor, settings.prompt, settings.image_mode)  # type: ignore[arg-type]

    def encode(question: str, prompts: int) -> Any:
        pictures = [[Image.fromarray(pixels)] * images] * prompts
        return prompter.encode([prompter.render(question, images)] * prompts, pictures)

    def tokens(question: str) -> int:
        return round(timed_size(encode(question, 1), checkpoint.model.config).text)

    question = QUESTION if known is None else question_of(known.text, tokens)
    return functools.partial(encode, question, settings.batch_size)


def picture_size(prompt: PromptSize, config: Any) -> tuple[int, int]:
    """Height and width in pixels of a picture that makes the prompt's visual tokens."""
    if prompt.picture is not None:
        return prompt.picture
    if isinstance(prompt.images, int) or not prompt.images:
        return NOISE_SIDE, NOISE_SIDE  # scaled by the processor to what the tower takes
    _, height, width = prompt.images[0]
    patch = config.vision_config.patch_size
    return height * patch, width * patch


def question_of(text: float, tokens: Callable[[str], int]) -> str:
    """A question that makes a prompt of so many tokens of text: words of QUESTION, filled up with a short one.

    Args:
        text: Tokens of text in the whole prompt.
        tokens: How many a question makes.

    Returns:
        The longest that makes at most so many; one word where the template alone makes more.
    """
    question = ""
    for words in (QUESTION.split(), ["is"]):
        longer = [" ".join([question, *itertools.islice(itertools.cycle(words), n)]) for n in range(round(text) + 1)]
        question = longer[max(0, bisect.bisect_right(longer, text, key=tokens) - 1)].strip()
    return question or QUESTION.split()[0]


def timed_size(inputs: Any, config: Any) -> PromptSize:
    """Text and visual tokens of the first of the timed prompts."""
    ids = inputs["input_ids"][0]
    visual = int((ids == config.image_token_id).sum())
    return PromptSize(len(ids) - visual, visual)


def model_prompt(
    checkpoint: Checkpoint, inputs: Any, method: Method | None, schedule: Schedule, settings: Settings
) -> PromptSize:
    """Where nothing is scored: the model's prompt as the schedule leaves it.

    Where only a forward knows its size, or how many tokens stay, it is the timed prompt as one forward sees it.
    """
    known = known_prompt(settings)
    if known is None or any(stage.adaptive for stage in schedule):
        return one_prompt(checkpoint, inputs, method, schedule, settings.latency.images)
    layers = checkpoint.model.config.get_text_config(decoder=True).num_hidden_layers
    return known.under(method, schedule, layers)


def one_prompt(
    checkpoint: Checkpoint, inputs: Any, method: Method | None, schedule: Schedule, images: int
) -> PromptSize:
    """The tokens of the timed prompt, seen in one forward."""
    import torch

    from pdrop import attach
    from pdrop.scoring.crops import seen

    with (
        torch.inference_mode(),
        attach(checkpoint.model, method, schedule, tokenizer=checkpoint.processor.tokenizer) as trace,
    ):
        checkpoint.model(**inputs, use_cache=True, logits_to_keep=1)
    visual, rows = trace.visual[0], len(trace.visual)
    crops = seen(inputs, [images] * rows, trace.visual)[0]
    entering = [row[0] for row in trace.visual_tokens]
    return PromptSize(trace.tokens[0][0] - entering[0], visual, tuple(entering), crops)  # type: ignore[arg-type]


def time_cell(
    cost: Cost, settings: Settings, method: Method, schedule: Schedule, checkpoint: Checkpoint, inputs: Any
) -> None:
    """Time a cell under its protocol; fills in the times of `cost`."""
    from pdrop import latency
    from pdrop.measure import measure

    protocol = settings.latency
    if protocol.fresh:
        with off_the_device(checkpoint.model):
            cost.timing = in_fresh_processes(settings, method, schedule)
    elif protocol.new_tokens or protocol.memory:
        make = preprocessing(checkpoint, settings)
        tokenizer = checkpoint.processor.tokenizer
        cost.timing = measure(checkpoint.model, inputs, method, schedule, protocol, make, tokenizer)
    else:
        tokenizer = checkpoint.processor.tokenizer
        timed = latency.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol, tokenizer)
        cost.prefill_ms, cost.baseline_prefill_ms, cost.prefill_time_ratio = timed
        return
    lane = cost.timing["stages"]["prefill"]
    cost.prefill_ms, cost.baseline_prefill_ms = as_interval(lane["this"]), as_interval(lane["none"])
    if not cost.timing["invalid"]:  # a table shows no ratio that means nothing; why, it says
        cost.prefill_time_ratio = as_interval(lane["ratio"])
    for reason in cost.timing["invalid"]:
        log.warning("these times are no result: %s", reason)


def as_interval(lane: Mapping[str, Any]) -> Interval:
    """A record's interval of a lane."""
    return Interval(**{name: value for name, value in lane.items() if name != "p90"})


def prefill_ms(settings: Settings, method: Method) -> Callable[[Schedule], float]:
    """What a schedule's prefill takes, by measuring: for budgets in milliseconds. Medians of interleaved pairs."""
    from pdrop import latency

    checkpoint = load(settings)
    inputs = timing_inputs(checkpoint, settings)
    protocol = latency.Protocol("budget", warmup=2, pairs=max(7, settings.latency.pairs))

    def measured(schedule: Schedule) -> float:
        if not schedule.stages:
            return latency.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol)[1].median
        return latency.prefill_ratio(checkpoint.model, inputs, method, schedule, protocol)[0].median

    return measured


# ---------------------------------------------------------------------- fresh processes


def described(method: Method) -> dict[str, Any]:
    """A method, and those it is made with, as plain values."""
    found: dict[str, Any] = {"kind": [type(method).__module__, type(method).__qualname__]}
    for one in fields(method):
        value = getattr(method, one.name)
        found[one.name] = described(value) if is_dataclass(value) else value
    return found


def made_again(values: Mapping[str, Any]) -> Method:
    """What was described."""
    module, name = values["kind"]
    arguments = {key: made_again(v) if isinstance(v, dict) else v for key, v in values.items() if key != "kind"}
    method: Method = getattr(import_module(module), name)(**arguments)
    return method


def in_fresh_processes(settings: Settings, method: Method, schedule: Schedule) -> dict[str, Any]:
    """Measure a cell in `repeats` processes, one behind the other.

    Raises:
        RuntimeError: If one of them fails; with the end of what it said.
    """
    from pdrop.measure import pooled

    request = {
        "settings": {**asdict(settings), "results": str(settings.results)},
        "method": described(method),
        "schedule": str(schedule),
        "threads": threads(),
    }
    cells = []
    for number in range(settings.latency.repeats):
        log.info("timing        process %d of %d", number + 1, settings.latency.repeats)
        with tempfile.TemporaryDirectory() as folder:
            question, found = Path(folder) / "request.json", Path(folder) / "found.json"
            question.write_text(json.dumps(request))
            command = [sys.executable, "-m", "pdrop.speed", str(question), str(found)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = " ".join(done.stderr.strip().splitlines()[-1:])
                raise RuntimeError(f"the process that measured this cell failed: {said}")
            cells.append(json.loads(found.read_text()))
    return pooled(cells)


@contextlib.contextmanager
def off_the_device(model: Any) -> Iterator[None]:
    """This process's model must not lie on a GPU beside the measured one: it waits in the main memory."""
    import torch

    device = model.device
    if device.type != "cuda":
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def threads() -> int:
    """Of torch, in this process."""
    import torch

    return torch.get_num_threads()


def answer_request(question: Path, found: Path) -> None:
    """The other side: read a request, measure, write what was found."""
    import torch

    from pdrop.latency import Protocol
    from pdrop.measure import measure

    request = json.loads(question.read_text())
    torch.set_num_threads(request["threads"])
    given = request["settings"]
    for name in ("tasks", "task_folders", "layers"):
        given[name] = None if given[name] is None else tuple(given[name])
    settings = Settings(**{**given, "results": Path(given["results"]), "latency": Protocol(**given["latency"])})
    method = made_again(request["method"])
    checkpoint = load(settings)
    inputs, make = timing_inputs(checkpoint, settings), preprocessing(checkpoint, settings)
    schedule, tokenizer = Schedule.parse(request["schedule"]), checkpoint.processor.tokenizer
    cell = measure(checkpoint.model, inputs, method, schedule, settings.latency, make, tokenizer)
    found.write_text(json.dumps(cell, allow_nan=False))


if __name__ == "__main__":
    answer_request(Path(sys.argv[1]), Path(sys.argv[2]))
