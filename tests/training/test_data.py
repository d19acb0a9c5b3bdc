"""LLaVA's data as training reads it: records, masks, batches, and the official codes' losses through all of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdrop import PyramidDrop, Schedule, Stage, attach
from pdrop.evaluation.prompts import VICUNA_V1_SYSTEM
from pdrop.models.checkpoint import load
from pdrop.training.batches import ByModality, Collator
from pdrop.training.conversations import Conversations, Record, Turn, parse
from pdrop.training.encode import Encoder
from tests.engine.test_vectors import GRADIENTS, IMAGE, read_case, read_model, schedule_of
from tests.support.conversations import captions, picture, records, said, write_conversations
from tests.support.saved_checkpoints import save_llava, save_llava_next, save_qwen2_5_vl

HALF = Schedule((Stage(1, 0.5), Stage(2, 0.25)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {"llava": save_llava, "llava_next": save_llava_next, "qwen2_5_vl": save_qwen2_5_vl}
    return {name: load(str(save(folder / name)), name=name) for name, save in saved.items()}


@pytest.fixture
def data(tmp_path) -> Conversations:
    return Conversations(write_conversations(tmp_path), tmp_path / "pictures")


# ---------------------------------------------------------------- the official numbers


class Words:
    """A processor whose words are the ids of the vectors, and whose pictures are as many tokens as they are wide."""

    image_token, image_processor = "<image>", SimpleNamespace(to_dict=dict)
    chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}{% endfor %}"
    )

    def __init__(self) -> None:
        inner = Tokenizer(models.WordLevel({"<image>": IMAGE, "pad": 1} | {f"w{n}": n for n in range(2, 128)}, "pad"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="pad")
        self.tokenizer.chat_template = self.chat_template

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def __call__(self, text: list[str], images: list[Image.Image], **options: Any) -> dict[str, torch.Tensor]:
        ids = torch.full((1, images[0].width), IMAGE)
        return {"input_ids": ids, "attention_mask": ids + 1, "pixel_values": torch.zeros(1, 3, 28, 28)}


def as_record(row: int, case: dict[str, Any], folder: Path) -> Record:
    """A row of a training vector as the conversation it stands for."""
    arrays = case["arrays"]
    ids = arrays["input_ids"][row][arrays["attention_mask_ids"][row].bool()].tolist()
    width = case["image_tokens"][row]
    at = ids.index(-200)
    labels = arrays["labels"][row].tolist()
    answered = [labels[n if n < at else n + width - 1] != -100 for n in range(len(ids))]
    turns: list[list[list[str]]] = []
    for id_, answer, before in zip(ids, answered, [False, *answered]):
        if not answer and (before or not turns):
            turns.append([[], []])
        turns[-1][answer].append("<image>" if id_ == -200 else f"w{id_}")
    path = folder / f"{row}.png"
    picture(path, (width, 1), row)
    return Record(f"row {row}", (path,), tuple(Turn(" ".join(q), " ".join(a) or None) for q, a in turns))


@pytest.mark.parametrize("name", ["t01", "t02"])
def test_the_official_loss_and_gradients_through_records_masks_and_batches(name, tmp_path) -> None:
    case = read_case("pdrop/manifest.json", name)
    arrays = case["arrays"]
    encoder = Encoder(Words(), "chat")
    rows = [encoder(as_record(row, case, tmp_path)) for row in range(len(arrays["labels"]))]
    batch = Collator(encoder, pad_id=1)(rows)
    assert torch.equal(batch["labels"], arrays["labels"])
    assert torch.equal(batch["attention_mask"].bool(), arrays["attention_mask"].bool())
    embeddings = arrays["inputs_embeds"].float()
    model = read_model(case, embeddings[batch["input_ids"] == IMAGE]).train()
    with attach(model, PyramidDrop(), schedule_of(case)) as trace:
        out = model(**batch, use_cache=False)
        out.loss.backward()
    for stage, kept in enumerate(trace.kept):
        for row, indices in enumerate(kept):
            assert indices.tolist() == arrays[f"stage{stage}_b{row}_kept"].tolist()
    assert abs(float(out.loss.detach()) - case["loss"]) < 1e-5
    compared = 0
    for parameter, norm in case["grad_norms"].items():
        if parameter != "model.embed_tokens.weight":
            ours = model.get_parameter(parameter.replace("model.", "model.language_model.", 1))
            assert abs(float(ours.grad.double().norm()) - norm) <= GRADIENTS * norm, parameter
            compared += 1
    assert compared == 74


# ---------------------------------------------------------------- masks


def shown(checkpoint: Any, row: dict[str, torch.Tensor]) -> tuple[str, list[str]]:
    """A row's text with one <image> for each image, and the runs of labels as text."""
    tokenizer = checkpoint.processor.tokenizer
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    runs: list[list[int]] = []
    for before, now in zip([-100, *labels], labels):
        if now != -100:
            runs += [[]] if before == -100 else []
            runs[-1].append(now)
    image = checkpoint.model.config.image_token_id
    single = [i for at, i in enumerate(ids) if i != image or ids[at - 1] != image]
    return tokenizer.decode(single), [tokenizer.decode(run) for run in runs]


