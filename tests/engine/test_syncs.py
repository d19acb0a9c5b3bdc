"""What dropping costs the host on CUDA, counted on a pretended device: waits for it, launches, mixed devices.

The tables are bounds that a change may lower and must not raise without being seen: TABLE of six methods with two
boundaries, tests/engine/waits.txt of every method at its own schedule and of a few other families. One wait of a
prefill reads the prompt; methods that decide on the host have another, those that find their numbers one per boundary.

    pytest tests/engine/test_syncs.py
    python -m tests.engine.test_syncs > tests/engine/waits.txt       (after a change that was meant)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pdrop import CDPruner, FastV, Method, PyramidDrop, RandomDrop, Schedule, SparseVLM, SparseVLMPlus, Stage, attach
from pdrop.cli.compose import choices
from pdrop.conformance.__main__ import subject_of
from pdrop.conformance.families import fresh
from pdrop.engine import angles, state
from pdrop.methods.cdpruner import Clip
from pdrop.methods.transfer import moved as carried
from pdrop.methods.transfer import on_device, read_back
from tests.support.cases import HALVES, RAGGED, batch_of
from tests.support.official import clip_folder, inputs_of, read
from tests.support.pretended_cuda import OnDevice, moved, pretended

METHODS: dict[str, Method] = {
    "PyramidDrop": PyramidDrop(),
    "PyramidDrop, original": PyramidDrop(positions="original"),
    "FastV": FastV(several=True),
    "SparseVLM": SparseVLM(),
    "SparseVLM+": SparseVLMPlus(),
    "random": RandomDrop(),
}
# (waits of a prefill, launches of it, launches of a decoding step), one prompt and a padded batch; a step never waits
TABLE = {
    "PyramidDrop": {"one": (1, 74, 0), "ragged": (1, 151, 4)},
    "PyramidDrop, original": {"one": (1, 69, 0), "ragged": (1, 142, 0)},
    "FastV": {"one": (1, 57, 0), "ragged": (1, 128, 0)},
    "SparseVLM": {"one": (1, 189, 0), "ragged": (1, 432, 4)},
    "SparseVLM+": {"one": (1, 128, 0), "ragged": (1, 223, 0)},
    "random": {"one": (1, 29, 0), "ragged": (1, 60, 0)},
}
ROWS = {"one": RAGGED[:1], "ragged": RAGGED}
WAITS = Path(__file__).with_name("waits.txt")
# needs a folder of weights; drops pixels; the same as others with other numbers
LEFT_OUT = {"none", "cdpruner", "downsample", "pyramiddrop_192", "pyramiddrop_128", "pyramiddrop_64", "random_fastv"}
DIALLED = (
    ("pyramiddrop", "twin=true"),
    ("sparsevlm_v1", "twin=true"),
    ("uniform", "layers=[2]"),
    ("feather", "schedule.adaptive=true"),
    ("prumerge_plus", "schedule.adaptive=true"),
)
ELSEWHERE = {
    "llava_next": ("pyramiddrop", "hired", "hiprune", "pool", "holov", "prumerge", "uniform"),
    "llava_onevision": ("fastv", "holov"),
    "qwen2_5_vl": ("sparsevlm_plus", "visionzip", "holov", "hiprune", "uniform", "pool", "feather"),
    "qwen3_vl": ("fastv", "holov"),
    "internvl": ("sparsevlm",),
}


def counts(
    method: Method,
    rows: Any,
    patch: pytest.MonkeyPatch,
    steps: int = 3,
    schedule: Schedule = HALVES,
    family: str = "llava",
) -> Any:
    """(waits, launches) of the prefill, and the most of a decoding step, our own; and where each of both waited."""
    model = fresh(family, "sdpa", torch.float32).eval()
    batch = batch_of(family, model, rows)
    greedy: dict[str, Any] = dict(max_new_tokens=steps, do_sample=False, suppress_tokens=[2])
    with torch.no_grad(), attach(model, method, schedule):
        want = model.generate(**batch, **greedy)
    moved(model)
    there = {name: OnDevice(value) for name, value in batch.items()}
    found: list[tuple[int, int]] = []
    sites: list[Any] = []
    with torch.no_grad(), pretended(patch) as seen:
        model.register_forward_pre_hook(lambda *_: seen.clear())

        def note(*_: Any) -> None:
            found.append((seen.waits["own"], seen.launches["own"]))
            sites.append(dict(seen.sites))
            mixed.extend(seen.mixed)

        mixed: list[str] = []
        with attach(model, method, schedule):
            model.register_forward_hook(note)
            got = model.generate(**there, **greedy)
    assert not mixed
    assert torch.equal(got.there, want), "the same tokens as without the pretence"
    assert len(found) == steps
    step = tuple(map(max, zip(*found[1:])))
    return found[0], step, sites[0], max(sites[1:], key=len)


def cases() -> list[tuple[str, str, str]]:
    """(family, method with its dials, prompts) of waits.txt."""
    named = [(name, *dials) for name, *dials in [*((n,) for n in choices("method") if n not in LEFT_OUT), *DIALLED]]
    found = [("llava", " ".join(words), rows) for words in named for rows in ROWS]
    return found + [(family, name, "ragged") for family, names in ELSEWHERE.items() for name in names]


def line(case: tuple[str, str, str], patch: pytest.MonkeyPatch) -> tuple[int, int, int, int, Any]:
    """What is counted of a case: waits and launches of the prefill, of a step, and where the prefill waited."""
    family, words, rows = case
    name, *dials = words.split()
    subject = subject_of(name, dials).on(family)
    (waits, launches), step, where, _ = counts(
        subject.method, ROWS[rows], patch, schedule=subject.schedule, family=family
    )
    return waits, launches, *step, where


def bounds() -> dict[tuple[str, str, str], tuple[int, int, int, int]]:
    """What waits.txt says."""
    found = {}
    for text in WAITS.read_text().splitlines():
        if not text.startswith("#"):
            family, method, rows, *numbers = (part.strip() for part in text.split("|"))
            waits, launches, step_waits, step_launches = map(int, numbers)
            found[family, method, rows] = (waits, launches, step_waits, step_launches)
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", METHODS)
def test_no_more_waits_and_launches_than_the_table_says(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (waits, launches), (step_waits, step_launches), where, step_where = counts(METHODS[name], ROWS[rows], monkeypatch)
    most_waits, most_launches, most_step_launches = TABLE[name][rows]
    assert step_waits == 0, step_where
    assert 0 < waits <= most_waits, where
    assert 0 < launches <= most_launches
    assert step_launches <= most_step_launches


@pytest.mark.parametrize("name", ["PyramidDrop", "FastV"])
def test_steps_that_outgrow_what_was_noted_beforehand_do_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 256 steps, or 512 positions: here after one."""
    monkeypatch.setattr(state, "AHEAD", 1)
    monkeypatch.setattr(angles, "LEAST", 2)
    _, (waits, launches), _, where = counts(METHODS[name], RAGGED, monkeypatch, steps=8)
    assert waits == 0 and launches >= TABLE[name]["ragged"][2], where


