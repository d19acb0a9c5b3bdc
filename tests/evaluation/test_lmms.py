"""Scoring through lmms-eval: the paper's tasks on made-up data, on a tiny LLaVA saved in the real format."""

import json
import os
import random
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy
import pytest
import torch
import yaml

from pdrop.evaluation.answers import QuestionError, unpack
from pdrop.evaluation.containment import task_code
from pdrop.evaluation.lmms import check_tasks, evaluate, load_tasks
from pdrop.methods.fastv import FastV
from pdrop.methods.pyramiddrop import PyramidDrop
from pdrop.methods.random_drop import RandomDrop
from pdrop.models.checkpoint import load
from pdrop.samples import read_samples
from pdrop.schedule import Schedule, pyramid, single
from pdrop.store import write_atomically
from tests.support.lmms_evals_command import lmms_evals_command
from tests.support.processes import begun
from tests.support.saved_checkpoints import LAYERS, VISUAL_TOKENS, save_llava
from tests.support.specs import spec_of
from tests.support.synthetic_tasks import TASKS, picture, with_image_features, write_tasks

ROOT = Path(__file__).resolve().parents[2]
METHOD = PyramidDrop(positions="compact")
SCHEDULE = pyramid(LAYERS)
MAIN = {
    "mme": "mme_perception_score",
    "pope": "pope_f1_score",
    "gqa": "exact_match",
    "textvqa_val": "exact_match",
    "mmbench_en_dev_static": "gpt_eval_score",
    "seedbench": "seed_image",
    "seedbench_ppl": "acc",
    "chartqa": "relaxed_overall",
    "docvqa_val": "anls",
    "ai2d": "exact_match",
    "mmstar": "average",
}


