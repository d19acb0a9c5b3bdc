"""Checks of a checkpoint's weights: that they fit its config, by the files' headers, and that they are finite.

transformers reports a misfit only after allocating gigabytes: it builds the config's model, whatever is in the files.
Headers are read in milliseconds, and compared with a model on torch's meta device as transformers itself does,
including renamings and conversions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pdrop import names

log = logging.getLogger(__name__)

INDEXED = re.compile(r"\.(\d+)(?=\.)")  # a layer's number in a weight's name
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "depth")
DEEPEST = 1024  # upper bound for the layers of a model
SAME_MAGNITUDE = 2  # tied and fused weights are counted at most twice
POINTER = b"version https://git-lfs.github.com/spec/"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Args:
        path: The file.
        what: The checkpoint, for the message.

    Raises:
        ValueError: If it is not a JSON object, naming file and place.
    """
    refuse_pointer(path, what)
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {path.name} is not valid JSON ({error}): fetch the file again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{what}: {path.name} holds a {type(data).__name__}, where a JSON object belongs")
    return data


def refuse_pointer(path: Path, what: str) -> None:
    """Refuse a Git LFS pointer, the few lines that git leaves in place of a large file.

    Raises:
        ValueError: Naming the file and how to fetch it.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{what}: {path.name} is a git-lfs pointer, not the file: git lfs pull, in its folder")


def weight_files(folder: Path, what: str) -> list[Path]:
    """The safetensors files that transformers reads for a folder.

    Raises:
        ValueError: If there are none, or a file in the index is missing or outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        # a .bin is a pickle, which may execute anything on loading; transformers would read it
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        held = f"; {pickles} is a pickle, which is not read: save the model with save_pretrained" if pickles else ""
        raise ValueError(
            f"{what}: no *.safetensors weights in this folder ({SINGLE}, or the files of {INDEX}){held}; "
            "weights=random builds the architecture without them"
        )
    held_by = read_json(folder / INDEX, what).get("weight_map")
    if not isinstance(held_by, dict) or not held_by:
        raise ValueError(f"{what}: {INDEX} has no weight_map: fetch the file again")
    found = sorted({names.check(f"{what}: a file of {INDEX}", name) for name in held_by.values()})
    if missing := [name for name in found if not (folder / name).is_file()]:
        raise ValueError(
            f"{what}: {len(missing)} of the {len(found)} files that {INDEX} names are not in this folder (such as "
            f"{missing[0]}): fetch them"
        )
    return [folder / name for name in found]


def headers(folder: Path, what: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's weights, without reading any.

    Raises:
        ValueError: If a file is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder, what):
        refuse_pointer(path, what)
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{what}: {path.name} is not a whole safetensors file ({error}): fetch it again"
            ) from error
    return found


def refuse_misfit(auto: Any, config: Any, tensors: dict[str, tuple[int, ...]], what: str) -> None:
    """Compare a config with the headers of weights, as transformers will when it loads them.

    Quantised weights have shapes of their own and are left to transformers.

    Args:
        auto: The class that loads it, such as AutoModelForImageTextToText.
        config: The checkpoint's config.
        tensors: From `headers`.
        what: The checkpoint, for the message.

    Raises:
        ValueError: If a weight is missing or has another size than in the config.
    """
    import torch
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.models.auto.auto_factory import _get_model_class

    quantised = (config, config.get_text_config(decoder=True))
    if (
        any(getattr(part, "quantization_config", None) is not None for part in quantised)
        or is_deepspeed_zero3_enabled()
    ):
        return
    kind: Any = _get_model_class(config, auto._model_mapping)
    refuse_other_magnitude(auto, config, tensors, what)
    empty = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, loading = kind.from_pretrained(None, config=config, state_dict=empty, **options)
    except Exception as error:  # whatever it is, the config's numbers caused it
        raise ValueError(f"{what}: no model can be built as its config.json says ({first_line(error)})") from error
    found, unexpected = [], sorted(loading["unexpected_keys"])
    if other := sorted(loading["mismatched_keys"], key=str):
        name, here, wanted = other[0]
        found.append(
            f"{len(other)} have other sizes (such as {name}, {list(here)} where the config has {list(wanted)})"
        )
    if missing := sorted(loading["missing_keys"]):
        found.append(f"{len(missing)} are missing (such as {missing[0]}) and would be random")
    # the same weight of a further layer: the config's model has too few layers
    known = {INDEXED.sub(".N", name) for name in model.state_dict()}
    if further := [name for name in unexpected if INDEXED.sub(".N", name) in known]:
        found.append(f"{len(further)} are of layers that it does not have (such as {further[0]})")
    if found:
        raise ValueError(
            f"{what}: its weights do not fit its config.json: {' and '.join(found)}; use a checkpoint in the Hugging "
            "Face format, with the config that belongs to it"
        )
    if unexpected:
        log.warning("%s: %d weights are not used (such as %s)", what, len(unexpected), unexpected[0])


