"""SparseVLM and SparseVLM+ against what the official program computed: tests/vectors/README.md has the cases.

pytest tests/methods/test_sparsevlm.py
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import DynamicCache

from pdrop import Schedule, SparseVLM, SparseVLMPlus, Stage, attach
from pdrop.engine.trace import Trace
from tests.engine.test_vectors import CACHE, LOGITS, VECTORS, single_row
from tests.support.official import check_cache

MERGED_STATES = 1e-4


def read(name: str) -> dict[str, Any]:
    """One case with its arrays under "arrays", after checking the file's hash."""
    path = VECTORS / "sparsevlm" / name
    case = json.loads(path.with_suffix(".json").read_text())
    file = path.with_suffix(".safetensors")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == case["sha256"], f"{file} has changed"
    return case | {"arrays": {key: torch.from_numpy(np.array(value)) for key, value in load_file(file).items()}}


def listed(case: dict[str, Any]) -> Schedule:
    """The official program cuts on the output of a layer: before the next."""
    layers = [layer + 1 for layer in case["pruning_layers"]]
    return Schedule(tuple(Stage(layer, tokens=n) for layer, n in zip(layers, case["schedule"])))


SEEN: list[Any] = []  # a method is frozen and has no place for notes


@dataclass(frozen=True)
class Watched(SparseVLM):
    """SparseVLM that notes what it decides, and breaks ties between equally dense tokens by the official lots."""

    lots: tuple[tuple[float, ...], ...] = ()

    def begin(self, view: Any) -> Any:
        SEEN.clear()
        SEEN.append(super().begin(view))
        return SEEN[0]

    def merge(self, *given: Any) -> Any:
        SEEN.append(super().merge(*given))
        return SEEN[-1]

    def tie_break(self, recycled: Any) -> Any:
        return torch.tensor(self.lots[len(SEEN) - 1])[None]


def run(case: dict[str, Any], method: Any, backend: str) -> tuple[Any, Any, Trace, dict[str, Any]]:
    model, batch = single_row(case, backend)
    with attach(model, method, listed(case)) as trace:
        out = model.generate(
            **batch,
            max_new_tokens=case["decode_steps"] + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prefill = model(**batch, past_key_values=DynamicCache(config=model.config))
    return out, prefill, trace, batch


def check_decoding(case: dict[str, Any], out: Any) -> None:
    arrays, steps = case["arrays"], case["decode_steps"]
    assert out.sequences[0, -steps - 1 :].tolist() == arrays["tokens"].tolist()
    torch.testing.assert_close(torch.cat(out.logits[1:]), arrays["decode_logits"], rtol=0, atol=LOGITS)
    check_cache(out.past_key_values, arrays, CACHE)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["s01_64_100img", "s06_64_576img"])
def test_recycling(name: str, backend: str) -> None:
    case = read(name)
    arrays = case["arrays"]
    lots = tuple(tuple(arrays[f"stage{stage}_noise"].tolist()) for stage in range(3))
    out, prefill, trace, batch = run(case, Watched(lots=lots), backend)
    ids = batch["input_ids"][0]
    text_from = case["image_start"] + case["image_tokens"]
    assert (SEEN[0][0].nonzero()[:, 0] - text_from).tolist() == arrays["text_raters"].tolist()
    block = list(range(case["image_tokens"]))  # names of the current visual tokens, as they stand
    where = {j: case["image_start"] + j for j in block}  # and their places in the prompt
    total = 0
    for stage, merged in enumerate(SEEN[1:]):
        want = {key.removeprefix(f"stage{stage}_"): arrays[key] for key in arrays if key.startswith(f"stage{stage}_")}
        largest = float(want["scores"].max())
        torch.testing.assert_close(trace.scores[stage][0], want["scores"], rtol=0, atol=1e-4 * largest)
        made = trace.merged[stage][0]
        assert [token.number for token in made] == list(range(total, total + len(made)))
        total += len(made)
        after = trace.order[stage][0].tolist()
        assert after == [block[i] for i in want["kept"]] + [-1 - token.number for token in made]
        assert trace.kept[stage][0].tolist() == [j for j in after if j >= 0]
        sources, cluster = [block[i] for i in want["merge_src"]], want["merge_cluster"].tolist()
        clusters = [{j for j, c in zip(sources, cluster) if c == number} for number in range(len(made))]
        assert [set(token.sources) for token in made] == clusters
        for token, members in zip(made, clusters):
            assert token.centre in members
            np.testing.assert_allclose(list(token.sources.values()), 1 / len(members), rtol=1e-6)
        official = [sources[i] for i in want["merge_centers"]]
        # a single cluster's centre is any of its tokens: the official lots tie in float32, and nothing depends on them
        assert len(made) == 1 or [token.centre for token in made] == official
        torch.testing.assert_close(merged.states[0], want["merged"], rtol=0, atol=MERGED_STATES)
        where |= {-1 - token.number: where[token.centre] for token in made}
        block = after
    visual = [where[j] for j in block]
    left = [*range(case["image_start"]), *visual, *range(text_from, len(ids))]
    torch.testing.assert_close(prefill.logits[0, left], arrays["prefill_logits"], rtol=0, atol=LOGITS)
    gone = torch.ones(len(ids), dtype=torch.bool).index_fill(0, torch.tensor(left), False)
    assert not prefill.logits[0, gone].any()
    text = len(ids) - case["image_tokens"]
    counts = [case["image_tokens"], *(stage["v_num_after"] for stage in case["stages"])]
    assert trace.visual_tokens == [[n] for n, k in zip(counts, (3, 4, 9, 1)) for _ in range(k)]
    assert trace.tokens == [[n + text] for [n] in trace.visual_tokens]
    layers = SparseVLM().tokens_per_layer(listed(case), case["image_tokens"], 17)
    assert [[n] for n in layers] == trace.visual_tokens
    check_decoding(case, out)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_plus(backend: str) -> None:
    case = read("v01_64_100img")
    arrays = case["arrays"]
    out, prefill, trace, batch = run(case, SparseVLMPlus(), backend)
    block = list(range(case["image_tokens"]))
    for stage in range(3):
        want = arrays[f"stage{stage}_scores"]
        torch.testing.assert_close(trace.scores[stage][0], want, rtol=0, atol=1e-3 * float(want.abs().max()))
        block = [block[i] for i in arrays[f"stage{stage}_kept"]]
        assert trace.kept[stage][0].tolist() == block
        assert trace.merged[stage] == [[]]
    start, end = case["image_start"], case["image_start"] + case["image_tokens"]
    left = [*range(start), *(start + j for j in block), *range(end, len(batch["input_ids"][0]))]
    torch.testing.assert_close(prefill.logits[0, left], arrays["prefill_logits"], rtol=0, atol=LOGITS)
    check_decoding(case, out)
