"""How methods and tasks are named and drawn, in one place, so that all tables and figures of a paper agree.

Colours are Okabe and Ito's (2008), safe for the common kinds of colour blindness; markers and line styles differ, too,
so that figures can be printed in grey. Methods without an entry get the free lines in the order of their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """How one method is drawn."""

    colour: str
    marker: str
    dashes: str
    face: str = ""  # of the marker; "" is the colour


METHOD_NAMES = {
    "pyramiddrop": "PyramidDrop",
    "fastv": "FastV",
    "sparsevlm": "SparseVLM",
    "sparsevlm_plus": "SparseVLM+",
    "sparsevlm_v1": "SparseVLM v1",
    "pyramiddrop_192": "PyramidDrop (192)",
    "pyramiddrop_128": "PyramidDrop (128)",
    "pyramiddrop_64": "PyramidDrop (64)",
    "divprune": "DivPrune",
    "visionzip": "VisionZip",
    "visionzip_pyramiddrop": "VisionZip + PyramidDrop",
    "fastervlm": "FasterVLM",
    "vispruner": "VisPruner",
    "cdpruner": "CDPruner",
    "cdpruner_embeddings": "CDPruner (embeddings)",
    "prumerge": "PruMerge",
    "prumerge_plus": "PruMerge+",
    "hired": "HiRED",
    "hiprune": "HiPrune",
    "holov": "HoloV",
    "holov_redistributed": "HoloV (redistributed)",
    "scope": "SCOPE",
    "dart": "DART",
    "v2drop": "V2Drop",
    "vtw": "VTW",
    "feather": "FEATHER",
    "fitprune": "FitPrune",
    "tome": "ToMe",
    "random": "Random",
    "no_image": "no image",
    "uniform": "Uniform",
    "pool": "Pooling",
    "downsample": "Downsampling",
    "none": "none",
}
LINES = {
    "pyramiddrop": Line("#0072B2", "o", "-"),
    "fastv": Line("#D55E00", "s", "--"),
    "sparsevlm": Line("#009E73", "D", "-."),
    "random": Line("#7F7F7F", "^", ":"),
    "random_fastv": Line("#A6A6A6", "v", ":"),
}
SPARE_LINES = (
    Line("#CC79A7", ">", "-"),
    Line("#E69F00", "P", "--"),
    Line("#56B4E9", "X", "-."),
    Line("#B8A800", "<", ":"),
    Line("#000000", "*", "-"),
    Line("#882255", "h", "--"),
)
MODEL_NAMES = {
    "embedded": "embedded model",
    "embedded_not_finetuned": "embedded model, not fine-tuned",
    "internvl3_8b": "InternVL3-8B",
    "llava_1_5_7b": "LLaVA-1.5-7B",
    "llava_1_5_13b": "LLaVA-1.5-13B",
    "llava_next_7b": "LLaVA-NeXT-7B",
    "llava_onevision_7b": "LLaVA-OneVision-7B",
    "llava_video_7b": "LLaVA-Video-7B",
    "qwen2_vl_7b": "Qwen2-VL-7B",
    "qwen2_5_vl_7b": "Qwen2.5-VL-7B",
    "qwen3_vl_8b": "Qwen3-VL-8B",
    "video_llava_7b": "Video-LLaVA-7B",
}
TASK_NAMES = {
    "gqa": "GQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench_en_dev": "MMB",
    "mmbench_en_dev_static": "MMB",
    "mmbench_cn_dev": "MMB-CN",
    "mmbench_cn_dev_static": "MMB-CN",
    "scienceqa_img": "SQA-I",
    "seedbench": "SEED",
    "textvqa_val": "TextVQA",
    "textvqa_val_ocr": "TextVQA, OCR",
    "vqav2_val": "VQAv2",
    "vizwiz_vqa_val": "VizWiz",
    "mmmu_val": "MMMU",
    "ocrbench": "OCRBench",
    "chartqa": "ChartQA",
    "docvqa_val": "DocVQA",
    "infovqa_val": "InfoVQA",
    "ai2d": "AI2D",
    "mmstar": "MMStar",
    **{
        f"{task}_rec_{split}": f"{name} {split}"
        for task, name in (("refcoco", "RefCOCO"), ("refcocoplus", "RefCOCO+"), ("refcocog", "RefCOCOg"))
        for split in ("val", "test", "testA", "testB")
    },
}

VIRIDIS = (  # matplotlib's, sampled from 0 to 0.86
    "#440154", "#481b6d", "#46327e", "#3f4788", "#365c8d", "#2e6e8e", "#277f8e",
    "#21918c", "#1fa187", "#2db27d", "#4ac16d", "#73d056", "#a0da39",
)  # fmt: skip
MANY_STAGES = 6  # more are FitPrune's, one a layer
LAYER_MARKERS = "osD^vP<>X*h"


def method_name(method: str) -> str:
    """A method as papers write it."""
    if method.startswith("random_") and method not in METHOD_NAMES:
        return f"Random ({method_name(method.removeprefix('random_'))})"
    return METHOD_NAMES.get(method, method)


def model_name(model: str) -> str:
    """A model in words: the paper's name, the training of a trained one, or the name without underscores.

    >>> model_name("trained_fastv_seed0")
    'trained with FastV, seed 0'
    >>> model_name("trained_none_seed1")
    'trained with nothing dropped, seed 1'
    """
    if trained := re.fullmatch(r"trained_(\w+?)(?:_seed(\d+))?", model):
        method = method_name(trained[1])
        seed = f", seed {trained[2]}" if trained[2] else ""
        return f"trained with {'nothing dropped' if method == 'none' else method}{seed}"
    return MODEL_NAMES.get(model, model.replace("_", " "))


def task_names(tasks: Sequence[str]) -> dict[str, str]:
    """Short column headers: the paper's name if there is one, otherwise without the prefix that all tasks share."""
    words = [task.split("_") for task in tasks]
    shared = 0
    while len(tasks) > 1 and all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return {task: TASK_NAMES.get(task) or " ".join(w[shared:]) for task, w in zip(tasks, words)}


