"""The embedded model's training: drills and boards ask what is there, and several processes train as one would.

python -m pytest tests/recipes/test_embedded.py
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pdrop.embedded.boards import Board
from pdrop.embedded.documents import Document
from pdrop.embedded.drawing import PATCH_HEADS
from pdrop.embedded.drills import Drill, drill_questions
from pdrop.embedded.questions import EmbeddedQuestion
from pdrop.embedded.samples import sample
from pdrop.embedded.scene_questions import cell, holds
from pdrop.embedded.scenes import Scene
from pdrop.embedded.tokenizer import build_tokenizer
from pdrop.embedded.vocabulary import CHARACTERS, LABELS, OPTION_LETTERS, PLURALS
from recipes.embedded.batches import pack
from recipes.embedded.hints import hints
from recipes.embedded.loader import Place, Steps, batches
from recipes.embedded.precision import matrix_dtype
from recipes.embedded.recipe import RECIPE
from recipes.embedded.stage import TrainingPhase
from recipes.embedded.train import main, train
from recipes.embedded.trainer import Trainer
from tests.support.processes import all_done

STAGES = (
    TrainingPhase(
        "tower", images=4, batch=4, mix={"board": 1.0}, trains_decoder=False, tower_rate=1.0, patch_weight=1.0
    ),
    TrainingPhase("projector", images=4, batch=4, mix={"board": 1.0}, trains_decoder=False, projector_weight=1.0),
    TrainingPhase("questions", images=8, batch=4, blocks=2, character_weight=0.3, drills={"letters": 0.5}),
)
STEP = (
    TrainingPhase("all at once", images=4, batch=4, blocks=2, character_weight=0.3, tower_rate=0.1, patch_weight=1.0),
)


def test_boards_ask_for_what_the_plates_say() -> None:
    for index in range(20):
        picture = sample("validation", index, {"board": 1.0})
        assert isinstance(picture.facts, Board)
        plates = dict(picture.facts.plates)
        assert len(plates) == len(picture.facts.plates) == len(picture.questions)
        for question in picture.questions:
            assert question.family == "reading" and question.answer == plates[question.text.split()[3]]


@pytest.mark.parametrize("drill", ["retrieval", "sides", "letters"])
def test_drills_follow_from_the_scene(drill: Drill) -> None:
    families: Counter[str] = Counter()
    for index in range(40):
        picture = sample("validation", index, {"scene": 1.0}, drills={drill: 1.0})
        assert isinstance(picture.facts, Scene)
        things = picture.facts.things
        for question in picture.questions:
            families[question.family] += 1
            words = question.text.split()
            if question.family in ("attribute", "choice"):
                (thing,) = [one for one in things if words[4] in (one.color, one.shape)]
                answer = question.answer
                if question.family == "choice":
                    answer = question.options[OPTION_LETTERS.index(answer)]
                assert answer == getattr(thing, words[1])
            elif question.family == "existence":
                wanted = " ".join(words[3:5])
                assert question.answer == ("yes" if any(one.name == wanted for one in things) else "no")
            elif question.family == "position":
                (thing,) = [one for one in things if one.name == " ".join(words[3:5])]
                assert question.answer == cell(thing)
            else:
                cut = words.index("the", 3)
                first, second = (
                    next(one for one in things if one.name == " ".join(pair))
                    for pair in (words[2:4], words[cut + 1 : cut + 3])
                )
                assert question.answer == ("yes" if holds(" ".join(words[4:cut]), first, second) else "no")
    expected = {
        "retrieval": {"attribute", "existence", "position"},
        "sides": {"relation", "position"},
        "letters": {"choice"},
    }
    assert set(families) == expected[drill] and min(families.values()) > 20


def test_counts_are_not_mostly_one() -> None:
    answers: Counter[str] = Counter()
    for index in range(60):
        picture = sample("validation", index, {"scene": 1.0}, drills={"counts": 1.0})
        assert isinstance(picture.facts, Scene)
        for question in picture.questions:
            words = question.text.split()
            things = [one for one in picture.facts.things if words[2] in ("objects", PLURALS[one.shape], one.color)]
            assert question.answer == str(len(things)), question
            answers[question.answer] += 1
    assert {"0", "1", "2", "3"} <= set(answers) and answers["1"] < answers.total() / 2


def test_fields_ask_for_every_label_and_every_value() -> None:
    for index in range(20):
        picture = sample("validation", index, {"document": 1.0}, drills={"fields": 1.0})
        assert isinstance(picture.facts, Document)
        there = dict(picture.facts.rows)
        asked = {q.text.split()[3]: q.answer for q in picture.questions if q.family == "existence"}
        assert asked == {label: "yes" if label in there else "no" for label in LABELS}
        values = {q.text.split()[-2]: q.answer for q in picture.questions if q.family == "document"}
        assert values == there


def test_a_drill_about_another_kind_of_image_is_refused() -> None:
    scene = sample("validation", 1, {"scene": 1.0}).facts
    with pytest.raises(ValueError, match="the drill 'fields' is not about a scene"):
        drill_questions(scene, "fields", random.Random(0))


@pytest.mark.parametrize(("kind", "drill"), [("scene", "sides"), ("document", "fields")])
def test_a_split_does_not_depend_on_drills(kind: str, drill: Drill) -> None:
    with_drills = sample("train", 3, {kind: 1.0}, drills={drill: 1.0})
    without = sample("train", 3, {kind: 1.0})
    assert with_drills.facts == without.facts and with_drills.questions != without.questions


@pytest.mark.parametrize("kind", ["scene", "document", "board"])
def test_every_character_of_a_code_lies_on_some_patch(kind: str) -> None:
    """Its patch has its place and its name, and the token that an answer spells it with."""
    tokenizer = build_tokenizer()
    character, place = (list(PATCH_HEADS).index(name) for name in ("character", "place"))
    codes = 0
    for index in range(30):
        picture = sample("validation", index, {kind: 1.0})
        batch = pack([picture], blocks=1)
        seen = {
            (int(p), CHARACTERS[int(c) - 1], int(token))
            for c, p, token in zip(batch.patches[0, character], batch.patches[0, place], batch.character_targets[0])
            if p > 0
        }
        facts = picture.facts
        if isinstance(facts, Scene):
            words = [facts.sign] if facts.sign else []
        else:
            assert isinstance(facts, (Board, Document))
            words = [code for _, code in (facts.plates if isinstance(facts, Board) else facts.rows)]
        for code in words:
            ids = tokenizer(code, add_special_tokens=False).input_ids
            codes += 1
            assert {(n, c, i) for n, (c, i) in enumerate(zip(code, ids), start=1)} <= seen, code
    assert codes >= 15


def test_every_stage_of_the_recipe_can_be_run() -> None:
    assert len({stage.name for stage in RECIPE}) == len(RECIPE)
    for stage in RECIPE:
        assert stage.images % stage.batch == 0
        assert sum(share for name, share in stage.drills.items() if name != "fields") <= 1
        assert all(0 < stage.rate(step) <= 1 for step in range(stage.steps))
        assert stage.tower_rate > 0 or stage.trains_decoder or stage.projector_weight > 0, "trains nothing"
        picture = sample("train", 0, stage.mix, stage.level(stage.steps // 2), stage.drills)
        assert pack([picture], stage.blocks, stage.families).spans or not stage.trains_decoder


def test_hints_give_each_step_of_the_answer_at_the_word_that_determines_it() -> None:
    options = ("red", "top left", "cyan", "star")
    listed = "A. red B. top left C. cyan D. star answer with the letter ."
    cases = {
        EmbeddedQuestion("attribute", "what shape is the red object ?", "star"): {4: "star"},
        EmbeddedQuestion("position", "where is the red star ?", "top left"): {4: "top", 5: "left"},
        EmbeddedQuestion("relation", "is the red star above the blue ring ?", "no"): {7: "no"},
        EmbeddedQuestion("counting", "how many objects are there ?", "3"): {},
        EmbeddedQuestion("choice", f"where is the red star ? {listed}", "B", options): {
            4: "top", 7: "no", 10: "B", 12: "no", 14: "no", 18: "B"},
    }  # fmt: skip
    for question, expected in cases.items():
        assert dict(hints(question)) == expected, question


def test_hinted_rows_and_answer_rows_are_the_only_targets() -> None:
    tokens = build_tokenizer()
    pictures = [sample("train", n, {"scene": 1.0}, drills={"letters": 0.5, "retrieval": 0.5}) for n in range(4)]
    plain, hinted = pack(pictures, blocks=6), pack(pictures, blocks=6, hinted=True)
    assert (plain.targets[plain.rows] == hinted.targets[plain.rows]).all()
    added, told = hinted.rows & ~plain.rows, 0
    for span in hinted.spans:
        ids = [tokens(word, add_special_tokens=False).input_ids for word in span.question.text.split()]
        start = span.first - sum(map(len, ids)) - 1  # ASSISTANT and its colon stand after the text
        for place, word in hints(span.question):
            row = start + sum(map(len, ids[: place + 1])) - 1
            assert int(hinted.ids[span.image, span.block, row]) == ids[place][-1]
            assert tokens.convert_ids_to_tokens(int(hinted.targets[span.image, span.block, row])) == word
            told += 1
    assert told == int(added.sum()) > 50


def test_the_projector_is_trained_and_its_output_drifts_little() -> None:
    stages = (
        TrainingPhase("projector", images=80, batch=4, mix={"board": 1.0}, trains_decoder=False, projector_weight=1.0,
              drift_weight=3.0, projector_rms=4.0, warm_up=1),
    )  # fmt: skip
    trainer = Trainer(stages, compiled=False)
    losses, moved = [], []
    while not trainer.finished:
        batch = trainer.batch()
        trainer.step(batch)
        seen = trainer.window.take()
        losses.append(seen["patch_column"])
        moved.append(seen["moved"])
        if trainer.step_index == 1:
            projected = trainer.forward.projected(trainer.forward.features(batch.pixels))
            assert projected.pow(2).mean().sqrt().item() == pytest.approx(4.0, rel=0.1)
    assert moved[0] < 1e-4 < moved[-1] < 1, "where matrices are multiplied in bfloat16, it begins at their rounding"
    assert sum(losses[-5:]) > sum(losses[:5])


def test_more_processes_than_images_are_refused() -> None:
    trainer = Trainer(STAGES, compiled=False)
    trainer.check_workers(4)
    with pytest.raises(ValueError, match="at most 4, the images of a step of the stage 'tower', got 5"):
        trainer.check_workers(5)


def _steps(rank: int, recipe: tuple[TrainingPhase, ...], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer = Trainer(recipe, compiled=False)
    while not trainer.finished:
        trainer.step(trainer.batch())
    torch.save(trainer.model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _in_two_processes(recipe: tuple[TrainingPhase, ...], folder: Path) -> list[dict[str, torch.Tensor]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    all_done(_steps, (recipe, folder, port), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_stay_one_model_through_all_kinds_of_stages(tmp_path: Path) -> None:
    first, second = _in_two_processes(STAGES, tmp_path)
    start = Trainer(STAGES, compiled=False).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name and not torch.equal(first[name], start[name]) for name in first), part


@pytest.mark.exhaustive
def test_two_processes_take_the_step_of_their_mean_gradient(tmp_path: Path) -> None:
    first, _ = _in_two_processes(STEP, tmp_path)
    alone = Trainer(STEP, compiled=False)
    for alone.rank in (0, 1):
        alone.workers = 2
        (alone.loss(alone.batch()) / 2).backward()
    alone.optimizer.step(alone.stage.rate(0))
    near = 1e-4 if matrix_dtype() == torch.float32 else 5e-4
    for name, weight in alone.model.state_dict().items():
        assert (weight - first[name]).abs().max() <= near * (1 + weight.abs().max()), name


def test_batches_are_the_same_whoever_composes_them_and_wherever_one_begins() -> None:
    steps = Steps(STAGES)
    assert [steps.place(number) for number in range(len(steps))] == [Place(0, 0), Place(1, 0), Place(2, 0), Place(2, 1)]
    assert [steps.first_image(steps.place(number)) for number in range(len(steps))] == [0, 4, 8, 12]
    assert steps.number(Place(3, 0)) == len(steps) and steps.first_image(Place(3, 0)) == 16, "after the last"
    here, by_others = list(batches(steps, 1)), list(batches(steps, 1, loader_workers=2))
    assert len(here) == len(by_others) == 3
    for one, other in zip(here, by_others):
        assert one.spans == other.spans
        assert all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items() if name != "spans")
    shares = [Steps(STAGES, rank, 2)[0].pixels for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), steps[0].pixels)


def test_a_step_makes_nothing_on_another_device_than_its_own() -> None:
    """A tensor made without naming the device would lie on "meta" here and could not meet the model's."""
    trainer = Trainer(STAGES, compiled=False, device="cpu")
    everything = [trainer.data[number] for number in range(len(trainer.data))]
    with torch.device("meta"):
        for batch in everything:
            trainer.step(batch.to(trainer.device))
    assert trainer.finished and all(weight.device.type == "cpu" for weight in trainer.model.parameters())


