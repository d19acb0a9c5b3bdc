"""Costs without weights: shipped architectures, papers' conventions, and what run.py prints offline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.store.load import Run
from analysis.tables.footnotes import prompts
from pdrop import FastV, Schedule, SparseVLM, pyramid, single, sparsevlm
from pdrop.cli import run
from pdrop.cost.breakdown import lines
from pdrop.cost.flops import SUMMED, fastv_macs_visual, fastv_reduction, prefill_flops, sparsevlm_macs
from pdrop.models import shipped as shipped
from pdrop.record import read_records
from pdrop.runs.timed_prompt import question_of
from pdrop.shapes import ModelSizes

ROOT = Path(__file__).resolve().parents[2]
LLAMA_7B = (4096, 11008)


def test_fastv_s_formula() -> None:
    """arXiv 2403.06764, section 4: -47.6 % at K=2, R=.5 and -70.8 % at R=.75 for 576 tokens; 2.99 T, not 3.82."""
    assert fastv_macs_visual(*LLAMA_7B, [576] * 32) / 1e12 == pytest.approx(2.99, abs=5e-3)
    assert fastv_reduction(*LLAMA_7B, 576, 2, 0.5, 32) == pytest.approx(0.476, abs=5e-4)
    assert fastv_reduction(*LLAMA_7B, 576, 2, 0.75, 32) == pytest.approx(0.708, abs=5e-4)


@pytest.mark.parametrize(("budget", "printed"), [(None, 4.62), (192, 2.14), (128, 1.72), (64, 1.30)])
def test_sparsevlm_s_figures(budget: int | None, printed: float) -> None:
    """arXiv 2410.04417 (ICML version): 4.62, 2.14, 1.72, 1.30 T. They do not print their text; 118 tokens fit all."""
    schedule = Schedule() if budget is None else sparsevlm(budget=budget)
    visual = SparseVLM().tokens_per_layer(schedule, 576, 32)
    assert sparsevlm_macs(*LLAMA_7B, [n + 118 for n in visual]) / 1e12 == pytest.approx(printed, abs=0.015)


# parameters as the model cards say them, in billions: the shapes of a config are right if they add up
PARAMETERS = {
    "llava_1_5_7b": 7.06, "llava_1_5_13b": 13.35, "llava_next_7b": 7.06, "llava_onevision_7b": 8.03,
    "internvl3_8b": 7.94, "qwen2_vl_7b": 8.29, "qwen2_5_vl_7b": 8.29, "qwen3_vl_8b": 8.77,
    "video_llava_7b": 7.37, "llava_video_7b": 8.03,
}  # fmt: skip


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_architecture_adds_up(name: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(shipped.read(name), trust_remote_code=False)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.005)
    sizes, prompt = ModelSizes.from_config(shipped.read(name)), shipped.reference_prompt(name)
    assert len(model.get_decoder().layers) == sizes.layers
    flops = prefill_flops(sizes, prompt.undropped(sizes.layers))
    assert flops["vision_tower"] > 0 and sum(flops[part] for part in SUMMED) == flops["total"]
    inputs = shipped.noise_prompt(model.config, prompt, batch=2, images=1)
    assert inputs["input_ids"].shape == (2, prompt.visual + prompt.text)


def test_every_shipped_architecture_is_a_model_of_the_command_line() -> None:
    models = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf/model").glob("*.yaml")]
    assert {shipped.of_checkpoint(model["path"]) for model in models} >= set(shipped.names())
    assert shipped.of_checkpoint("someone/else") is None
    with pytest.raises(ValueError, match="no architecture 'llava_9b' is shipped, only internvl3_8b"):
        shipped.read("llava_9b")


def test_a_breakdown_says_what_is_spent() -> None:
    sizes, prompt = ModelSizes.from_config(shipped.read("llava_1_5_7b")), shipped.reference_prompt("llava_1_5_7b")
    schedule = pyramid(32)
    left = prompt.under(FastV(), schedule, 32)
    text = "\n".join(lines(sizes, left, schedule, FastV(), 2, "title"))
    assert "576 x 8, 288 x 8, 144 x 8, 72 x 8; mean 270.0 (46.9 %)" in text
    for entry, this, none, ratio in (
        ("PyramidDrop's (visual tokens)", "1.777", "3.817", "0.466"),
        ("FastV's (visual tokens, 2-matrix MLP)", "1.388", "2.986", "0.465"),
        ("KV cache, MiB", "165", "318", "0.519"),
    ):
        (line,) = [line for line in text.splitlines() if entry in line]
        assert line.split()[-3:] == [this, none, ratio]
    whole = prompt.under(None, Schedule(), 32)
    for line in lines(sizes, whole, Schedule(), None, 2, "nothing")[5:]:
        assert line.split()[-1] in ("1.000", "–") or line.split()[-1].isalpha() or "(" in line


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        run.main()
    except SystemExit as stop:
        sys.stderr.write(str(stop.code))
        return 1
    return 0


def test_run_prints_the_breakdown_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    for method, budget in (("none", ()), ("fastv", ("budget=avg_tokens:192",)), ("pyramiddrop", ())):
        assert call(monkeypatch, "model=llava_1_5_7b", "tasks=none", f"method={method}", *budget) == 0
    said = "".join(capfd.readouterr())
    assert "PyramidDrop's (visual tokens)                  1.777             3.817   0.466" in said
    assert "with gradient checkpointing" in said
    costs = {record.spec.method: record for record in read_records(tmp_path / "results/runs")}
    assert {record.spec.weights for record in costs.values()} == {"architecture"}
    assert costs["none"].cost and costs["none"].cost.prefill_flops_ratio == 1
    assert costs["fastv"].spec.schedule == str(single(2, 0.288889))
    assert costs["pyramiddrop"].cost and round(costs["pyramiddrop"].cost.paper_macs_visual / 1e12, 2) == 1.78
    assert all(record.spec.latency == "off" for record in costs.values())
    assert call(monkeypatch, "model=llava_1_5_7b", "tasks=none", "budget=avg_tokens:100", "layers=[8,16,24]") == 1
    assert "8/16/24 cannot go below 144 of 576 average tokens" in "".join(capfd.readouterr())
    for method in ("uniform", "pool"):  # the tower sees the picture whatever is dropped after it
        assert call(monkeypatch, "model=llava_1_5_7b", "tasks=none", f"method={method}", "budget=flops:0.1") == 1
        assert "0 cannot go below 0.134 of the flops of nothing dropped" in "".join(capfd.readouterr())
    assert call(monkeypatch, "model=llava_1_5_7b", "tasks=none", "budget=flops:0.5", "ratio=0.5") == 1
    assert "leave out ratio=" in "".join(capfd.readouterr())


# ------------------------------------------------------------------ random weights

SMALL: dict[str, Any] = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4)


def shrunk(name: str) -> dict[str, Any]:
    """A shipped architecture of 4 narrow layers, its tower of one."""
    found = json.loads((ROOT / f"pdrop/models/{name}.json").read_text())
    text, vision = found["config"]["text_config"], found["config"]["vision_config"]
    text.update(SMALL, num_hidden_layers=4)
    if "rope_parameters" in text:
        text["rope_parameters"]["mrope_section"] = [4, 2, 2]
    if "depth" in vision:
        vision.update(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
        vision.update(fullatt_block_indexes=[0])
        found["prompt"].update(visual=16, images=[[1, 8, 8]])
    else:
        vision.update(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_attention_heads=2)
        vision.update(image_size=56)
        found["prompt"].update(visual=16)
    return found


@pytest.mark.parametrize("name", ["llava_1_5_7b", "qwen2_5_vl_7b"])
def test_speed_without_a_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    small = shrunk(name)
    monkeypatch.setattr(shipped, "entry", lambda _: small)
    monkeypatch.setattr(shipped, "of_checkpoint", lambda path: name)
    shipped.read.cache_clear()
    monkeypatch.chdir(tmp_path)
    timing = ["latency.warmup=1", "latency.pairs=2", "latency.min_seconds=0", "latency.new_tokens=[1,3]"]
    call_ = [f"model={name}", "model.weights=random", "tasks=none", "layers=[2]", "positions=original", "dtype=float32"]
    try:
        assert call(monkeypatch, *call_, "batch_size=2", "latency.images=2", "device=cpu", *timing) == 0
    finally:
        shipped.read.cache_clear()
    (record,) = read_records(tmp_path / "results/runs")
    assert record.spec.weights == "random" and record.cost and record.cost.timing
    assert record.cost.visual_tokens_per_layer == [32, 32, 16, 16], "two images of 16 tokens"
    assert set(record.cost.timing["end_to_end"]) == {"1", "3"} and record.cost.timing["batch"] == 2
    assert {"prefill", "decode", "vision", "selection"} == set(record.cost.timing["stages"])
    assert record.cost.flops_parts["vision_tower"] > 0


def test_budgets_costs_and_times_are_of_one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The model's, also where its weights are here and nothing is scored; where a run's own differs, tables say so."""
    monkeypatch.chdir(tmp_path)
    timing = ["latency.warmup=0", "latency.pairs=1", "latency.min_seconds=0", "batch_size=1", "device=cpu"]
    for more in (["latency=off"], timing, [*timing, "latency.images=2"]):
        assert call(monkeypatch, "tasks=none", "method=fastv", "budget=flops:0.7", *more) == 0
    said = "".join(capfd.readouterr())
    assert "one prompt: 144 visual tokens, 14 of text" in said and "one prompt: 288 visual tokens, 14 of text" in said
    found = {record.spec.latency: record for record in read_records(tmp_path / "results/runs")}
    off, one, two = (found[name] for name in ("off text 14", "quick 0/1/0 text 14", "quick 0/1/0 images 2 text 14"))
    for record, visual in ((off, 144), (one, 144), (two, 288)):
        spent = record.cost
        assert spent and spent.model_prompt == {"text": 14, "visual": visual} and spent.visual_tokens == visual
        assert 0.69 < spent.prefill_flops_ratio <= 0.7
    assert one.cost and one.cost.timed_prompt == one.cost.model_prompt, "and so is what is timed"
    assert off.cost and off.cost.timed_prompt is None
    assert prompts([Run(one, tmp_path)]) == []
    one.cost.text_tokens = 21.4
    (line,) = prompts([Run(one, tmp_path)])
    assert "are of 144 visual tokens and 14 of text; what was scored (mean) had 144 visual tokens and 21.4" in line


def test_a_question_is_as_long_as_it_must() -> None:
    def tokens(question: str) -> int:
        return 5 + sum(1 if len(word) < 5 else 9 for word in question.split())

    assert [tokens(question_of(n, tokens)) for n in (3, 6, 8, 14, 30, 60)] == [6, 6, 8, 14, 30, 60]
