"""What `--model pdrop --model_args ...` of lmms-eval's own command line means.

    python -m lmms_eval --model pdrop --tasks pope --batch_size 8 --model_args \\
        pretrained=llava-hf/llava-1.5-7b-hf,method=pyramiddrop,stages=4,ratio=0.5,prompt=vicuna_v1

    method      none, a module of pdrop.methods (pyramiddrop, fastv, random_drop, ...), or package.module.Class
    stages, ratio, layers     PyramidDrop's schedule; layers with + between them: layers=8+16+24
    layer       one boundary instead, with ratio as what stays: FastV's K
    schedule    any schedule as it is printed: schedule=8:0.5 16:0.25

The other arguments are those of pdrop.checkpoint.load and pdrop.evaluate.evaluate. Nothing is stored between calls.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pdrop.methods
from pdrop.checkpoint import load
from pdrop.methods.base import Method
from pdrop.schedule import Schedule, pyramid, single
from pdrop.scoring.answers import Answer, Question
from pdrop.scoring.generation import Respondent
from pdrop.scoring.prompts import Prompter


def from_arguments(
    pretrained: str = "package://pdrop.embedded/model",
    *,
    method: str = "none",
    stages: int = 4,
    ratio: float = 0.5,
    layers: str | int | None = None,
    layer: int | None = None,
    schedule: str | None = None,
    positions: str | None = None,
    prompt: str = "chat",
    image_mode: str = "crop",
    batch_size: int | str = 1,
    max_new_tokens: int = 16,
    seed: int = 0,
    device: str | None = None,
    max_batch_size: int | None = None,
    **loading: Any,
) -> Callable[[list[Question]], list[Answer]]:
    """A function that answers questions as the arguments say.

    Raises:
        ValueError: For unknown methods and arguments, and whatever loading refuses.
    """
    unknown = set(loading) - {"revision", "weights", "dtype", "attn_implementation"}
    if unknown:
        raise ValueError(f"model_args: unknown {', '.join(sorted(unknown))}")
    checkpoint = load(pretrained, name="lmms_eval", device=device or "cpu", seed=seed, **loading)
    depth = checkpoint.num_layers
    ranking, plan = None, Schedule()
    if method != "none":
        chosen_arguments: dict[str, Any] = {"positions": positions} if positions else {}
        ranking = find_method(method)(**chosen_arguments)
        if schedule is not None:
            plan = Schedule.parse(schedule).check(depth)
        elif layer is not None:
            plan = single(layer, ratio, depth)
        else:
            chosen = None if layers is None else [int(part) for part in str(layers).split("+")]
            plan = pyramid(depth, stages, ratio, chosen)
    positions_there = checkpoint.model.config.get_text_config(decoder=True).max_position_embeddings
    prompter = Prompter(checkpoint.processor, prompt, image_mode, positions_there)  # type: ignore[arg-type]
    respondent = Respondent(
        checkpoint, ranking, plan, prompter, batch_size=int(batch_size), max_new_tokens=max_new_tokens, seed=seed
    )
    return lambda questions: respondent.answer(questions).answers


def find_method(name: str) -> type[Method]:
    """The method class behind a module name of pdrop.methods or a full name.

    Raises:
        ValueError: If there is none; those of pdrop are named.
    """
    known = [module.name for module in pkgutil.iter_modules(pdrop.methods.__path__) if module.name != "base"]
    module, _, wanted = name.rpartition(".") if "." in name else (f"pdrop.methods.{name}", "", "")
    if "." not in name and name not in known:
        raise ValueError(f"unknown method {name!r}: choose none, {', '.join(sorted(known))}, or package.module.Class")
    classes = [
        kind
        for _, kind in inspect.getmembers(import_module(module), inspect.isclass)
        if issubclass(kind, Method) and kind.__module__ == module and wanted in ("", kind.__name__)
    ]
    if not classes:
        raise ValueError(f"{name!r} is no method: {module} has no class {wanted or 'of pdrop.methods.base.Method'}")
    return classes[0]
