"""The prompt that is timed, the same in every run: noise pictures and a fixed question, `timed_batch` times.

Without a processor, the reference prompt of the shipped architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pdrop import architectures
from pdrop.record import RunSpec
from pdrop.shapes import PromptSize

if TYPE_CHECKING:
    from pdrop.checkpoint import Checkpoint
    from pdrop.methods.base import Method
    from pdrop.schedule import Schedule
    from pdrop.source import ModelSource

QUESTION = "What is shown in this picture, and where in it? Answer with a single word or phrase."
NOISE_SIDE = 336  # pixels of the square picture that is timed; the processor resizes it to what the model takes
# prompts: of a batch that is scored there are as many as there are questions, a timed one is always full
MOST_TIMED = 64


def timed_batch(batch_size: int) -> int:
    """Prompts in what is timed: a batch, but no more than MOST_TIMED."""
    return min(batch_size, MOST_TIMED)


def inputs(
    checkpoint: Checkpoint, source: ModelSource, spec: RunSpec, images: int, batch: int | None = None
) -> dict[str, Any]:
    """Inputs of a forward, on the model's device: `batch` prompts of `images` pictures each.

    Args:
        checkpoint: The loaded model.
        source: What its reference prompt is, where there is no processor.
        spec: The run's.
        images: Pictures in each prompt.
        batch: Prompts; None: as many as are timed.
    """
    batch = timed_batch(spec.batch_size) if batch is None else batch
    if (make := preprocessing(checkpoint, spec, images, batch)) is not None:
        made = make()
    else:
        made = architectures.noise_prompt(checkpoint.model.config, source.prompt, batch=batch, images=images)
    device, dtype = checkpoint.model.device, checkpoint.model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in made.items()}


def preprocessing(
    checkpoint: Checkpoint, spec: RunSpec, images: int, batch: int | None = None
) -> Callable[[], Any] | None:
    """Makes the timed inputs from pictures and text; None where there is no processor. Arguments as of `inputs`."""
    if checkpoint.processor is None:
        return None
    import numpy as np
    from PIL import Image

    from pdrop.scoring.prompts import Prompter

    prompts = timed_batch(spec.batch_size) if batch is None else batch
    pixels = np.random.default_rng(0).integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
    prompter = Prompter(checkpoint.processor, spec.prompt, spec.image_mode)

    def make() -> Any:
        rendered = [prompter.render(QUESTION, images)] * prompts
        return prompter.encode(rendered, [[Image.fromarray(pixels)] * images] * prompts)

    return make


def seen(
    checkpoint: Checkpoint,
    source: ModelSource,
    spec: RunSpec,
    method: Method | None,
    schedule: Schedule,
    images: int,
) -> PromptSize:
    """The tokens of the prompt that would be timed, seen in one forward of it alone: what is counted without scores."""
    import torch

    from pdrop import attach
    from pdrop.scoring import crops

    one = inputs(checkpoint, source, spec, images, batch=1)
    with torch.inference_mode(), attach(checkpoint.model, method, schedule) as trace:
        checkpoint.model(**one, use_cache=True, logits_to_keep=1)
    towers = crops.seen(one, [images], trace.visual)[0]
    entering = [row[0] for row in trace.visual_tokens]
    return PromptSize(trace.tokens[0][0] - entering[0], trace.visual[0], tuple(entering), towers)  # type: ignore[arg-type]
