"""The embedded corpus, its shipped test split and floors, the task files, the model folder and the training forward."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pdrop.embedded import corpus, samples, scene_questions
from pdrop.embedded.drawing import PATCH_HEADS
from pdrop.embedded.questions import EmbeddedQuestion, as_choice
from pdrop.embedded.samples import sample
from pdrop.embedded.tasks import scoring
from pdrop.embedded.vocabulary import FAMILIES, IMAGE_SIZE, OPTION_LETTERS, VISUAL_TOKENS

TASKS = Path(corpus.__file__).parent / "tasks"
ROWS = pq.read_table(corpus.FOLDER / corpus.TEST_FILE).to_pylist()
FLOORS = json.loads((corpus.FOLDER / corpus.FLOORS_FILE).read_text())


def pictures(count: int, kind: str) -> list[samples.Picture]:
    return [sample("validation", index, {kind: 1.0}) for index in range(count)]


def test_same_seed_same_picture():
    for index in range(5):
        first, second = sample("train", index), sample("train", index)
        assert first.questions == second.questions and first.facts == second.facts
        assert np.array_equal(first.canvas.pixels(), second.canvas.pixels())
        assert np.array_equal(first.canvas.patch_labels(), second.canvas.patch_labels())
    assert first.canvas.pixels().shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert first.canvas.patch_labels().shape == (len(PATCH_HEADS), VISUAL_TOKENS)


def test_splits_cannot_meet():
    starts = sorted(samples.SPLITS.values())
    assert all(b - a >= samples.SPLIT_LENGTH for a, b in zip(starts, starts[1:]))
    with pytest.raises(ValueError, match="index must be"):
        samples.split_seed("train", samples.SPLIT_LENGTH)
    with pytest.raises(ValueError, match="unknown split"):
        samples.split_seed("dev", 0)
    with pytest.raises(ValueError, match="mix must weigh"):
        sample("train", 0, {"photo": 1.0})


def test_scene_answers_follow_from_the_scene():
    seen = Counter()
    for picture in pictures(60, "scene"):
        things = picture.facts.things
        for question in picture.questions:
            seen[question.family] += 1
            words = question.text.split()
            if question.family == "counting":
                name = words[2]
                matching = [t for t in things if name in ("objects", t.color) or name.startswith(t.shape)]
                assert question.answer == str(len(matching))
            elif question.family == "existence":
                wanted = " ".join(words[3:-1])
                assert question.answer == ("yes" if any(wanted in (t.name, t.shape) for t in things) else "no")
            elif question.family == "attribute":
                key, kind = words[4], words[1]
                (thing,) = [t for t in things if key in (t.color, t.shape)]
                assert question.answer == getattr(thing, kind)
            elif question.family == "relation":
                cut = words.index("the", 3)
                first, second = " ".join(words[2:4]), " ".join(words[cut + 1 : cut + 3])
                a, b = (next(t for t in things if t.name == name) for name in (first, second))
                truth = scene_questions.holds(" ".join(words[4:cut]), a, b)
                assert question.answer == ("yes" if truth else "no")
            elif question.family == "position":
                (thing,) = [t for t in things if t.name == " ".join(words[3:5])]
                assert question.answer == scene_questions.cell(thing)
            elif question.family == "reading":
                assert question.answer == picture.facts.sign
    assert set(seen) >= {"counting", "existence", "attribute", "relation", "position", "reading", "multihop"}


def test_next_object_is_the_nearest_on_that_side():
    found = 0
    for picture in pictures(60, "scene"):
        things = picture.facts.things
        for question in picture.questions:
            if question.family != "multihop":
                continue
            words = question.text.split()
            (start,) = [t for t in things if t.name == " ".join(words[-3:-1])]
            relation = " ".join(words[6 : words.index("the", 6)])
            sign, axis = {"left of": (-1, "x"), "right of": (1, "x"), "above": (-1, "y"), "below": (1, "y")}[relation]
            ahead = {t: sign * (getattr(t, axis) - getattr(start, axis)) for t in things}
            reached = min((t for t in things if ahead[t] > 0), key=lambda t: ahead[t])
            assert question.answer == getattr(reached, words[1])
            found += 1
    assert found > 20


def test_document_and_chart_answers_follow_from_the_facts():
    for picture in pictures(40, "document"):
        rows = dict(picture.facts.rows)
        labels = list(rows)
        for question in picture.questions:
            label = question.text.split()[-2]
            if question.family == "document":
                assert question.answer == rows[label]
            elif question.family == "multihop":
                step = 1 if "below" in question.text else -1
                assert question.answer == rows[labels[labels.index(label) + step]]
    for picture in pictures(40, "chart"):
        bars = dict(picture.facts.bars)
        for question in picture.questions:
            words = question.text.split()
            if question.family == "chart" and words[:5] == ["what", "is", "the", "value", "of"]:
                assert question.answer == str(bars[words[6]])
            elif question.family == "chart" and words[0] == "which":
                best = max if words[4] in ("tallest", "largest") else min
                assert bars[question.answer] == best(bars.values())
            elif question.family == "multihop" and words[0] == "what" and words[1] == "color":
                side = -1 if "left" in words else 1
                assert list(bars)[list(bars).index(words[-3]) + side] == question.answer


def test_choice_lists_the_answer_once():
    found = [q for p in pictures(40, "scene") for q in p.questions if q.family == "choice"]
    assert found
    for question in found:
        assert len(set(question.options)) == 4
        right = question.options[OPTION_LETTERS.index(question.answer)]
        assert f"{question.answer}. {right}" in question.text
    with pytest.raises(ValueError, match="three wrong options"):
        as_choice(EmbeddedQuestion("attribute", "what color is the star ?", "red"), ["red", "blue"], None)


def test_yes_and_no_are_balanced():
    answers = Counter()
    for index in range(400):
        for question in sample("train", index).questions:
            if question.family in ("existence", "relation"):
                answers[question.family, question.answer] += 1
    for family in ("existence", "relation"):
        share = answers[family, "yes"] / (answers[family, "yes"] + answers[family, "no"])
        assert 0.44 < share < 0.56


def test_shipped_split_is_what_the_generator_writes(tmp_path):
    """All families' first rows; the bytes of the PNGs too, if this Pillow compresses as the one that wrote them."""
    made = {row["question_id"]: row for row in corpus.rows(per_family=6)}
    shipped = {row["question_id"]: row for row in ROWS if row["question_id"] in made}
    assert list(made) == list(shipped)
    for name, row in made.items():
        other = shipped[name]
        assert {k: v for k, v in row.items() if k != "image"} == {k: v for k, v in other.items() if k != "image"}
        new, old = (np.asarray(Image.open(io.BytesIO(r["image"]["bytes"]))) for r in (row, other))
        assert np.array_equal(new, old)
    for name in ("a", "b"):
        corpus.write_parquet(list(made.values()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (corpus.FOLDER / corpus.TEST_FILE).stat().st_size < 4e6


def test_floors_are_what_the_rule_scores():
    assert list(FLOORS["families"]) == list(FAMILIES)
    for family, floor in FLOORS["families"].items():
        asked = [row for row in ROWS if row["family"] == family]
        hits = sum(corpus.guess(floor["rule"], row["question"]) == row["answer"] for row in asked)
        assert floor["n"] == len(asked) >= 200
        assert floor["floor"] == pytest.approx(hits / len(asked))
    # things of one scene are often alike in shape, so that naming the one asked about is right more often than any word
    repeated = FLOORS["families"]["multihop"]["rule"]["what shape is the next object above the <color> <shape> ?"]
    assert repeated == "<shape>"
    assert corpus.guess({"what <color> ?": "<color>"}, "what red ?") == "red"
    small = corpus.blind_rule(images=300)
    assert small["relation"].keys() == FLOORS["families"]["relation"]["rule"].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_task_file_has_rows(family):
    text = (TASKS / f"embedded_{family}.yaml").read_text()
    config = yaml.safe_load(text.replace("!function ", ""))
    assert config["task"] == f"embedded_{family}" and (TASKS / config["include"]).exists()
    assert config["process_docs"] == f"scoring.{family}"

    class Rows(dict):
        def select(self, chosen):
            return [ROWS[index] for index in chosen]

    kept = getattr(scoring, family)(Rows(family=[row["family"] for row in ROWS]))
    assert len(kept) >= 200 and {row["family"] for row in kept} == {family}


def test_existence_is_scored_as_pope():
    from pdrop.evaluation.lmms import import_lmms_eval

    import_lmms_eval()  # as a run does: it undoes what the import does to other libraries
    row = {"question_id": "existence-0000", "answer": "yes"}
    hit, miss = (scoring.existence_results(row, [said]) for said in (" Yes.", "no"))
    assert (hit["exact_match"], miss["exact_match"]) == (1.0, 0.0)
    lie = scoring.existence_results(row | {"answer": "no"}, ["yes"])
    assert scoring.f1([hit["f1"], miss["f1"], lie["f1"]]) == pytest.approx(0.5)
    assert scoring.f1([miss["f1"]]) == 0.0


def test_tokenizer_writes_every_word_of_the_split():
    from pdrop.embedded.tokenizer import UNKNOWN, build_tokenizer

    tokenizer = build_tokenizer()
    assert not any(UNKNOWN in tokenizer.tokenize(row["question"]) for row in ROWS)
    for answer in {row["answer"] for row in ROWS}:
        assert tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids) == answer


def test_shipped_model_folder_loads_and_answers():
    from pdrop.embedded.model import FOLDER
    from recipes.embedded.score import Scorer

    assert (FOLDER / "model.safetensors").stat().st_size <= 12e6
    scorer = Scorer(FOLDER)
    assert scorer.model.config.text_config.num_hidden_layers == 12
    row = ROWS[0]
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    ids = scorer.processor(images=image, text="USER: <image>\nwhat ? ASSISTANT:").input_ids
    assert np.asarray(ids).flatten().tolist().count(scorer.image_id) == VISUAL_TOKENS
    rows = [row for row in ROWS if row["family"] == "attribute"][:8]
    right = sum(said == row["answer"] for said, row in zip(scorer.answer(rows), rows))
    assert right >= 5
    assert scorer.answer(rows[:1])[0] == scorer.answer(rows)[0]


def test_training_forward_is_the_model_that_is_shipped():
    """Packed questions after one prefix give the logits of transformers on each question alone."""
    import torch

    from pdrop.embedded.model import build
    from pdrop.embedded.tokenizer import IMAGE_ID
    from recipes.embedded.batches import pack, prefix_ids
    from recipes.embedded.forward import PackedForward

    model = build(seed=1).eval()
    picture = sample("train", 1)
    batch = pack([picture], blocks=3)
    assert len(batch.spans) >= 4
    forward = PackedForward(model, compiled=False)
    with torch.no_grad():
        features = forward.features(batch.pixels)
        packed = torch.zeros(*batch.ids.shape, model.config.text_config.vocab_size)
        packed[batch.rows] = forward.logits(features, prefix_ids(), batch.ids, batch.positions, batch.mask, batch.rows)
        pixels = batch.pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        for span in batch.spans:
            own = batch.mask[0, span.block, span.last - 1].nonzero().flatten()
            ids = batch.ids[0, span.block, own]
            head = torch.cat([prefix_ids(), torch.full((VISUAL_TOKENS,), IMAGE_ID)])
            ours = packed[0, span.block, span.first : span.last]
            theirs = model(input_ids=torch.cat([head, ids])[None], pixel_values=pixels).logits[0, -len(ours) :]
            assert (ours - theirs).abs().max() < 0.05 * theirs.std() + 0.05