@pytest.fixture(scope="session", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return load(str(save_llava(tmp_path_factory.mktemp("evaluate") / "llava")), name="tiny")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run(checkpoint, tasks, tmp_path):
    """evaluate() with this file's defaults; `folder` is a name under tmp_path."""

    def call(names, *, folder="run", method=METHOD, schedule=SCHEDULE, **more):
        said = {name: more.pop(name) for name in list(more) if name not in ("task_dirs", "progress")}
        spec = spec_of(tasks=tuple(names), **{"max_new_tokens": 4, "batch_size": 3} | said)
        return evaluate(checkpoint, method, schedule, spec, tmp_path / folder, **{"task_dirs": [tasks]} | more)

    return call


def samples(folder: Path, task: str) -> list[dict]:
    return read_samples(folder, task)


def stored(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def comparable(evaluation) -> dict:
    """Everything but the time."""
    return {name: asdict(result) | {"wall_s": 0} for name, result in evaluation.results.items()}


# ------------------------------------------------------------------------------------------------ the paper's tasks


# of each kind one: pairs scored together, a picture here and there, likelihoods, an answer of ten, a rule of its own
KINDS = ("mme", "scienceqa_img", "seedbench_ppl", "textvqa_val", "docvqa_val")


@pytest.mark.parametrize("names", [pytest.param(tuple(TASKS), marks=pytest.mark.exhaustive, id="all"), KINDS])
def test_the_papers_tasks(names, run, tmp_path):
    evaluation = run(list(names), limit=7)
    assert list(evaluation.results) == list(names)
    for task, result in evaluation.results.items():
        assert result.n == (8 if task == "mme" else 7), "MME's pairs are scored together: 7 would split one"
        assert result.n_total == 8
        assert result.main_metric == MAIN.get(task, "exact_match")
        assert result.scores[result.main_metric].n == (6 if task == "mme" else 7)
        lines = samples(tmp_path / "run", task)
        assert [line["doc_id"] for line in lines] == list(range(result.n))
        for line in lines:
            images = line["prompt"].count("<image>")
            assert line["visual_tokens"] == images * VISUAL_TOKENS
            shares = [int(line["visual_tokens"] * keep) for keep in (0.5, 0.25, 0.125)]
            assert line["kept_counts"] == shares and line["visual_per_layer"] == [line["visual_tokens"], *shares]
    assert evaluation.asked == len(stored(tmp_path / "run")) and evaluation.reused == 0
    assert len(evaluation.prompts) == evaluation.asked
    assert all(p.visual_per_layer[0] == p.visual and p.text > 0 for p in evaluation.prompts)


def test_right_answers_are_counted(run, tasks, tmp_path):
    run(["gqa"], folder="first")
    given = {sample["doc_id"]: sample["answer"].strip() for sample in samples(tmp_path / "first", "gqa")}
    assert len(set(given.values())) > 4, "the tiny model should not say the same to everything"
    own = write_tasks(tmp_path / "own", ["gqa"])
    data = datasets.Dataset.from_parquet(str(tmp_path / "own" / "gqa.parquet"), cache_dir=str(tmp_path / "cache"))
    rows = [row | {"answer": given[i] if i < 3 else "something else"} for i, row in enumerate(data)]
    with_image_features(rows).to_parquet(tmp_path / "own" / "gqa.parquet")
    result = run(["gqa"], folder="second", task_dirs=[own]).results["gqa"]
    assert result.scores["exact_match"].value == 3 / 8
    assert [s["scores"]["exact_match"] for s in samples(tmp_path / "second", "gqa")] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_group_expands_to_its_tasks(run, tasks, tmp_path):
    own = tmp_path / "groups"
    own.mkdir()
    write_atomically(own / "mine.yaml", yaml.safe_dump({"group": "mine", "task": ["pope", "gqa"]}))
    for name in ("pope", "gqa"):
        write_atomically(own / f"{name}.yaml", (tasks / f"{name}.yaml").read_text())
    evaluation = run(["mine"], task_dirs=[own], limit=2)
    assert set(evaluation.results) == {"pope", "gqa"}


def test_a_folder_of_tasks_is_a_program_and_that_is_said_once(tasks, tmp_path, caplog):
    own = tmp_path / "own"
    write_atomically(own / "mine.yaml", (tasks / "pope.yaml").read_text().replace("task: pope", "task: pope_mine"))
    for name in ("pope_mine", "pope_mine", "embedded_chart"):
        assert load_tasks([name], [own])
    said = [record.getMessage() for record in caplog.records if "!function" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"{own}: lmms-eval runs the Python code")


def test_unknown_tasks_are_named_with_close_matches():
    with pytest.raises(ValueError, match=r"unknown task 'poppe'.*pope"):
        check_tasks(["mme", "poppe"])
    with pytest.raises(ValueError, match="no folder /nowhere"):
        check_tasks(["mme"], ["/nowhere"])
    check_tasks(["mme", "pope_full", "textvqa_val"])


# ---------------------------------------------------------------------------------------- the same whatever the batch


@pytest.mark.parametrize("method", [(None, Schedule()), (METHOD, SCHEDULE), (FastV(), single(2, 0.4, LAYERS))])
def test_a_batch_answers_as_single_questions_do(run, tmp_path, method):
    alone = run(["scienceqa_img", "seedbench"], folder="one", batch_size=1, method=method[0], schedule=method[1])
    batch = run(["scienceqa_img", "seedbench"], folder="many", batch_size=5, method=method[0], schedule=method[1])
    assert comparable(alone) == comparable(batch)
    for task in alone.results:
        assert samples(tmp_path / "one", task) == samples(tmp_path / "many", task)


def test_questions_without_a_picture(run, tmp_path):
    run(["scienceqa_img"], batch_size=8)
    for sample in samples(tmp_path / "run", "scienceqa_img"):
        pictures = int(sample["doc_id"] % 3 != 0)
        assert sample["prompt"].count("<image>") == pictures
        assert sample["visual_tokens"] == pictures * VISUAL_TOKENS
        assert sample["kept"] == (["0", "0", "0"] if not pictures else sample["kept"])
        assert len(unpack(sample["kept"][0])) == pictures * VISUAL_TOKENS // 2


def random_masks(run, tmp_path, own, folder, batch_size):
    run(["pope"], folder=folder, task_dirs=[own], method=RandomDrop(seed=1), batch_size=batch_size)
    return [sample["kept"] for sample in samples(tmp_path / folder, "pope")]


@pytest.mark.parametrize("beams", [1, 2])
def test_random_draws_differ_between_samples_not_between_batches(run, tmp_path, beams):
    own = write_tasks(tmp_path / "own", ["pope"])
    path = str(tmp_path / "own" / "pope.parquet")
    rows = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache")).to_list()
    rows = [row | {"question": "Is it there?", "image": picture(number)} for number, row in enumerate(rows)]
    with_image_features(rows).to_parquet(path)
    override(own, "pope", generation_kwargs={"max_new_tokens": 2, "num_beams": beams})
    alone, batch = (random_masks(run, tmp_path, own, f"by {size}", size) for size in (1, 4))
    assert alone == batch, "the same sample loses the same tokens"
    assert len({mask[0] for mask in alone}) == len(rows), "one question about other pictures loses other tokens"
    with_image_features(rows[::-1]).to_parquet(path)
    assert random_masks(run, tmp_path, own, "reversed", 4) == alone[::-1], "wherever it stands"


def test_one_method_leaves_nothing_behind_for_another(run, tmp_path):
    before = run(["pope"], folder="none", method=None, schedule=Schedule())
    dropped = run(["pope"], folder="dropped")
    after = run(["pope"], folder="again", method=None, schedule=Schedule())
    assert after.asked == dropped.asked == before.asked == 8
    assert comparable(before) == comparable(after)
    assert samples(tmp_path / "none", "pope") == samples(tmp_path / "again", "pope")
    assert all(sample["kept_counts"] == [8, 4, 2] for sample in samples(tmp_path / "dropped", "pope"))


def test_the_random_state_of_the_process_is_left_alone(run):
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run(["pope"], limit=2)
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


# ------------------------------------------------------------------------------------------------- killed and resumed


class Stop(KeyboardInterrupt):
    """Ctrl-C after so many batches."""


def stop_after(batches):
    count = 0

    def hook(task, done, total):
        nonlocal count
        count += 1
        if count == batches:
            raise Stop

    return hook


def test_an_interrupted_run_goes_on(run, tmp_path):
    whole = run(["mme", "scienceqa_img"], folder="whole")
    with pytest.raises(Stop):
        run(["mme", "scienceqa_img"], folder="broken", progress=stop_after(4))
    kept = len(stored(tmp_path / "broken"))
    assert 0 < kept < whole.asked
    with (tmp_path / "broken" / "answers.jsonl").open("a") as file:
        file.write('{"key": "a line that a kill cut sh')
    resumed = run(["mme", "scienceqa_img"], folder="broken")
    assert (resumed.asked, resumed.reused) == (whole.asked - kept, kept)
    assert comparable(resumed) == comparable(whole)
    assert (tmp_path / "broken/samples.zip").read_bytes() == (tmp_path / "whole/samples.zip").read_bytes()
    again = run(["mme", "scienceqa_img"], folder="broken")
    assert (again.asked, again.reused) == (0, whole.asked) and comparable(again) == comparable(whole)


def test_a_kill_inside_a_write_asks_the_whole_batch_again(run, tmp_path):
    whole = run(["pope"], folder="whole")  # in batches of 3, 3 and 2
    lines = (tmp_path / "whole" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    torn = b"".join(lines[:4]) + lines[4][:90]
    broken = tmp_path / "broken" / "answers.jsonl"
    broken.parent.mkdir()
    broken.write_bytes(torn)
    resumed = run(["pope"], folder="broken")
    assert (resumed.asked, resumed.reused) == (5, 3), "what is left of the second batch is not asked alone"
    assert comparable(resumed) == comparable(whole) and resumed.prompts == whole.prompts
    assert broken.read_bytes() == torn + b"\n" + b"".join(lines[3:]), "to the bit, and nothing is taken away"
    again = run(["pope"], folder="broken")
    assert (again.asked, again.reused) == (0, 8) and comparable(again) == comparable(whole)
    assert again.prompts == whole.prompts, "also what went through the tower"


def test_a_foreign_answers_file_is_refused(run, tmp_path):
    write_atomically(tmp_path / "run" / "answers.jsonl", '{"key": "x"}\n{"key": "y"}\n')
    with pytest.raises(ValueError, match="line 1 is not an answer of this version: move the folder away"):
        run(["pope"])


def killed_in_its_third_batch(checkpoint: str, tasks: Path, folder: Path) -> None:
    batches = []

    def hook(task, done, total):
        batches.append(done)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    spec = spec_of(tasks=("gqa", "pope"), batch_size=3, max_new_tokens=4)
    evaluate(load(checkpoint, name="tiny"), METHOD, SCHEDULE, spec, folder, task_dirs=[tasks], progress=hook)


@pytest.mark.slow
def test_a_killed_process_goes_on(run, checkpoint, tasks, tmp_path):
    killed = begun(killed_in_its_third_batch, tmp_path, [], checkpoint.path, tasks, tmp_path / "killed")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    kept = len(stored(tmp_path / "killed"))
    resumed, whole = run(["gqa", "pope"], folder="killed"), run(["gqa", "pope"], folder="whole")
    assert (resumed.asked, resumed.reused) == (16 - kept, kept) and 0 < kept < 16
    assert comparable(resumed) == comparable(whole)
    for task in whole.results:
        assert samples(tmp_path / "killed", task) == samples(tmp_path / "whole", task)


# ------------------------------------------------------------------------------------------------ nothing is swallowed


@dataclass(frozen=True)
class Broken(PyramidDrop):
    """A method with a bug."""

    def score(self, view):
        raise IndexError("a bug of the method")


def test_an_exception_names_the_documents(run, tmp_path):
    with pytest.raises(RuntimeError, match=r"task pope, doc_id \d, \d, \d: IndexError: a bug of the method") as error:
        run(["pope"], method=Broken(positions="compact"))
    assert isinstance(error.value.__cause__, IndexError)
    assert not (tmp_path / "run" / "samples.zip").exists()
    run(["pope"], folder="after")  # nothing stays attached


def test_an_exception_of_a_tasks_own_code_names_the_task():
    told = r"^task pope: its scoring failed: RuntimeError: a bug of the task$"
    with pytest.raises(RuntimeError, match=told) as error, task_code("pope", "its scoring failed"):
        raise RuntimeError("a bug of the task")
    assert str(error.value.__cause__) == "a bug of the task"
    with pytest.raises(QuestionError, match=r"^task pope, doc_id 3: no$"), task_code("pope", "its scoring failed"):
        raise QuestionError("task pope, doc_id 3: no")


def test_a_picture_that_is_cut_short_is_no_picture(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope"])
    path = str(tmp_path / "own" / "pope.parquet")
    data = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    rows = data.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[5]["image"]["bytes"] = rows[5]["image"]["bytes"][: len(rows[5]["image"]["bytes"]) // 2]
    with_image_features(rows).to_parquet(path)
    with pytest.raises(RuntimeError, match=r"task pope, doc_id 5: .*truncated"):
        run(["pope"], task_dirs=[own])


def test_a_prompt_that_does_not_fit_is_not_cut(tasks, tmp_path):
    short = load(str(save_llava(tmp_path / "short", positions=40)), name="short")
    with pytest.raises(RuntimeError, match=r"task pope, doc_id .*the model takes 40: cutting it would cut the image"):
        evaluate(short, None, Schedule(), spec_of(tasks=("pope",)), tmp_path / "run", task_dirs=[tasks])


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started as one process"):
        run(["pope"])


def test_data_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # lmms-eval tries five times
    own = write_tasks(tmp_path / "own", ["pope"])
    (tmp_path / "own" / "pope.parquet").unlink()
    with pytest.raises(RuntimeError, match="task pope: its data cannot be loaded: FileNotFoundError"):
        run(["pope"], task_dirs=[own])


# ----------------------------------------------------------------------------------------------- likelihoods, sampling


def test_likelihoods_are_those_of_the_plain_model(run, checkpoint, tmp_path):
    run(["seedbench_ppl"], method=None, schedule=Schedule(), batch_size=3)
    sample = samples(tmp_path / "run", "seedbench_ppl")[1]
    for letter, loss in zip("ABCD", sample["losses"]):
        full = f"{sample['prompt']} choice {letter}</s>"
        inputs = checkpoint.processor(text=full, images=picture(1), return_tensors="pt")
        with torch.inference_mode():
            logits = checkpoint.model(**inputs).logits[0]
        length = len(f" choice {letter}") + 1
        expected = torch.nn.functional.cross_entropy(logits[-length - 1 : -1], inputs["input_ids"][0, -length:])
        assert loss == pytest.approx(expected.item(), abs=1e-4)
    best = min(range(4), key=lambda i: sample["losses"][i])
    assert sample["metrics"]["acc"] == float("ABCD"[best] == "B")


def override(folder: Path, task: str, **config) -> None:
    path = folder / f"{task}.yaml"
    write_atomically(path, yaml.safe_dump(yaml.safe_load(path.read_text()) | config))


def answers_with(run, tmp_path, own, folder, arguments, **options):
    override(own, "pope", generation_kwargs={"max_new_tokens": 6, **arguments})
    run(["pope"], folder=folder, task_dirs=[own], **options)
    return [sample["answer"] for sample in samples(tmp_path / folder, "pope")]


def test_temperature_alone_samples_and_the_seed_decides_what(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope"], count=4)
    greedy = answers_with(run, tmp_path, own, "greedy", {})
    for number, arguments in enumerate(({"do_sample": True, "temperature": 0}, {"do_sample": False, "top_p": 0})):
        assert answers_with(run, tmp_path, own, f"cold {number}", arguments) == greedy
    for number, sampling in enumerate(({}, {"do_sample": True}, {"do_sample": False})):
        arguments = {"temperature": 5.0, **sampling}
        first, again, other = (
            answers_with(run, tmp_path, own, f"hot {number} {turn}", arguments, seed=seed)
            for turn, seed in enumerate((0, 0, 1))
        )
        assert first == again, "the same seed draws the same"
        assert greedy != first != other != greedy


def test_other_arguments_do_what_they_say(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope"], count=4)
    plain = answers_with(run, tmp_path, own, "plain", {"max_new_tokens": 24})
    never_again = answers_with(run, tmp_path, own, "never", {"max_new_tokens": 24, "repetition_penalty": 1e9})
    assert all(len(set(answer)) < len(answer) for answer in plain)
    assert all(len(set(answer)) == len(answer) > 0 for answer in never_again)
    answers_with(run, tmp_path, own, "long", {"max_new_tokens": 24, "min_new_tokens": 24})
    assert {line["answer_tokens"] for line in stored(tmp_path / "long")} == {24}
    drawn = [answers_with(run, tmp_path, own, f"seed {seed}", {"temperature": 5.0, "seed": seed}) for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_arguments_that_cannot_be_honoured_stop_before_the_first_question(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope", "gqa"], count=2)
    override(own, "gqa", generation_kwargs={"max_new_tokens": 6, "presence_penalty": 1.5})
    with pytest.raises(ValueError, match="task gqa: generation_kwargs: presence_penalty is not known"):
        run(["pope", "gqa"], task_dirs=[own])
    assert not (tmp_path / "run").exists()


def test_until_cuts_the_answer(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope"])
    run(["pope"], folder="whole", task_dirs=[own])
    first = samples(tmp_path / "whole", "pope")[0]["answer"]
    stop = first[3]
    override(own, "pope", generation_kwargs={"max_new_tokens": 24, "until": [stop]})
    run(["pope"], folder="cut", task_dirs=[own])
    assert samples(tmp_path / "cut", "pope")[0]["answer"] == first.split(stop)[0]


# -------------------------------------------------------------------------------------------------- hashes and styles


def test_hashes_tell_other_data_and_other_prompts(run, tmp_path):
    own = write_tasks(tmp_path / "own", ["pope"])
    options = {"method": None, "schedule": Schedule(), "task_dirs": [own]}
    first = run(["pope"], folder="first", **options).results["pope"]
    dropped = run(["pope"], folder="dropped", task_dirs=[own]).results["pope"]
    assert (first.data_hash, first.prompt_hash) == (dropped.data_hash, dropped.prompt_hash)
    styled = run(["pope"], folder="styled", prompt="vicuna_v1", **options).results["pope"]
    assert styled.data_hash == first.data_hash and styled.prompt_hash != first.prompt_hash
    assert samples(tmp_path / "styled", "pope")[0]["prompt"].startswith("A chat between a curious user")
    path = str(tmp_path / "own" / "pope.parquet")
    rows = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache")).to_list()
    rows = [row | {"image": picture(row_number // 3)} for row_number, row in enumerate(rows)]
    rows[2]["image"] = rows[2]["image"].copy()
    rows[2]["image"].putpixel((0, 0), (1, 2, 3))
    with_image_features(rows).to_parquet(path)
    pixel = run(["pope"], folder="pixel", **options).results["pope"]
    assert pixel.data_hash != first.data_hash and pixel.prompt_hash == first.prompt_hash


def test_samples_about_one_picture_share_its_name(run, tmp_path):
    run(["pope", "gqa"])
    pope, gqa = ([s["image"] for s in samples(tmp_path / "run", task)] for task in ("pope", "gqa"))
    assert [pope.index(image) for image in pope] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert gqa == ["n0", "n0", "n1", "n1", "n2", "n2", "n3", "n3"]


# ---------------------------------------------------------------------------------------------- lmms-eval's own command


LIMITED = 5  # an odd number, so that one of two processes has a question less: lmms-eval pads its share
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], pytest.param(ACCELERATE, marks=pytest.mark.exhaustive, id="two processes")])
def test_lmms_evals_own_command_line(run, checkpoint, tasks, tmp_path, launcher):
    own = tmp_path / "own"  # under a name of its own: there a project's `pope` would be ignored
    own.mkdir()
    write_atomically(own / "pope_here.yaml", (tasks / "pope.yaml").read_text().replace("task: pope", "task: pope_here"))
    method = RandomDrop(seed=3, positions="compact")  # draws by seed and sample, so both must agree on those too
    options = {"batch_size": 2, "limit": LIMITED, "task_dirs": [own]}
    here = run(["pope_here"], method=method, schedule=pyramid(LAYERS, ratio=0.4), **options).results["pope_here"]
    arguments = f"pretrained={checkpoint.path},method=random,seed=3,ratio=0.4,max_new_tokens=4,device=cpu"
    more = ["--limit", str(LIMITED), "--batch_size", "2"]
    scores, lines = lmms_evals_command(tmp_path, arguments, "pope_here", own, more, launcher)
    assert scores["pope_accuracy,none"] == here.scores["pope_accuracy"].value
    given = {line["doc_id"]: line["filtered_resps"].strip() for line in lines}
    assert given == {s["doc_id"]: s["answer"].strip() for s in samples(tmp_path / "run", "pope_here")}