def test_vicuna_v1_asks_for_answers_alone(checkpoints, data) -> None:
    llava = checkpoints["llava"]
    row = Encoder(llava.processor, "vicuna_v1")(data[1])
    text, answers = shown(llava, row)
    question = "USER: <image>\nWhat is it? ASSISTANT: abab</s>USER: Sure? ASSISTANT: yes</s>"
    assert text == f"<s>{VICUNA_V1_SYSTEM} {question}"
    assert answers == [" abab</s>", " yes</s>"]
    query = (row["labels"][1:] != -100) & (row["labels"][:-1] == -100)
    assert llava.processor.tokenizer.decode(row["input_ids"][:-1][query]) == "::", "as in inference"


def test_plain_is_the_image_and_its_caption(checkpoints, tmp_path) -> None:
    llava = checkpoints["llava"]
    data = Conversations(write_conversations(tmp_path, captions(tmp_path)), tmp_path / "pictures")
    row = Encoder(llava.processor, "plain")(data[2])
    assert shown(llava, row) == ("<s><image>caption 2\n", ["caption 2\n"])
    with attach(llava.model.train(), PyramidDrop(), HALF) as trace:
        loss = llava.model(**Collator(Encoder(llava.processor, "plain"), 0)([row])).loss
        loss.backward()
    assert loss.isfinite()
    # the query is the image's last token: it stays, and counts among those kept
    assert [len(kept[0]) for kept in trace.kept] == [8, 4]
    assert all(kept[0][-1] == 15 for kept in trace.kept)
    talk = Conversations(write_conversations(tmp_path, [{"id": "t", "conversations": said("Hello", "Hi")}]))
    with pytest.raises(ValueError, match=r"record 0 \(id t\): the plain format is for one image and one caption"):
        Encoder(llava.processor, "plain").check(talk)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_chat_rows_are_what_inference_asks(family, checkpoints, data) -> None:
    """The row up to an answer is, to the id, the prompt that run.py would ask; pixels too."""
    checkpoint = checkpoints[family]
    template = checkpoint.processor.chat_template.replace(
        "{% for m in messages %}USER: ",
        "{% for m in messages %}"
        "{% if m['role'] == 'assistant' %}ASSISTANT: {{ m['content'][0]['text'] }}</s>{% else %}USER: ",
    ).replace("{% endif %}{% endfor %} {% endfor %}", "{% endif %}{% endfor %} {% endif %}{% endfor %}")
    original, checkpoint.processor.chat_template = checkpoint.processor.chat_template, template
    try:
        encoder = Encoder(checkpoint.processor, "chat")
        for index, images in ((3, 1), (6, 2), (9, 0)):
            record = data[index]
            row = encoder(record)
            _, answers = shown(checkpoint, row)
            assert answers == [f" {turn.answer}</s>" for turn in record.turns if turn.answer is not None]
            asked = encoder.builder.render(record.turns[0].question.replace("<image>\n", "<image>"), images)
            pictures = [[Image.open(path) for path in record.images]]
            prompt = encoder.builder.encode([asked], pictures)
            first = int((row["labels"] != -100).nonzero()[0])
            assert row["input_ids"][:first].tolist() == prompt["input_ids"][0].tolist()
            for name in set(prompt) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
                assert torch.equal(row[name], prompt[name]), name
    finally:
        checkpoint.processor.chat_template = original


