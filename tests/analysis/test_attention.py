"""Attention by layer: the figures are those of the samples, tops overlap as they were made to, maps are drawn.

python -m pytest tests/analysis/test_attention.py
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.store.load import samples_of
from analysis.studies import attention_figure
from analysis.studies import tradeoff_figure as figure
from analysis.studies.attention import attention_studies, stability, top_sets
from tests.support.records import TASKS, VISUAL, make_record, put, run_of, table_of

LAYERS, HEADS = 4, 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose layers 0 and 1 rank alike, 2 the other way round, 3 at random; and the run that drops nothing."""
    results = tmp_path_factory.mktemp("store")
    put(results, make_record("none", 1.0), n=20)
    record = make_record("pyramiddrop", 0.5)
    record = replace(record, spec=replace(record.spec, schedule="1:1 2:1 3:1"))
    folder = put(results, record, n=20)
    for task in TASKS:
        path = folder / "samples" / f"{task}.jsonl"
        lines = []
        for line in map(json.loads, path.read_text().splitlines()):
            draw = np.random.default_rng([3, TASKS.index(task), line["doc_id"]])
            order = draw.permutation(VISUAL)
            maps = [order, order, VISUAL - 1 - order, draw.permutation(VISUAL)]
            line["attention"] = {
                "layers": list(range(LAYERS)),
                "mass": [[0.1 * layer + 0.01 * head for head in range(HEADS)] for layer in range(LAYERS)],
                "entropy": [[0.5] * HEADS] * LAYERS,
                "top": [[0.2 + 0.1 * TASKS.index(task) + 0.001 * line["doc_id"]] * HEADS] * LAYERS,
                "map": [base64.b64encode(((m + 1) / VISUAL).astype("<f2").tobytes()).decode() for m in maps],
            }
            lines.append(json.dumps(line))
        path.write_text("\n".join(lines) + "\n")
    return results


def test_figures_are_the_samples_means(store: Path) -> None:
    (study,) = attention_studies(table_of(store))
    assert len(study.samples) == 20 * len(TASKS) and study.layers == (0, 1, 2, 3)
    assert study.heads("mass") == pytest.approx(np.add.outer(0.1 * np.arange(LAYERS), 0.01 * np.arange(HEADS)))
    for layer, mean in enumerate(study.layer_means("mass")):
        assert mean.value == pytest.approx(0.1 * layer + 0.01)
        assert mean.low == pytest.approx(mean.value) == mean.high, "all samples are alike"
    spread = study.layer_means("top")[0]
    assert spread.low is not None and spread.low < spread.value == pytest.approx(0.3095)
    assert study.by_task("top")[TASKS[2]] == pytest.approx([0.4095] * LAYERS)
    # maps fall evenly from 1: of 64 tokens the best one holds 64 / (1 + ... + 64)
    for task in TASKS:
        assert study.by_task("best")[task] == pytest.approx([64 / (64 * 65 / 2)] * LAYERS, rel=1e-3)
    assert study.even == pytest.approx(VISUAL / (VISUAL + 20))


def test_ranks_are_as_stable_as_they_were_made(store: Path) -> None:
    (study,) = attention_studies(table_of(store))
    assert top_sets(study.samples[0], 0.25).sum(1).tolist() == [VISUAL // 4] * LAYERS
    pairs = stability(study)
    assert set(pairs) == {0.1, 0.25, 0.5}
    for keep, shared in pairs.items():
        assert shared[0, 1].shared.value == pytest.approx(1), keep
        assert shared[1, 2].shared.value == pytest.approx(0), "the best of the one are the worst of the other"
        assert shared[0, 3].shared.value == pytest.approx(shared[0, 3].chance, abs=0.04), "a random order"


def test_every_figure_is_drawn_and_no_trade_off(store: Path) -> None:
    table = table_of(store)
    assert {name for name, _ in attention_figure.files(table)} == {
        f"demo-attention{suffix}" for suffix in ("", "-heads", "-tasks", "-stability")
    }
    assert not list(figure.files(table)), "what keeps everything trades nothing"
    (study,) = attention_studies(table)
    drawn = attention_figure.by_layer(study)
    mean = drawn.axes[0].containers[0].lines[0]
    assert np.allclose(mean.get_ydata(), [1, 11, 21, 31]) and len(drawn.axes[0].lines) >= HEADS


def test_maps_over_the_picture(store: Path, tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"image{number}.png")
    run = run_of(store, "pyramiddrop")
    options = ["--results", str(store), "--images", str(tmp_path), "--sample", "toy_ocr:7"]
    assert main(["overlay", "demo", *options]) == 0, "an experiment's name stands for its runs"
    assert (store / "figures" / f"attention-toy_ocr-7-{run.record.run_id[:6]}.png").exists()
    assert not list((store / "figures").glob("overlay-*")), "nothing is dropped"


def test_a_map_of_other_tokens_is_refused(store: Path, tmp_path: Path) -> None:
    run = run_of(store, "pyramiddrop")
    sample = json.loads((run.path / "samples" / "toy_ocr.jsonl").read_text().splitlines()[0])
    sample["attention"]["map"][0] = sample["attention"]["map"][0][:8]
    run = run_of(store, "none")
    folder = put(tmp_path, make_record("none", 1.0), n=1)
    (folder / "samples" / "toy_ocr.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(ValueError, match="an attention map of"):
        samples_of(replace(run, path=folder), "toy_ocr")
