"""The prompt that is timed, the same in every run: noise pictures and a fixed question, `batch_size` times.

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


def inputs(checkpoint: Checkpoint, source: ModelSource, spec: RunSpec, images: int) -> dict[str, Any]:
    """Inputs of a forward, on the model's device: `spec.batch_size` prompts of `images` pictures each."""
    if (make := preprocessing(checkpoint, spec, images)) is not None:
        made = make()
    else:
        made = architectures.noise_prompt(checkpoint.model.config, source.prompt, batch=spec.batch_size, images=images)
    device, dtype = checkpoint.model.device, checkpoint.model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in made.items()}


def preprocessing(checkpoint: Checkpoint, spec: RunSpec, images: int) -> Callable[[], Any] | None:
    """Makes the timed inputs from pictures and text; None where there is no processor."""
    if checkpoint.processor is None:
        return None
    import numpy as np
    from PIL import Image

    from pdrop.scoring.prompts import Prompter

    pixels = np.random.default_rng(0).integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
    prompter = Prompter(checkpoint.processor, spec.prompt, spec.image_mode)

    def make() -> Any:
        prompts = [prompter.render(QUESTION, images)] * spec.batch_size
        return prompter.encode(prompts, [[Image.fromarray(pixels)] * images] * spec.batch_size)

    return make


def seen(checkpoint: Checkpoint, inputs: Any, method: Method | None, schedule: Schedule, images: int) -> PromptSize:
    """The tokens of the timed prompt, seen in one forward: what is counted where nothing is scored."""
    import torch

    from pdrop import attach
    from pdrop.scoring import crops

    with torch.inference_mode(), attach(checkpoint.model, method, schedule) as trace:
        checkpoint.model(**inputs, use_cache=True, logits_to_keep=1)
    visual, rows = trace.visual[0], len(trace.visual)
    towers = crops.seen(inputs, [images] * rows, trace.visual)[0]
    entering = [row[0] for row in trace.visual_tokens]
    return PromptSize(trace.tokens[0][0] - entering[0], visual, tuple(entering), towers)  # type: ignore[arg-type]