def test_a_template_that_rewrites_earlier_turns_is_refused(checkpoints, data) -> None:
    processor = checkpoints["llava"].processor
    original = processor.chat_template
    processor.chat_template = "{{ messages | length }}" + original
    try:
        with pytest.raises(ValueError, match=r"rewrites earlier turns.*set train.format=vicuna_v1"):
            Encoder(processor, "chat")(data[1])
    finally:
        processor.chat_template = original


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_record_in_a_batch_gets_what_it_gets_alone(family, checkpoints, data) -> None:
    """Several image counts, text alone, an open end; tiles that differ in number. Losses add up to the batch's."""
    checkpoint = checkpoints[family]
    model = checkpoint.model.train()
    encoder = Encoder(checkpoint.processor, "vicuna_v1")
    rows = [encoder(data[index]) for index in (1, 2, 6, 7, 8)]
    collator = Collator(encoder, pad_id=0)
    with torch.no_grad(), attach(model, PyramidDrop(), HALF) as trace:
        whole = model(**collator(rows), use_cache=False).loss
        kept = [[row.tolist() for row in stage] for stage in trace.kept]
        total, answers = 0.0, 0
        for at, row in enumerate(rows):
            count = int((row["labels"] != -100).sum())
            total += float(model(**collator([row]), use_cache=False).loss) * count
            answers += count
            assert [stage[0].tolist() for stage in trace.kept] == [stage[at] for stage in kept]
    assert float(whole) == pytest.approx(total / answers, abs=1e-5)


def test_a_batch_of_text_alone_can_carry_an_image_that_changes_nothing(checkpoints, data) -> None:
    checkpoint = checkpoints["llava"]
    model = checkpoint.model.train()
    encoder = Encoder(checkpoint.processor, "vicuna_v1")
    rows = [encoder(data[index]) for index in (8, 9)]
    plain, carried = Collator(encoder, 0)(rows), Collator(encoder, 0, always_image=True)(rows)
    assert "pixel_values" not in plain and len(carried["pixel_values"]) == 1
    gradients = []
    for batch in (plain, carried):
        model.zero_grad()
        with attach(model, PyramidDrop(), HALF):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    reached = {name for name in gradients[1] if "projector" in name}
    assert reached and all(not gradients[1][name].any() for name in reached), "there, and zero"
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-4, atol=1e-5)


def test_steps_are_of_one_modality_and_like_lengths() -> None:
    lengths = [100 + n for n in range(40)] + [-n - 1 for n in range(20)]
    sampler = ByModality(lengths, batch=4, seed=0, epoch=lambda: 0)
    order = list(sampler)
    assert sorted(order) == list(range(60))
    steps = [order[at : at + 4] for at in range(0, 60, 4)]
    assert all(len({lengths[index] < 0 for index in step}) == 1 for step in steps)
    assert all(max(lengths[i] for i in s) - min(lengths[i] for i in s) == 3 for s in steps)
    again, other = ByModality(lengths, 4, 0, lambda: 0), ByModality(lengths, 4, 0, lambda: 1)
    assert list(again) == order != list(other)
    modalities = [lengths[step[0]] < 0 for step in steps]
    assert modalities != sorted(modalities), "steps come in random order"


# ---------------------------------------------------------------- length


def test_a_row_is_cut_behind_its_images_and_never_inside(checkpoints, data, caplog) -> None:
    llava = checkpoints["llava"]
    full = Encoder(llava.processor, "vicuna_v1")(data[1])
    cut = Encoder(llava.processor, "vicuna_v1", max_length=len(full["input_ids"]) - 3)(data[1])
    assert torch.equal(cut["input_ids"], full["input_ids"][:-3]) and torch.equal(cut["labels"], full["labels"][:-3])
    end = int((full["input_ids"] == llava.model.config.image_token_id).nonzero()[-1]) + 1
    none = Encoder(llava.processor, "vicuna_v1", max_length=end)(data[1])
    assert "nothing of its answers fits" in caplog.text and (none["labels"] == -100).all()
    with pytest.raises(ValueError, match=rf"record 1 \(id i1\): its images end at token {end}, max_length is"):
        Encoder(llava.processor, "vicuna_v1", max_length=end - 1)(data[1])
    skipped = Encoder(llava.processor, "vicuna_v1", max_length=end - 1, overlong="skip")(data[1])
    assert set(skipped) == {"input_ids", "attention_mask", "labels"} and (skipped["labels"] == -100).all()


# ---------------------------------------------------------------- records


