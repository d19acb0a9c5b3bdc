"""A printed trace is a few lines that say what was kept, however many tokens there are."""

import torch
from transformers import LlavaForConditionalGeneration

from pdrop import PyramidDrop, attach
from pdrop.methods.grid import Pool
from pdrop.schedule import Schedule
from tests.support.saved_checkpoints import config


def test_a_printed_trace_is_a_few_lines() -> None:
    model = LlavaForConditionalGeneration(config()).eval()
    with attach(model, PyramidDrop(), Schedule.parse("1:0.5 3:0.25")) as trace:
        assert str(trace) == "Trace: 0 prefills of 4 layers seen"
        ids = torch.tensor([[1, *[3] * 16, 7, 8]] * 5)
        with torch.no_grad():
            model(input_ids=ids, pixel_values=torch.randn(5, 3, 28, 28))
        said = repr(trace)
    assert "tensor" not in said and len(said) < 1000 and "and 2 more prompts" in said
    assert said.splitlines()[:2] == [
        "Trace: 1 prefill of 4 layers seen",
        "  prompt 0, 16 visual tokens; from layer 0: 19 tokens, 16 visual, layer 1: 11 tokens, 8 visual, "
        "layer 3: 7 tokens, 4 visual",
    ]
    with attach(model, Pool(), Schedule.parse("0:0.25")) as trace, torch.no_grad():
        model(input_ids=ids[:1], pixel_values=torch.randn(1, 3, 28, 28))
        assert "4 visual, 4 of them merged" in str(trace)