@pytest.mark.exhaustive
def test_a_training_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    recipe = (
        TrainingPhase(
            "all at once", images=12, batch=4, blocks=2, character_weight=0.3, tower_rate=0.1, patch_weight=1.0
        ),
    )
    train(tmp_path / "whole", tmp_path / "whole_model", recipe=recipe, window=1, checkpoint_seconds=0)
    cut = Trainer(recipe)
    for _ in range(2):
        cut.step(cut.batch())
    (tmp_path / "cut").mkdir()
    cut.save(tmp_path / "cut/checkpoint.pt")
    train(tmp_path / "cut", tmp_path / "cut_model", loader_workers=1, recipe=recipe, window=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole_model", "cut_model")]
    assert weights[0] == weights[1]
    rows = (tmp_path / "whole_model/curve.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[0].startswith("stage,step,images,cpu_seconds,wall_seconds,loss")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(STAGES, compiled=False)
    for _ in range(2):
        trainer.step(trainer.batch())
    trainer.save(tmp_path / "checkpoint.pt")  # in the third stage
    Trainer((*STAGES, TrainingPhase("more", images=4, batch=4)), compiled=False).load(tmp_path / "checkpoint.pt")
    other = (replace(STAGES[0], images=8), *STAGES[1:])
    with pytest.raises(ValueError, match=r"checkpoint.pt is of another recipe: move it away"):
        Trainer(other, compiled=False).load(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path)])
    assert "is of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "invalid choice: 'gpu'"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--device", "cuda", "--workers", "2"], "--workers 2 share the steps of a CPU"),
        (["--loader-workers", "-1"], "--loader-workers at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err
