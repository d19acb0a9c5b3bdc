"""The timed prompt, the same in every run: the model's prompt, made of noise pictures and a question, in a batch.

It has as many tokens as the prompt for which budgets and costs are computed, if that size is known and the processor
can make it. Without a processor, it is the reference prompt of the shipped architecture.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pdrop.models import shipped
from pdrop.record import RunSpec
from pdrop.shapes import PromptSize

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.models.checkpoint import Checkpoint
    from pdrop.models.source import ModelSource
    from pdrop.schedule import Schedule

QUESTION = "What is shown in this picture, and where in it? Answer with a single word or phrase."
NOISE_SIDE = 336  # side in pixels of the timed picture, if the model's prompt does not give its size
# prompts: a scored batch has at most as many as there are questions, a timed batch is always full
MOST_TIMED = 64


def timed_batch(batch_size: int) -> int:
    """Prompts in the timed batch: the batch size, but at most MOST_TIMED."""
    return min(batch_size, MOST_TIMED)


def inputs(
    checkpoint: Checkpoint, source: ModelSource, spec: RunSpec, images: int, batch: int | None = None
) -> dict[str, Any]:
    """Inputs of a forward, on the model's device: `batch` prompts of `images` pictures each.

    Args:
        checkpoint: The loaded model.
        source: Gives the reference prompt if there is no processor.
        spec: The run's.
        images: Pictures in each prompt.
        batch: Number of prompts; None: as many as are timed.
    """
    batch = timed_batch(spec.batch_size) if batch is None else batch
    if (make := preprocessing(checkpoint, source, spec, images, batch)) is not None:
        made = make()
    else:
        assert source.one_image is not None  # only shipped architectures come without a processor
        made = shipped.noise_prompt(checkpoint.model.config, source.one_image, batch=batch, images=images)
    device, dtype = checkpoint.model.device, checkpoint.model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in made.items()}


def preprocessing(
    checkpoint: Checkpoint, source: ModelSource, spec: RunSpec, images: int, batch: int | None = None
) -> Callable[[], Any] | None:
    """A function that makes the timed inputs from pictures and text; None without a processor. Arguments as
    `inputs`."""
    if checkpoint.processor is None:
        return None
    import numpy as np
    from PIL import Image

    from pdrop.evaluation.frames import Video
    from pdrop.evaluation.prompts import PromptBuilder

    known, config = source.one_image, checkpoint.model.config
    height, width = (NOISE_SIDE, NOISE_SIDE) if known is None else picture_size(known, config)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    builder = PromptBuilder.of(checkpoint, spec)

    picture = Image.fromarray(pixels)
    films: list[Video] = []
    if known is not None and known.video:
        count = int(known.images)  # type: ignore[arg-type]
        films = [Video(tuple(range(count)), count, 1.0, picture.size, (picture,) * count)] * images

    def encode(question: str, prompts: int) -> Any:
        pictures = [picture] * (images - len(films))
        prompt = builder.render(question, len(pictures), films)
        return builder.encode([prompt] * prompts, [pictures] * prompts, videos=films * prompts)

    def tokens(question: str) -> int:
        return round(size_of(encode(question, 1), config).text)

    question = QUESTION if known is None else question_of(known.text, tokens)
    return functools.partial(encode, question, timed_batch(spec.batch_size) if batch is None else batch)


def picture_size(prompt: PromptSize, config: Any) -> tuple[int, int]:
    """Height and width in pixels of a picture with the prompt's number of visual tokens."""
    if prompt.picture is not None:
        return prompt.picture
    if isinstance(prompt.images, int) or not prompt.images:
        return NOISE_SIDE, NOISE_SIDE  # the processor scales it to the tower's size
    _, height, width = prompt.images[0]
    patch = config.vision_config.patch_size
    return height * patch, width * patch


def question_of(text: float, tokens: Callable[[str], int]) -> str:
    """A question for a prompt with this many text tokens: words of QUESTION, padded with a short one.

    Args:
        text: Tokens of text in the whole prompt.
        tokens: Returns the number of text tokens for a question.

    Returns:
        The longest question within `text`; one word if the template alone has more tokens.
    """
    question = ""
    for words in (QUESTION.split(), ["is"]):
        longer = [" ".join([question, *itertools.islice(itertools.cycle(words), n)]) for n in range(round(text) + 1)]
        question = longer[max(0, bisect.bisect_right(longer, text, key=tokens) - 1)].strip()
    return question or QUESTION.split()[0]


def size_of(inputs: Any, config: Any) -> PromptSize:
    """Text and visual tokens of the first of the timed prompts."""
    from pdrop.engine.visual import visual_ids

    ids = inputs["input_ids"][0]
    visual = sum(int((ids == token).sum()) for token in visual_ids(config))
    return PromptSize(len(ids) - visual, visual)


def counted(
    checkpoint: Checkpoint,
    source: ModelSource,
    spec: RunSpec,
    method: Method | None,
    schedule: Schedule,
    images: int,
) -> PromptSize:
    """The prompt that is counted if nothing is scored: the model's prompt under the schedule.

    If its size, or how many tokens stay, is only known in a forward, it is the timed prompt in one forward.
    """
    if source.one_image is not None and not any(stage.adaptive for stage in schedule):
        return source.one_image.times(images).under(method, schedule, source.layers)
    import torch

    from pdrop import attach
    from pdrop.evaluation.pictures import pictures_of, tower_of

    one = inputs(checkpoint, source, spec, images, batch=1)
    with torch.inference_mode(), attach(checkpoint.model, method, schedule, tokenizer=checkpoint.tokenizer) as trace:
        checkpoint.model(**one, use_cache=True, logits_to_keep=1)
    read = pictures_of(checkpoint.model, one)
    towers = None if read is None else tower_of(read[0])
    entering = [row[0] for row in trace.visual_tokens]
    return PromptSize(trace.tokens[0][0] - entering[0], trace.visual[0], tuple(entering), towers)  # type: ignore[arg-type]
