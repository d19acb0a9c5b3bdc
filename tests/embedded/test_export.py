"""The corpus written for other programs: LLaVA JSON and Hugging Face datasets, and training reads it back."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageChops

from pdrop.embedded.export import main, weights
from pdrop.embedded.samples import sample
from pdrop.embedded.vocabulary import FAMILIES
from pdrop.training.conversations import Conversations


def test_llava_json_is_the_corpus_and_training_reads_it(tmp_path) -> None:
    main(["--out", str(tmp_path / "a"), "--split", "validation", "--first", "7", "--images", "5"])
    records = json.loads((tmp_path / "a/validation.json").read_text())
    data = Conversations(tmp_path / "a/validation.json")
    assert len(data) == len(records) == 5
    for index, (record, read) in enumerate(zip(records, data), start=7):
        picture = sample("validation", index)
        assert [turn.answer for turn in read.turns] == [question.answer for question in picture.questions]
        asked = [turn.question.removeprefix("<image>\n") for turn in read.turns]
        assert asked == [question.text for question in picture.questions]
        assert record["families"] == [question.family for question in picture.questions]
        image = Image.open(read.images[0]).convert("RGB")
        assert ImageChops.difference(image, picture.canvas.image.convert("RGB")).getbbox() is None
    main(["--out", str(tmp_path / "b"), "--split", "validation", "--first", "7", "--images", "5"])
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_families_are_chosen_and_weighed(tmp_path) -> None:
    main(["--out", str(tmp_path), "--images", "40", "--families", "reading,counting=0.5", "--mix", "scene"])
    records = json.loads((tmp_path / "train.json").read_text())
    asked = [family for record in records for family in record["families"]]
    everything = [question.family for n in range(40) for question in sample("train", n, {"scene": 1.0}).questions]
    assert set(asked) == {"reading", "counting"} and all(record["kind"] == "scene" for record in records)
    assert asked.count("reading") == everything.count("reading")
    assert 0.2 < asked.count("counting") / everything.count("counting") < 0.8
    for wrong, says in (("reeding", "there is no family 'reeding'; known: existence"), ("chart=x", "as in chart=0.5")):
        with pytest.raises(ValueError, match=says):
            weights(wrong, FAMILIES, "family")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--images", "1", "--families", "chart=-1"])


def test_a_limit_of_questions_an_image_draws_some_of_those_that_are_asked(tmp_path) -> None:
    asked = ["--images", "30", "--families", "existence,position,counting=0.5", "--mix", "scene"]
    main(["--out", str(tmp_path / "all"), *asked])
    main(["--out", str(tmp_path / "two"), *asked, "--turns", "2"])
    whole, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("all", "two"))
    places = []
    for full, few in zip(whole, two, strict=True):
        answers = [(turn["from"], turn["value"].removeprefix("<image>\n")) for turn in full["conversations"]]
        pairs = list(zip(answers[::2], answers[1::2]))
        kept = [(turn["from"], turn["value"].removeprefix("<image>\n")) for turn in few["conversations"]]
        found = [pairs.index(pair) for pair in zip(kept[::2], kept[1::2])]
        assert len(found) == min(2, len(pairs)) and found == sorted(found)
        assert few["conversations"][0]["value"].startswith("<image>\n")
        places += found
    assert max(places) > 4, "not always the first ones"
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--images", "1", "--turns", "0"])


def test_a_hugging_face_dataset(tmp_path) -> None:
    from datasets import load_from_disk

    main(["--out", str(tmp_path), "--split", "test", "--images", "3", "--format", "hf"])
    rows = list(load_from_disk(str(tmp_path / "test")))
    for index, row in enumerate(rows):
        picture = sample("test", index)
        assert row["image"].size == (168, 168) and row["kind"] == picture.kind
        assert row["questions"] == [question.text for question in picture.questions]
        assert row["options"] == [list(question.options) for question in picture.questions]
    assert len(rows) == 3
