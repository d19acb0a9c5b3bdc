"""Drop visual tokens inside an unmodified transformers model.

    with attach(model, PyramidDrop(), pyramid(num_layers=32)) as trace:
        model.generate(**inputs)

Removal is physical: after a boundary every layer computes on fewer rows and caches fewer keys. After the last layer the
rows go back to their places (zeros where tokens were dropped), so labels, `logits_to_keep`, losses and `generate` see
the usual shapes. After the block the model is exactly as it was, hooks included.

Cases that the official codes do not cover:
- a query token is never dropped, even if it is visual (a prompt that ends in its image), because its logits are needed.
  It counts as kept;
- without labels, the query is the last token; with `logits_to_keep=k` it is the k-th from the end, if only text
  follows: speculative and prompt-lookup decoding pass a prompt together with guesses of its continuation;
- in training, rows without an image or without an answer are not dropped at all;
- a cache that was filled under one schedule can only be continued under that schedule;
- only ids that come with pixels, or with features made of them, are visual: ids alone (quoted, generated, in a draft)
  are text. The trace reports the last prompt; drafts and guidance's unconditional prompt do not overwrite it;
- threads may call an attached model at the same time; the end of the block waits for running forwards, and a `generate`
  that continues in another thread raises a RuntimeError in its next forward;
- merged tokens are placed after the last visual token that could go, even if it was another image's, so that no text
  sees what was made from later tokens. After the last layer they are at the place of their centre;
- images that come in a later turn are ranked among themselves; cached images are left unchanged;
- `generate(use_cache=False)` ranks again at each step, with the newest token as the query.
"""

from typing import Any

from torch import nn

from pdrop.engine.hooks import Attachment
from pdrop.engine.trace import Trace
from pdrop.methods.base import Method
from pdrop.schedule import Schedule

__all__ = ["Attachment", "Trace", "attach"]


def attach(model: nn.Module, method: Method | None, schedule: Schedule, *, tokenizer: Any = None) -> Attachment:
    """Drop visual tokens in `model` while the returned context is open; entering it yields the `Trace`.

    Args:
        model: A decoder-only vision-language model of transformers, or a PEFT, DDP or FSDP wrapping of one.
        method: Ranks the visual tokens. None with an empty schedule: nothing is dropped, the trace is still written.
        schedule: Where and how many.
        tokenizer: The prompts' tokenizer, for methods that read the question's text (CDPruner).

    Raises:
        ValueError: If the model, the method and the schedule do not fit together.
        RuntimeError: On entering, if something is attached to the model already.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a vision-language model of transformers, not {model!r}")
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"method is an object such as FastV(), or None, not {method!r}")
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is a Schedule such as pyramid(num_layers=32), not {schedule!r}: Schedule.parse reads text"
        )
    return Attachment(model, method, schedule, tokenizer)