def test_records_are_read_as_llava_reads_them(tmp_path) -> None:
    listed = records(tmp_path / "pictures")
    listed.append({"id": "late", "conversations": [{"from": "gpt", "value": "I begin"}, *said("Hello", "Hi")]})
    data = Conversations(write_conversations(tmp_path, listed), tmp_path / "pictures")
    assert len(data) == len(listed)
    assert data[7].turns == (Turn("<image>\nWhat?", "it"), Turn("And then?", None)), "the mark goes to the front"
    assert data[6].turns[0].question == "<image> or <image>?", "several marks stay where they are"
    assert data[11].turns == (Turn("Hello", "Hi"),), "what was said before the first question is left out"
    assert all(length > 0 for length in data.lengths[:8]) and all(length < 0 for length in data.lengths[8:])
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in listed))
    same = Conversations(lines, tmp_path / "pictures")
    assert same.fingerprint == data.fingerprint and same[3].turns == data[3].turns
    picture(tmp_path / "pictures/0.png", (9, 9), 5)
    assert Conversations(lines, tmp_path / "pictures").fingerprint != data.fingerprint


FAULTS = [
    ({"conversations": said("<image>\nA?", "b")}, r"mark 1 images with <image>, but `image` lists 0; mark each"),
    ({"image": "0.png", "conversations": said("A?", "b")}, r"mark 0 images with <image>, but `image` lists 1"),
    ({"image": "none.png", "conversations": said("<image>A?", "b")}, "there is no image .*none.png; train.images is"),
    ({"image": 7, "conversations": said("A?", "b")}, "`image` is a path or a list of paths"),
    ({}, "it has no `conversations`"),
    ({"conversations": said("A?")}, "nothing is answered in it"),
    ({"conversations": said("A?", " ")}, "turn 1, an answer, is empty"),
    ({"conversations": said("A?", "<image>")}, "turn 1, an answer, marks an image"),
    ({"conversations": said("A?", "b")[:1] * 2 + said("A", "b")[1:]}, "human and gpt do not take turns"),
    ({"conversations": [{"role": "user", "content": "A?"}]}, 'turn 0 is not of the form {"from"'),
    ({"video": "v.mp4", "conversations": said("A?", "b")}, "videos are not supported"),
    ("text", "a record is an object with `conversations`, not str"),
]


@pytest.mark.parametrize(("fault", "says"), FAULTS)
def test_a_faulty_record_is_named_with_the_remedy(fault, says, tmp_path) -> None:
    good = records(tmp_path / "pictures", 1)[:1]
    if isinstance(fault, dict):
        fault = {"id": "x9"} | fault
    name = r"train.json, record 1 \(id x9\): " if isinstance(fault, dict) else "train.json, record 1: "
    with pytest.raises(ValueError, match=name + ".*" + says):
        Conversations(write_conversations(tmp_path, [*good, fault]), tmp_path / "pictures")


def test_many_faults_are_counted_and_files_are_checked(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"record 0.*record 2.*\(and 4 more records\)"):
        Conversations(write_conversations(tmp_path, [{}] * 7))
    with pytest.raises(ValueError, match=r"there is no record in it"):
        Conversations(write_conversations(tmp_path, []))
    with pytest.raises(ValueError, match=r"no such file; train\.data is"):
        Conversations(tmp_path / "gone.json")
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(ValueError, match=r"broken.json is not JSON"):
        Conversations(tmp_path / "broken.json")
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="a list of records is expected, not dict"):
        Conversations(tmp_path / "object.json")


def test_a_broken_image_and_a_spelled_out_token_are_named(checkpoints, tmp_path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    record = parse({"id": 4, "image": "bad.png", "conversations": said("<image>A?", "b")}, "d.json, record 4", tmp_path)
    with pytest.raises(ValueError, match=r"d.json, record 4: .*bad.png cannot be read as an image"):
        Encoder(checkpoints["llava"].processor, "vicuna_v1")(record)
    text = parse({"conversations": said("A <|image_pad|>?", "b")}, "d.json, record 5", tmp_path)
    with pytest.raises(ValueError, match=r"record 5: its text spells out <\|image_pad\|>"):
        Encoder(checkpoints["qwen2_5_vl"].processor, "vicuna_v1")(text)


def test_patches_instead_of_pictures(checkpoints, data) -> None:
    """Qwen2.5-VL: patches instead of pictures, token types for its positions."""
    checkpoint = checkpoints["qwen2_5_vl"]
    encoder = Encoder(checkpoint.processor, "vicuna_v1")
    batch = Collator(encoder, pad_id=0)([encoder(data[index]) for index in (0, 6, 9)])
    model = checkpoint.model.train()
    with attach(model, PyramidDrop(positions="original"), HALF) as trace:
        model(**batch, use_cache=False).loss.backward()
    assert trace.visual[2] == 0 and min(trace.visual[:2]) > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if "proj" in n)
