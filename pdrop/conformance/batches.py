"""Ragged batches for checks of the engine and its methods, greedy decoding, and a snapshot of a model.

batch = batch_of("llava", model, RAGGED, side="right")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdrop.conformance.families import IMAGE, VISION_END
from pdrop.conformance.prompts import collate, sample

RAGGED = ((3, 5), (2, 4, 6), (7,), (6, 2))  # prompts with one image, two, none, one
ONE = ((3, 5),)
FLOAT = {"sdpa": torch.float64, "eager": torch.float32}  # transformers' eager mask is NaN on padded float64 rows
TOLERANCE = {"sdpa": 5e-5, "eager": 2e-3}  # for logits of standard deviation 1.4, against the float64 oracle


def batch_of(family: str, model: Any, rows: tuple[tuple[int, ...], ...], side: str = "left") -> dict[str, Tensor]:
    """A padded batch of prompts with these text lengths (see prompts.sample), each with its own words and images."""
    return collate(family, [sample(family, model, texts, seed) for seed, texts in enumerate(rows)], side)


def kept_of(trace: Any) -> list[list[list[int]]]:
    """The trace's kept indices as plain lists."""
    return [[row.tolist() for row in stage] for stage in trace.kept]


STEPS = 4
GREEDY: dict[str, Any] = dict(
    max_new_tokens=STEPS,
    do_sample=False,
    output_logits=True,
    return_dict_in_generate=True,
    suppress_tokens=list(range(IMAGE, VISION_END + 1)),  # an answer that contains an image would be another test
)


def prolong(batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The batch with all generated tokens appended, for one forward over both."""
    extra = ids.shape[1] - batch["input_ids"].shape[1]
    mask = pad(batch["attention_mask"], (0, extra), value=1)
    longer = dict(batch, input_ids=ids, attention_mask=mask)
    if "mm_token_type_ids" in batch:
        longer["mm_token_type_ids"] = pad(batch["mm_token_type_ids"], (0, extra))
    return longer


HOOK_TABLES = [
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
]


def picture(model: Any) -> Any:
    """All of a model's state that an attachment could change; `rope_deltas` is what Qwen's models keep of a call."""
    modules = [
        (
            name,
            {key: id(value) for key, value in vars(module).items() if key not in ("rope_deltas", "training")},
            [list(getattr(module, table).items()) for table in HOOK_TABLES],
        )
        for name, module in model.named_modules()
    ]
    weights = {name: (value.data_ptr(), value.dtype, value._version) for name, value in model.state_dict().items()}
    return modules, weights, model.config.to_dict(), model.generation_config.to_dict()
