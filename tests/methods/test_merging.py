"""Merging in the engine: batches, padding, decoding, training, places, cost; and SparseVLM's clustering and lists.

pytest tests/methods/test_merging.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdrop import Schedule, SparseVLM, SparseVLMPlus, Stage, attach
from pdrop.conformance.families import LAYERS, build, fresh
from pdrop.conformance.prompts import collate, sample, single
from pdrop.cost.counters import counted_prefill_flops
from pdrop.cost.flops import prefill_flops
from pdrop.methods.sparsevlm import density_peaks
from pdrop.methods.sparsevlm_schedules import sparsevlm
from pdrop.shapes import ModelSizes, PromptSize
from tests.support.cases import ONE, RAGGED, batch_of

SHARES = Schedule((Stage(1, 0.6), Stage(3, 0.4), Stage(4, 0.2)))
COUNTS = Schedule((Stage(2, tokens=9), Stage(4, tokens=3)))
BATCHED = [("llava", "compact"), ("llava", "original"), ("llava_next", "compact"), ("qwen2_5_vl", "original")]


def methods(positions: str) -> list[Any]:
    return [SparseVLM(positions=positions), SparseVLM(positions=positions, tokens_per_cluster=2), SparseVLMPlus()]


def text_rows(batch: dict[str, Any], row: int) -> Any:
    ids = batch["input_ids"][row]
    return batch["attention_mask"][row].bool() & (ids < 190)


@pytest.mark.product(5)
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", [SHARES, COUNTS], ids=["shares", "counts"])
@pytest.mark.parametrize(("family", "positions"), BATCHED)
def test_a_row_in_its_batch_is_the_row_alone(family: str, positions: str, schedule: Schedule, side: str) -> None:
    model = build(family)
    samples = [sample(family, model, texts, seed) for seed, texts in enumerate(RAGGED)]
    batch = collate(family, samples, side)
    for method in methods(positions):
        with attach(model, method, schedule) as trace:
            together = model(**batch).logits
        order, tokens, merged = trace.order, trace.tokens, trace.merged
        for row, one in enumerate(samples):
            with attach(model, method, schedule) as alone:
                logits = model(**single(family, one)).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, real], logits, rtol=0, atol=5e-5)
            assert not together[row, ~real].any()
            for stage in range(len(schedule)):
                assert alone.order[stage][0].tolist() == order[stage][row].tolist()
                assert [(m.number, m.centre, list(m.sources)) for m in alone.merged[stage][0]] == [
                    (m.number, m.centre, list(m.sources)) for m in merged[stage][row]
                ]
            assert [layer[0] for layer in alone.tokens] == [layer[row] for layer in tokens]
            text = int(text_rows(batch, row).sum())
            seen = method.tokens_per_layer(schedule, trace.visual[row], LAYERS)
            other = int(real.sum()) - trace.visual[row]
            assert [layer[row] - n for layer, n in zip(tokens, seen)] == [other] * LAYERS and other >= text
            assert (together[row, text_rows(batch, row)].abs().sum(-1) > 0).all(), "text is never dropped"


@torch.no_grad()
@pytest.mark.parametrize("schedule", [SHARES, COUNTS], ids=["shares", "counts"])
def test_the_trace_adds_up(schedule: Schedule) -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    method = SparseVLM(tokens_per_cluster=2)
    with attach(model, method, schedule) as trace:
        logits = model(**batch).logits
    before = [list(range(visual)) for visual in trace.visual]
    places = {}
    for row, ids in enumerate(batch["input_ids"]):
        places[row] = dict(enumerate((ids == 190).nonzero()[:, 0].tolist()))
    for kept, order, merged in zip(trace.kept, trace.order, trace.merged):
        for row, names in enumerate(order):
            made = [-1 - token.number for token in merged[row]]
            stay = [name for name in names.tolist() if name not in made]
            assert names.tolist() == stay + made, "merged tokens stand after those that stay"
            assert stay == [name for name in before[row] if name in stay], "in their order"
            gone = set(before[row]) - set(stay)
            sources = [name for token in merged[row] for name in token.sources]
            assert set(sources) <= gone and len(sources) == len(set(sources)) == method.recycled(len(gone))
            assert len(made) == method.merges(len(gone))
            for token in merged[row]:
                assert token.centre in token.sources
                assert sum(token.sources.values()) == pytest.approx(1)
                places[row][-1 - token.number] = places[row][token.centre]
            assert kept[row].tolist() == [name for name in stay if name >= 0]
            before[row] = names.tolist()
    assert any(name < 0 for merged in trace.merged[-1] for token in merged for name in token.sources), "merged again"
    for row, names in enumerate(before):
        visual = batch["input_ids"][row] == 190
        left = torch.zeros_like(visual).index_fill(0, torch.tensor([places[row][n] for n in names]).long(), True)
        assert (logits[row, left].abs().sum(-1) > 0).all()
        assert not logits[row, visual & ~left].any()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "positions"), BATCHED)
def test_decoding_is_what_a_forward_over_all_of_it_gives(family: str, positions: str, side: str, backend: str) -> None:
    """With labels on the answer, the question ranks, and the answer does not rate: the same tokens stay."""
    model = build(family, backend, torch.float32)
    rows = RAGGED if side == "left" else ONE
    batch = batch_of(family, model, rows, side)
    new, start = 4, batch["input_ids"].shape[1]
    for method in methods(positions):
        with attach(model, method, SHARES) as trace:
            out = model.generate(
                **batch,
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                suppress_tokens=list(range(190, 194)),
            )
            order = [[row.tolist() for row in stage] for stage in trace.order]
            whole = dict(batch, input_ids=out.sequences)
            whole["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
            if "mm_token_type_ids" in batch:
                whole["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, new))
            labels = torch.full_like(out.sequences, -100)
            labels[:, start:] = out.sequences[:, start:]
            again = model(**whole, labels=labels).logits[:, start - 1 : -1]
            assert [[row.tolist() for row in stage] for stage in trace.order] == order
        torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=0, atol=2e-3)


@torch.no_grad()
def test_text_between_images_sees_nothing_of_what_comes_later() -> None:
    """Tokens merged from both images stand after the second, also where nothing of it stays."""
    model = build("llava")
    batch = batch_of("llava", model, ((2, 4, 6),))
    other = dict(batch, pixel_values=batch["pixel_values"].clone())
    other["pixel_values"][1] *= -1
    end = 1 + 2 + 16 + 4  # of the text between the images
    with attach(model, SparseVLM(tokens_per_cluster=100), Schedule((Stage(2, tokens=0),))) as trace:
        first, second = (model(**inputs).logits[0] for inputs in (batch, other))
    assert trace.visual_tokens[2] == [1]
    between = slice(end - 4, end)
    assert first[between].abs().sum() > 0
    torch.testing.assert_close(first[between], second[between], rtol=0, atol=1e-9)
    assert (first[-6:] - second[-6:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_that_end_in_their_image(dtype: torch.dtype) -> None:
    """Nothing rates there but the last token, which is visual and stays; and half precision stays finite."""
    model = fresh("llava", dtype=dtype)
    batch = batch_of("llava", model, ((3, 0), (4, 3, 0), (7,)))
    real = batch["attention_mask"].bool()
    for method in methods("compact"):
        with attach(model, method, SHARES) as trace:
            logits = model(**batch).logits
        assert logits.dtype == dtype and logits[real].isfinite().all()
        assert [row.tolist()[-1:] for row in trace.order[-1]] == [[15], [31], []]
        assert trace.scores[0][0].dtype == torch.float32 and (logits[:, -1].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_keeping_everything_is_bit_identical() -> None:
    model = build("llava")
    batch = batch_of("llava", model, RAGGED)
    logits = model(**batch).logits
    everything = Schedule((Stage(1, 1.0), Stage(3, 1.0)))
    for method in methods("compact"):
        with attach(model, method, everything) as trace:
            assert torch.equal(model(**batch).logits, logits)
        assert [row.tolist() for row in trace.kept[1]] == [list(range(visual)) for visual in trace.visual]
        assert [len(row) for row in trace.scores[1]] == trace.visual, "and still ranks"


def test_a_count_above_what_there_is_drops_one_and_recycles_it() -> None:
    """As the published code does: 100 tokens stay 100, one of them moved to the end."""
    method, plenty = SparseVLM(), Schedule((Stage(2, tokens=300), Stage(3, tokens=200)))
    assert method.tokens_per_layer(plenty, 100, 5) == [100] * 5
    assert SparseVLMPlus().tokens_per_layer(plenty, 100, 5) == [100, 100, 99, 98, 98]
    assert method.tokens_per_layer(plenty, 1, 5) == [1] * 5
    assert method.tokens_per_layer(plenty, 0, 5) == [0] * 5
    model = build("llava")
    with torch.no_grad(), attach(model, method, plenty) as trace:
        model(**batch_of("llava", model, ONE))
    (token,) = trace.merged[0][0]
    assert trace.order[0][0].tolist() == [j for j in range(16) if j != token.centre] + [-1]
    assert token.sources == {token.centre: 1.0}


def test_gradients_reach_what_was_merged() -> None:
    """Everything but one merged token goes before layer 1: the image reaches the loss through that one alone."""
    method, schedule = SparseVLM(recycle=1.0, tokens_per_cluster=100), Schedule((Stage(1, tokens=0),))
    losses, gradients = [], []
    for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = fresh("llava").train()
        batch = batch_of("llava", model, ONE)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = batch["input_ids"][:, -2:]
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        seen: list[Any] = []

        def watch(module: Any, args: Any, output: Any, seen: list[Any] = seen) -> Any:
            seen.append(output.detach().requires_grad_())
            return seen[0]

        handle = model.model.multi_modal_projector.register_forward_hook(watch)
        with attach(model, method, schedule) as trace:
            loss = model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
        handle.remove()
        assert trace.visual_tokens == [[16], *[[1]] * (LAYERS - 1)]
        assert set(trace.merged[0][0][0].sources) == set(range(16))
        losses.append(loss.item())
        gradients.append(seen[0].grad.flatten(0, -2))
        assert (gradients[-1].abs().sum(-1) > 0).all()
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("schedule", [SHARES, COUNTS], ids=["shares", "counts"])
@pytest.mark.parametrize(
    "method", [SparseVLM(), SparseVLM(tokens_per_cluster=2), SparseVLM(recycle=0), SparseVLMPlus()]
)
def test_the_closed_form_is_what_torch_counts(method: Any, schedule: Schedule, kv_heads: int) -> None:
    model = fresh("llava", "sdpa", torch.float32, num_key_value_heads=kv_heads)
    inputs = single("llava", sample("llava", model, (3, 5, 2)))
    sizes, visual = ModelSizes.from_config(model.config), 32
    text = inputs["input_ids"].numel() - visual
    with attach(model, method, schedule) as trace:
        counted = counted_prefill_flops(model, inputs)
    prompt = PromptSize(text, visual, images=2).under(method, schedule, sizes.layers)
    assert [[n] for n in prompt.visual_per_layer] == trace.visual_tokens
    selection = method.selection(schedule, prompt, sizes)
    assert selection.boundaries == schedule.layers and selection.keys_cached
    flops = prefill_flops(sizes, prompt, selection)
    assert flops["total"] == pytest.approx(counted["total"], rel=1e-6)


@pytest.mark.parametrize("clusters", [1, 2, 5])
def test_density_peaks_against_plain_loops(clusters: int) -> None:
    generator = torch.Generator().manual_seed(clusters)
    batch = torch.randn(3, 24, 8, generator=generator) + 50
    rank = -torch.arange(24.0).expand(3, 24)
    centres, groups = density_peaks(batch, clusters, rank)
    for row, points in enumerate(batch.double()):
        n = len(points)
        far = [[float((points[i] - points[j]).norm()) / 8**0.5 for j in range(n)] for i in range(n)]
        rho = [sum(d * d for d in sorted(far[i])[:clusters]) / clusters for i in range(n)]  # small = dense
        gamma = []
        for i in range(n):
            denser = [far[i][j] for j in range(n) if (round(rho[j], 6), j) < (round(rho[i], 6), i)]
            gap = min(denser) if denser else max(map(max, far))
            gamma.append(gap * 2.718281828459045 ** -rho[i])
        want = sorted(range(n), key=lambda i: -gamma[i])[:clusters]
        assert centres[row].tolist() == want
        nearest = [min(range(clusters), key=lambda c: far[want[c]][i]) for i in range(n)]
        assert groups[row].tolist() == nearest
        alone = density_peaks(batch[row : row + 1], clusters, rank[:1])
        assert alone[0][0].tolist() == want and alone[1][0].tolist() == nearest


def test_density_peaks_do_not_underflow() -> None:
    """Twenty times as far apart, densities as such are zero in float32; which tokens are central stays the same."""
    x = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    rank = -torch.arange(30.0)[None]
    centres, _ = density_peaks(20 * x, 4, rank)
    assert centres[0].tolist() != [0, 1, 2, 3]
    assert set(centres[0].tolist()) == set(density_peaks(20.0001 * x, 4, rank)[0][0].tolist())


@pytest.mark.parametrize(
    ("budget", "plus", "average"),
    [
        (192, False, 206.5),
        (128, False, 145.4),
        (64, False, 82.3),
        (192, True, 206.8),
        (128, True, 144.1),
        (64, True, 81.8),
    ],
)
@pytest.mark.parametrize("shares", [False, True])
def test_the_published_lists(budget: int, plus: bool, average: float, shares: bool) -> None:
    """ "192" is 206.5 tokens per layer, counted on what enters it and with merged tokens."""
    method = SparseVLMPlus() if plus else SparseVLM()
    schedule = sparsevlm(32, budget=budget, plus=plus, shares=shares)
    assert schedule.layers == (3, 7, 16)
    entering = method.tokens_per_layer(schedule, 576, 32)
    assert sum(entering) / 32 == pytest.approx(average, abs=0.051)
    if not plus and budget == 192:
        assert entering == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16


def test_lists_of_other_sizes() -> None:
    assert sparsevlm(32, ratio=300 / 576) == sparsevlm(32, budget=192, shares=True)
    assert str(sparsevlm(12, ratio=0.3)) == "1:0.3 3:0.2 6:0.11"
    assert sparsevlm(40, budget=64).layers == (4, 9, 20)
    assert str(sparsevlm(12, budget=64, layers=[2, 4, 6])) == "2:66t 4:30t 6:17t"
    for wrong, says in (
        ({}, "give sparsevlm a ratio"),
        ({"budget": 100}, "192, 128, 96, 64"),
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"ratio": 0.5, "layers": [2, 4]}, "three boundaries"),
    ):
        with pytest.raises(ValueError, match=says):
            sparsevlm(32, **wrong)
    for arguments in ({"recycle": 2}, {"tokens_per_cluster": 0}):
        with pytest.raises(ValueError):
            SparseVLM(**arguments)
    with pytest.raises(ValueError, match="heads"):
        SparseVLMPlus(heads=0)


def test_a_picture_whose_columns_are_all_padding_has_newlines_alone():
    """LLaVA-NeXT with a picture of 1 x 50 pixels: its large part is rows of no token and a newline each."""
    from pdrop.engine.pictures import rows_to_newlines
    from pdrop.methods.layout import TokenGrid, reduced_count

    newline = torch.tensor([False] * 16 + [True] * 8)
    picture = rows_to_newlines(newline, 4)
    tokens, grids = picture.tokens, picture.grids or []
    assert tokens == 24 and sorted(token for grid in grids for token in grid.tokens()) == list(range(24))
    assert reduced_count(grids, 0.25) == 4 + 4
    assert TokenGrid(0, 0, 5, 5).reduced(0.5) == (0, 0) and not list(TokenGrid(0, 5, 0, 1).blocks(0.5))
