"""FLOPs of one prefill counted by torch and fvcore, to check the closed forms of pdrop/cost/flops.py.

tests/cost/test_flops.py and the conformance suite make the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def counted_prefill_flops(model: Any, inputs: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs that torch's FlopCounterMode sees in one prefill, by operator, and their `total`.

    Counts through attached hooks (dropping, ranking). On the meta device (no memory, real shapes in seconds) the parts
    are called one by one, since transformers reads values when it merges images into the text.

    Args:
        model: An image-text-to-text model of transformers under sdpa or eager; flash-attention is not counted.
        inputs: input_ids [1, n] and the tower's inputs, e.g. pixel_values.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        if inputs["input_ids"].is_meta:
            ids = inputs["input_ids"]
            images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
            if images:
                model.get_image_features(**images, return_dict=True)
            mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device="meta")
            embedded = torch.empty(*ids.shape, model.config.text_config.hidden_size, dtype=model.dtype, device="meta")
            given = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": torch.empty_like(ids)}
            hidden = model.get_decoder()(**given, use_cache=False)
            model.lm_head(hidden.last_hidden_state[:, -1:])
        else:
            model(**inputs, logits_to_keep=1)
    counts = {str(operator): float(flops) for operator, flops in counter.get_flop_counts()["Global"].items()}
    return {**counts, "total": float(counter.get_total_flops())}


def fvcore_prefill_flops(model: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, int]]:
    """FLOPs that fvcore sees in one prefill (twice its multiply-adds), and the calls of operators it cannot count.

    Norms, which it also counts, are left out, as in the other two. Only for eager attention and a model without hooks:
    it does not know sdpa, and its tracing breaks with hooks.

    Raises:
        ValueError: If the attention backend is not eager.
    """
    import torch
    from fvcore.nn import FlopCountAnalysis

    if model.config._attn_implementation != "eager":
        raise ValueError(f"fvcore cannot see {model.config._attn_implementation} attention: count an eager model")
    names = list(inputs)

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            output: Any = self.model(**dict(zip(names, values)), logits_to_keep=1, use_cache=False)
            logits: torch.Tensor = output.logits
            return logits

    with torch.no_grad():
        analysis = FlopCountAnalysis(Prefill().eval(), tuple(inputs.values()))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        flops = {name: 2.0 * macs for name, macs in analysis.by_operator().items() if not name.endswith("_norm")}
    return {**flops, "total": sum(flops.values())}, dict(analysis.unsupported_ops())
