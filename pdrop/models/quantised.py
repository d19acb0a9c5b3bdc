"""Checkpoints with quantised weights: checks that they can be loaded here, and compute in the requested dtype.

The engine calls a layer's projections as modules, so the form of their weights does not matter. They must be loaded
directly onto their device, since most kinds cannot be moved. transformers knows which library a kind needs; a missing
one is reported before any weight is read. FLOPs are counted as for unquantised weights.
"""

from __future__ import annotations

import logging
from typing import Any

from pdrop.models.weights import first_line, quiet

log = logging.getLogger(__name__)

LIBRARIES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "awq": "gptqmodel"}


def quantisation_of(config: Any) -> Any:
    """The quantisation in a checkpoint's config, of the whole model or its decoder; None: none."""
    own = getattr(config, "quantization_config", None)
    return own if own is not None else getattr(config.get_text_config(decoder=True), "quantization_config", None)


def kind_of(config: Any) -> str | None:
    """The name of a config's quantisation, such as bitsandbytes_4bit, awq or fp8; None if weights are not quantised."""
    told = quantisation_of(config)
    if told is None:
        return None
    values = told if isinstance(told, dict) else told.to_dict()
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return f"bitsandbytes_{4 if values.get('load_in_4bit') else 8}bit"
    method = values.get("quant_method")
    return str(getattr(method, "value", method))


def refuse_quantised(config: Any, weights: str, device: str, what: str) -> None:
    """Refuse quantised weights that cannot be read or run here. Unquantised weights pass.

    Args:
        config: The checkpoint's.
        weights: "pretrained" or "random".
        device: The model's device.
        what: The checkpoint, for the message.

    Raises:
        ValueError: Naming the kind, and what it needs.
    """
    kind = kind_of(config)
    if kind is None:
        return
    if weights == "random":
        raise ValueError(
            f"{what}: its weights are quantised ({kind}); random ones would not be, and be as fast as another model: "
            "use its own (model.weights=pretrained), or the checkpoint that it was made of"
        )
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

    if kind not in AUTO_QUANTIZER_MAPPING:
        raise ValueError(
            f"{what}: its config.json has a quantization_config of quant_method {kind!r}, which transformers does not "
            f"read: it reads {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}"
        )
    try:
        with quiet():
            told = quantisation_of(config)
            told = AutoQuantizationConfig.from_dict(told) if isinstance(told, dict) else told
            quantiser: Any = AUTO_QUANTIZER_MAPPING[kind](told, pre_quantized=True)
            quantiser.validate_environment(device_map={"": device}, weights_only=True)
    except Exception as error:  # each library raises its own types if it is missing, too old or not for this device
        library = LIBRARIES.get(kind, kind)
        missing = isinstance(error, ImportError) and "pip install" not in str(error) and "GPU" not in str(error)
        raise ValueError(
            f"{what}: its weights are quantised ({kind}), which cannot be had with device={device} here: "
            f"{first_line(error)}{f' (pip install {library})' if missing else ''}"
        ) from error
    if getattr(quantiser.quantization_config, "dequantize", False):
        log.warning("%s: this device does not compute with weights of %s: they are made whole on loading", what, kind)


def refuse_training(config: Any, what: str) -> None:
    """Refuse quantised weights that are to be trained, or copied into a model that is.

    Args:
        config: The checkpoint's.
        what: The checkpoint, for the message.

    Raises:
        ValueError: Naming the kind.
    """
    if (kind := kind_of(config)) is not None:
        raise ValueError(
            f"{what}: its weights are quantised ({kind}), which cannot be trained here: give the checkpoint that "
            "it was made of"
        )


def made_whole(model: Any) -> bool:
    """Whether a model was dequantised on loading, so that none of its weights is quantised."""
    return all(weight.is_floating_point() and weight.dtype.itemsize > 1 for weight in model.parameters())


def refuse_other_dtype(model: Any, dtype: Any, what: str) -> None:
    """Refuse a loaded model that computes in another dtype than requested: some kinds only have one.

    Args:
        model: The loaded model.
        dtype: The requested dtype.
        what: The checkpoint, for the message.

    Raises:
        ValueError: Naming the value of the dial that fits.
    """
    there = model.get_input_embeddings().weight.dtype
    if there != dtype:
        here, asked = (str(one).removeprefix("torch.") for one in (there, dtype))
        raise ValueError(f"{what}: its quantised weights compute in {here}, not {asked}: set dtype={here}")
