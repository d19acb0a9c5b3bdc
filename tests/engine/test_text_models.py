"""Text models that a vision-language model may be built around: ranked by their own attention, or refused at attach.

`make walk` tries every text model of transformers; here are those that differ most.

    pytest tests/engine/test_text_models.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop import FastV, PyramidDrop, RandomDrop, Schedule, Stage, attach
from pdrop import single as at
from pdrop.conformance import walk
from pdrop.conformance.families import IMAGE, TEXT, build, llava_of, ready
from pdrop.conformance.prompts import sample, single
from pdrop.engine import probe

SERVED = ["smollm3", "phi", "stablelm", "cohere", "glm", "granite", "qwen3", "nemotron", "mixtral"]
REFUSED = {
    "eurobert": "not what q_proj, k_proj",  # sees both ways
    "doge": "not what q_proj, k_proj",  # biases its logits
    "olmoe": "not what q_proj, k_proj",  # norms over all heads
    "ministral3": "read position_ids",  # scales queries by position
    "phi3": "lacks `self_attn.q_proj`",
}


@pytest.mark.parametrize("kind", SERVED)
def test_ranked_by_its_own_attention(kind: str) -> None:
    assert walk.outcome(kind) == ("ok", "")


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_at_attach(kind: str) -> None:
    result, words = walk.outcome(kind)
    assert result == "refused" and REFUSED[kind] in words
    if kind != "phi3":
        assert "visual tokens cannot be ranked by the attention of" in words


@torch.no_grad()
def test_every_fourth_layer_of_smollm3_does_not_turn() -> None:
    """16 layers, a boundary before such a layer, after it, or neither: kept is what the layer attends to most."""
    model = ready(llava_of("smollm3", num_hidden_layers=16), "eager", torch.float32)
    batch = single("llava", sample("llava", model, (3, 5)))
    visual = batch["input_ids"][0] == IMAGE
    own = model(**batch, output_attentions=True).attentions
    for layer in (2, 3, 4, 7, 8, 12):
        for method, looks in ((PyramidDrop(positions="original"), layer), (FastV(positions="original"), layer - 1)):
            with attach(model, method, at(layer=layer, keep=0.5)) as trace:
                model(**batch)
            want = own[looks][0, :, -1].mean(0)[visual]
            torch.testing.assert_close(trace.scores[0][0], want, rtol=1e-3, atol=1e-5)
            assert trace.kept[0][0].tolist() == want.topk(8).indices.sort().values.tolist()


@torch.no_grad()
def test_the_probe_leaves_everything_as_it_is_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(decoder: Any, real: Any = probe.try_out) -> Any:
        made.append(1)
        return real(decoder)

    monkeypatch.setattr(probe, "try_out", counting)
    monkeypatch.setattr(probe, "FOUND", {})
    model = build("llava")
    random, weights = torch.random.get_rng_state(), {k: v._version for k, v in model.state_dict().items()}
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        attach(model, PyramidDrop(), at(layer=2, keep=0.5))
    attach(model, RandomDrop(), Schedule((Stage(3, 0.5),)))
    assert made == [1]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert {k: v._version for k, v in model.state_dict().items()} == weights
    attach(model, None, Schedule())
    assert made == [1], "without a boundary nothing is ranked"


def test_an_attention_that_was_put_in_by_hand_is_refused() -> None:
    model = llava_of("llama")
    other = llava_of("qwen2").get_decoder().layers[2].self_attn
    model.get_decoder().layers[2].self_attn = other
    with pytest.raises(ValueError, match="layer 2 has a Qwen2Attention where its config names a LlamaAttention"):
        attach(model, FastV(), at(layer=3, keep=0.5))
    assert TEXT["num_hidden_layers"] == len(model.get_decoder().layers)