def lines(methods: Sequence[str]) -> dict[str, Line]:
    """The line of each method.

    Raises:
        ValueError: If there are more unlisted methods than spare lines: give them entries in LINES.
    """
    unlisted = sorted(set(methods) - set(LINES))
    if len(unlisted) > len(SPARE_LINES):
        raise ValueError(f"no distinct lines left for {', '.join(unlisted)}: add them to LINES in analysis/style.py")
    return {**LINES, **dict(zip(unlisted, SPARE_LINES))}


def another_way(line: Line, place: int) -> Line:
    """The line of the `place`-th way to run one method: its colour, hollow markers of another shape, other dashes."""
    if place == 0:
        return line
    others = [marker for marker in LAYER_MARKERS if marker != line.marker]
    dashes = [dashes for dashes in ("--", "-.", ":", "-") if dashes != line.dashes]
    return Line(line.colour, others[(place - 1) % len(others)], dashes[(place - 1) % len(dashes)], "white")


def layer_lines(layers: int) -> list[Line]:
    """The lines of `layers` layers, first to last: dark to light, so that they can be printed in grey.

    Viridis without its pale end: even steps of lightness, safe for the common kinds of colour blindness.
    """
    return [
        Line(VIRIDIS[round(n * (len(VIRIDIS) - 1) / max(1, layers - 1))], LAYER_MARKERS[n % len(LAYER_MARKERS)], "-")
        for n in range(layers)
    ]


def budget_words(budget: str) -> str:
    """A budget in words.

    >>> [budget_words(text) for text in ("avg_tokens:72", "flops:0.45", "kv:0.4", "keep:0.5", "0.5", "")]
    ['72 tokens on average', '45 % of the FLOPs', '40 % of the KV cache', '50 % kept on average', 'ratio 0.5', '']
    """
    kind, _, amount = budget.partition(":")
    where = ""
    if " at " in amount:
        amount, where = amount.split(" at ", 1)
        where = f" at {where}"
    shares = {"flops": "of the FLOPs", "kv": "of the KV cache", "keep": "kept on average"}
    if kind == "avg_tokens" and amount:
        return f"{amount} tokens on average{where}"
    if kind == "prefill_ms" and amount:
        return f"{amount} ms of prefill{where}"
    if kind in shares and re.fullmatch(r"[\d.]+", amount):
        return f"{100 * float(amount):g} % {shares[kind]}{where}"
    return f"ratio {budget}" if re.match(r"[\d.]+($| at )", budget) else budget


def schedule_text(schedule: str) -> str:
    """A schedule for readers: fractions in at most four digits; of many stages the first two and the last. The record
    has it in full.

    >>> schedule_text("3:0.543689 6:0.295597728721")
    '3:0.5437 6:0.2956'
    >>> schedule_text("1:0.9 2:0.8 3:0.7 4:0.6 5:0.5 6:0.4 7:0.3")
    '1:0.9 2:0.8 … 7:0.3 (7 stages)'
    """
    stages = re.sub(r"\d+\.\d{5,}(?:[eE][-+]?\d+)?", lambda match: f"{float(match.group()):.4g}", schedule).split(" ")
    if len(stages) > MANY_STAGES:
        return f"{stages[0]} {stages[1]} … {stages[-1]} ({len(stages)} stages)"
    return " ".join(stages)
