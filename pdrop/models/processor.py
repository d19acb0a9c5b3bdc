"""Does a processor count as many visual tokens as the tower makes? Older LLaVA folders leave out what that takes.

Their prompts would hold another number of image tokens than there are features, which shows in the first question.
"""

from __future__ import annotations

from typing import Any

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def refuse_other_tower(processor: Any, config: Any, what: str) -> None:
    """Hold what a processor of LLaVA's kind says of the tower against the config. Other kinds are left alone.

    Args:
        processor: The checkpoint's.
        config: The checkpoint's.
        what: The checkpoint, for the message.

    Raises:
        ValueError: Saying what to set in processor_config.json.
    """
    tower: Any = getattr(config, "vision_config", None)
    extra = CLASS_TOKENS.get(getattr(tower, "model_type", ""))
    if extra is None or not hasattr(processor, "num_additional_image_tokens"):
        return
    wanted = {"patch_size": tower.patch_size, "num_additional_image_tokens": extra}
    if (strategy := getattr(config, "vision_feature_select_strategy", None)) is not None:
        wanted["vision_feature_select_strategy"] = strategy
    wrong = {name: getattr(processor, name) for name, value in wanted.items() if getattr(processor, name) != value}
    if wrong:
        said = ", ".join(f"{name}={value}" for name, value in wrong.items())
        remedy = ", ".join(f'"{name}": {json_word(wanted[name])}' for name in wrong)
        raise ValueError(
            f"{what}: its processor says {said}, its tower needs another: set in processor_config.json {remedy}"
        )


def json_word(value: Any) -> str:
    """A word or number as JSON has it."""
    return f'"{value}"' if isinstance(value, str) else str(value)