def test_every_method_has_its_line() -> None:
    assert set(bounds()) == set(cases())


@torch.no_grad()
@pytest.mark.product(4)
@pytest.mark.parametrize("name", ["holov", "uniform", "visionzip"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_a_forward_with_its_pixels_waits_no_more(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timings and trainings call the model: `generate` runs the vision tower before it."""
    subject = subject_of(name, []).on(family)
    model = fresh(family, "sdpa", torch.float32).eval()
    batch = batch_of(family, model, RAGGED)
    with attach(model, subject.method, subject.schedule):
        want = model(**batch).logits
    moved(model)
    there = {key: OnDevice(value) for key, value in batch.items()}
    with pretended(monkeypatch) as seen, attach(model, subject.method, subject.schedule):
        got = model(**there).logits
    assert torch.equal(got.there, want) and not seen.mixed
    assert seen.waits["own"] == (1 if name == "visionzip" else 2), seen.sites


@torch.no_grad()
def test_cdpruner_s_question_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With CLIP's text tower, which the lines have no weights for: once for a batch."""
    model, one = copy.deepcopy(inputs_of(read("before_decoder", "cdpruner", "c01")))
    batch = {name: torch.cat([x, x]) for name, x in one.items()}
    batch["input_ids"][1, -1] = 9
    asked: list[Any] = []

    class Words:
        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            asked.append(rows)
            return [" ".join(f"w{token}" for token in row * 9) for row in rows]

    clip, schedule = clip_folder(tmp_path, 8), Schedule((Stage(0, tokens=13),))
    method = CDPruner(clip=str(clip))
    with attach(model, method, schedule, tokenizer=Words()):
        want = model(**batch).logits
    assert asked == [[row[-5:] for row in batch["input_ids"].tolist()]], "the question, once"
    loaded = copy.deepcopy(Clip.load(str(clip), "cpu"))
    for part in (model, loaded.model):
        moved(part)
    monkeypatch.setattr(Clip, "load", lambda folder, device: loaded)
    there = {name: OnDevice(value) for name, value in batch.items()}
    with pretended(monkeypatch) as seen, attach(model, method, schedule, tokenizer=Words()):
        got = model(**there).logits
    torch.testing.assert_close(got.there, want, rtol=0, atol=1e-5)
    assert seen.waits["own"] == 1 and not seen.mixed, (seen.sites, seen.mixed)


@pytest.mark.product(9)
@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_no_more_than_its_line_says(case: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    *found, where = line(case, monkeypatch)
    assert all(number <= most for number, most in zip(found, bounds()[case])), (found, bounds()[case], where)


def test_the_lines_keep_what_is_promised() -> None:
    """A method of fixed numbers waits at most twice, one that finds them once more per boundary; a step never.

    A step launches at most three operations per stage; two where nothing is padded, none with original positions then.
    """
    subjects: dict[tuple[str, str], Any] = {}
    for (family, words, rows), (waits, launches, step_waits, step_launches) in bounds().items():
        name, *dials = words.split()
        if (family, words) not in subjects:
            subjects[family, words] = subject_of(name, dials).on(family)
        subject = subjects[family, words]
        boundaries, found = len(subject.schedule), sum(stage.adaptive for stage in subject.schedule)
        assert 0 < waits <= 2 + found, (family, words, rows)
        per_stage = 3 if rows == "ragged" else 0 if subject.method.positions == "original" else 2
        assert launches and not step_waits and step_launches <= per_stage * boundaries, (family, words, rows)


def test_the_pretended_device_sees_what_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain copy waits, one from pinned memory and a filled tensor do not; two devices are noted; so is a launch."""
    with pretended(monkeypatch) as seen:
        device = torch.device("cuda:0")
        x = OnDevice(torch.arange(3))
        waits = [seen.waits["model"]]
        for make in (
            lambda: torch.tensor([1, 2, 3], device=device),
            lambda: torch.tensor([1, 2, 3]).to(device, non_blocking=True),
            lambda: on_device([1, 2, 3], device),
            lambda: on_device([2, 2, 2], device),
            lambda: x[torch.tensor([0, 1])],
            lambda: bool((x > 1).any()),
            lambda: x[x.argmax()],
            lambda: x.index_select(0, x.argmax(0, keepdim=True)),
        ):
            made = make()
            assert isinstance(made, bool) or made.device == device
            waits.append(seen.waits["model"] + seen.waits["own"])
        assert [after - before for before, after in zip(waits, waits[1:])] == [1, 1, 0, 0, 1, 1, 1, 0]
        assert not seen.mixed
        launched = seen.launches["model"]
        torch.add(x, x)
        assert seen.launches["model"] == launched + 1
        torch.add(x, torch.arange(3))
        assert len(seen.mixed) == 1


def test_copies_to_the_host_come_late_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a copy before it waited reads rubbish here; several tensors are one wait."""
    with pretended(monkeypatch) as seen:
        there = [OnDevice(torch.arange(3)), OnDevice(torch.tensor([[0.5]]))]
        assert [x.tolist() for x in read_back(there)] == [[0, 1, 2], [[0.5]]]
        assert seen.waits["own"] == 1
        copy = there[0].to("cpu", non_blocking=True)
        assert copy.tolist() != [0, 1, 2]
        back = carried(torch.tensor([4, 5]), torch.device("cuda:0"))
        assert read_back([back])[0].tolist() == [4, 5] and copy.tolist() == [0, 1, 2]
        assert read_back([]) == []


if __name__ == "__main__":
    print("# What dropping adds: waits, launches of a prefill | waits, launches of a step. See test_syncs.py")
    for one in cases():
        with pytest.MonkeyPatch.context() as patch:
            *numbers, _ = line(one, patch)
        print(" | ".join([*one, *map(str, numbers)]), flush=True)
