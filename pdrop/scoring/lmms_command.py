"""What `--model pdrop --model_args ...` of lmms-eval's own command line means: what the same words mean to run.py.

    python -m lmms_eval --model pdrop --tasks pope --batch_size 8 --model_args \\
        pretrained=llava-hf/llava-1.5-7b-hf,method=pyramiddrop,stages=4,ratio=0.5,prompt=vicuna_v1,image_mode=pad

    pretrained      a folder, a Hub repository or package://module/folder (the embedded model)
    method          a file of conf/method/: none, pyramiddrop, fastv, random, ... (as in conf/run.yaml)
    stages, ratio, layers, positions, twin, seed    run.py's dials; layers=[8,16,24]
    schedule.budget=192, method.recycle=0, ...  parts of the method's file
    dtype, device, attn_implementation, revision, weights, prompt, image_mode, max_new_tokens

Where nothing is given, conf/run.yaml's defaults hold; the device is cuda where there is one. Nothing is stored between
calls: `run.py` does that.
"""

from __future__ import annotations

import logging
from typing import Any

import yaml

from pdrop.checkpoint import load
from pdrop.scoring.generation import Respondent
from pdrop.scoring.method_choice import PARTS, choose, defaults
from pdrop.scoring.prompts import Prompter

log = logging.getLogger(__name__)

KINDS = {"stages": int, "ratio": float, "seed": int, "batch_size": int, "max_new_tokens": int}
DIALS = ("method", "stages", "ratio", "layers", "positions", "twin", "seed")
LOADING = ("revision", "weights", "dtype", "attn_implementation", "device")
ASKING = ("prompt", "image_mode", "batch_size", "max_new_tokens")


def from_arguments(pretrained: str = "package://pdrop.embedded/model", **arguments: Any) -> Respondent:
    """What answers questions as the arguments say.

    Args:
        pretrained: The checkpoint.
        arguments: Of the module's list, as lmms-eval has parsed them: numbers, or text.

    Raises:
        ValueError: For unknown arguments, methods and values, before anything is loaded; and what loading refuses.
    """
    arguments.pop("max_batch_size", None)  # lmms-eval's own, for a search that no batch of ours needs
    known = (*DIALS, *LOADING, *ASKING)
    if unknown := [name for name in arguments if name not in known and name.split(".")[0] not in PARTS]:
        names = ", ".join(("pretrained", *known, *(f"{part}.*" for part in PARTS)))
        raise ValueError(f"model_args: unknown {', '.join(sorted(unknown))}; there are {names}")
    given = defaults() | {name: read(name, value) for name, value in arguments.items()}
    dials = {name: value for name, value in given.items() if name in DIALS or "." in name}
    method, schedule = choose(given["method"], dials)
    checkpoint = load(
        pretrained,
        name="lmms_eval",
        revision=given.get("revision"),
        weights=given.get("weights", "pretrained"),
        dtype=given["dtype"] or "float32",
        attn_implementation=given["attn_implementation"],
        device=given["device"] or default_device(),
        seed=given["seed"],
    )
    plan = schedule(checkpoint.num_layers)
    log.info("%s: %r, %r", pretrained, method, plan)
    positions = checkpoint.model.config.get_text_config(decoder=True).max_position_embeddings
    style, mode = given.get("prompt", "chat"), given.get("image_mode", "crop")
    return Respondent(
        checkpoint,
        method,
        plan,
        Prompter(checkpoint.processor, style, mode, positions),
        batch_size=given["batch_size"] or 1,
        max_new_tokens=given["max_new_tokens"],
        seed=given["seed"],
    )


def default_device() -> str:
    """Cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def read(name: str, value: Any) -> Any:
    """An argument's value in its type: lmms-eval leaves lists and null as text, and makes -1 a float.

    Raises:
        ValueError: If it is of another kind than the argument.
    """
    kind = KINDS.get(name)
    if isinstance(value, str) and (kind or name in ("layers", "positions", "twin") or "." in name):
        value = yaml.safe_load(value)
    if name == "layers":
        if value is not None and not (isinstance(value, list) and all(type(layer) is int for layer in value)):
            raise ValueError(f"model_args: layers is a list such as layers=[8,16,24], not {value!r}")
    elif kind is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"model_args: {name} is a number, not {value!r}")
        if kind is int and not float(value).is_integer():
            raise ValueError(f"model_args: {name} is a whole number, not {value!r}")
        return kind(value)
    return str(value) if name in LOADING and value is not None else value