def refuse_other_magnitude(auto: Any, config: Any, tensors: dict[str, tuple[int, ...]], what: str) -> None:
    """Refuse a config whose model has a very different size: even on the meta device, position tables take memory.

    Raises:
        ValueError: With both numbers of weights.
    """
    import torch

    try:
        with quiet(), torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise ValueError(f"{what}: no model can be built as its config.json says ({first_line(error)})") from error
    there, told = sum(math.prod(shape) for shape in tensors.values()), sum(p.numel() for p in model.parameters())
    if told > SAME_MAGNITUDE * there:
        raise ValueError(
            f"{what}: its weights do not fit its config.json: they are {there:,} numbers, the model that it "
            f"describes has {told:,}; where a part such as text_config is left out, "
            "transformers takes a size of its own"
        )


def refuse_depths(node: Any, what: str, deepest: int, name: str = "") -> None:
    """Refuse a config.json with impossibly many layers: transformers makes a list of them when it reads it.

    Args:
        node: The file's content.
        what: The checkpoint, for the message.
        deepest: The most layers that are possible.
        name: Name of the part `node`.

    Raises:
        ValueError: Naming the field.
    """
    for key, value in node.items() if isinstance(node, dict) else ():
        if isinstance(value, dict):
            refuse_depths(value, what, deepest, f"{name}{key}.")
        elif key in DEPTHS and isinstance(value, int) and not 0 < value <= deepest:
            raise ValueError(f"{what}: its config.json says {name}{key}={value}, where 1 to {deepest} are possible")


def deepest_of(tensors: Iterable[str]) -> int:
    """The most layers that weights of these names can belong to: one more than the highest index in them."""
    return 1 + max((int(number) for name in tensors for number in INDEXED.findall(name)), default=0)


def refuse_not_finite(model: Any, what: str) -> None:
    """Refuse a loaded model with weights that are NaN or infinite, or too large for its dtype.

    One pass over each tensor without a copy: 0.3 s for a billion weights. If several processes read the same files,
    only the first on each machine checks.

    Raises:
        ValueError: Naming one.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:  # with FSDP the others get their weights later, from the first
        return
    held = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    wrong = [name for name, tensor in held.items() if not finite(tensor)]
    if wrong:
        dtype = str(held[wrong[0]].dtype).removeprefix("torch.")
        small = f", or holds values that {dtype} cannot: dtype=bfloat16 can" if dtype == "float16" else ""
        raise ValueError(
            f"{what}: {len(wrong)} of its {len(held)} weight tensors are not finite (such as {wrong[0]}): the file is "
            f"damaged{small}; fetch it again"
        )


def finite(tensor: Any) -> bool:
    """Whether every element is a finite number."""
    import torch

    if not tensor.numel() or tensor.is_meta:
        return True
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):  # such as float8
        tensor = tensor.to(torch.float32)
    low, high = tensor.aminmax()  # either is NaN if any element is
    return bool(torch.isfinite(low) & torch.isfinite(high))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' loading report and progress bars, which our own messages replace."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next line if the first only introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")]).rstrip(".")
