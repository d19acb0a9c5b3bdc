"""run.py as a user calls it, in one process: finished, skipped, failed, refused, swept."""

import os
import resource
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pdrop import store
from pdrop.cli import compose as conf
from pdrop.cli import run
from pdrop.evaluation import task_index
from pdrop.methods.base import Method, View
from pdrop.record import RunRecord, read_records
from pdrop.runs import run as run_module
from pdrop.runs.settings import Settings
from pdrop.samples import read_samples
from pdrop.schedule import Schedule
from tests.support.command_line import called

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["tasks=embedded_chart", "limit=4", "batch_size=2", "latency=off"]


@dataclass(frozen=True)
class Breaks(Method):
    """A method that fails in the middle of a forward."""

    observe: int = 0  # type: ignore[misc]  # a dial of the method whose place it takes

    def score(self, view: View):
        raise ZeroDivisionError("broken on purpose")


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Call the command line with overrides in an empty folder; returns (exit code, what it printed, the store)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, Path]:
        return *called(run.main, "run.py", arguments, monkeypatch, capfd), tmp_path / "results"

    return call


def test_a_run_leaves_one_truthful_record(command):
    code, said, store = command(*QUICK, "ratio=0.5", "experiment=first")
    assert code == 0, said
    (record,) = read_records(store / "runs")
    spec, cost = record.spec, record.cost
    assert record.status == "done" and record.error is None
    assert (spec.method, spec.schedule, spec.positions) == ("pyramiddrop", "3:0.5 6:0.25 9:0.125", "compact")
    result = record.results["embedded_chart"]
    assert result.n == 4 and 0 <= result.scores[result.main_metric].value <= 1
    assert cost is not None and cost.samples == 4
    assert cost.visual_tokens_per_layer == [144] * 3 + [72] * 3 + [36] * 3 + [18] * 3
    assert cost.mean_keep == pytest.approx(0.46875)
    assert 0.4 < cost.prefill_flops_ratio < 1 and cost.paper_macs_visual > 0
    tokens = [n + cost.text_tokens for n in cost.visual_tokens_per_layer]
    assert cost.kv_bytes == pytest.approx(sum(tokens) * 2 * 128 * 4)  # keys and values, hidden 128, float32
    assert cost.prefill_time_ratio is None, "not timed is missing, not 1"
    assert record.environment["packages"]["torch"] and record.command == [
        "run.py",
        *QUICK,
        "ratio=0.5",
        "experiment=first",
    ]
    folder = store / "runs" / spec.folder
    samples = read_samples(folder, "embedded_chart")
    assert [s["doc_id"] for s in samples] == [0, 1, 2, 3]
    assert (store / "experiments/first" / spec.folder).exists()


def test_a_finished_run_is_skipped_and_force_redoes_it(command):
    command(*QUICK, "method=fastv")
    folder = next((Path("results") / "runs").iterdir())
    before = (folder / "record.json").read_text()
    code, said, _ = command(*QUICK, "method=fastv", "ratio=0.50")
    assert code == 0 and "done already" in said
    assert (folder / "record.json").read_text() == before
    code, said, _ = command(*QUICK, "method=fastv", "force=true")
    after = RunRecord.read(folder)
    assert code == 0 and "done already" not in said and after.to_json() != before
    assert after.results["embedded_chart"].scores == RunRecord.from_json(before).results["embedded_chart"].scores


def test_dials_that_do_not_matter_are_one_run(command):
    code, said, store = command("-m", *QUICK, "method=none", "ratio=0.3,0.5", "stages=3,4", "seed=0,1")
    assert code == 0, said
    (record,) = read_records(store / "runs")
    assert record.spec.schedule == "" and record.cost is not None and record.cost.prefill_flops_ratio == 1
    assert "1 run of 8 jobs" in said and "1 done in" in said


def test_a_failing_run_fails_and_the_others_go_on(command):
    broken = f"{__name__}.Breaks"
    code, said, store = command("-m", *QUICK, f"method._target_={broken},pdrop.methods.pyramiddrop.PyramidDrop")
    assert code == 1 and said.count("ZeroDivisionError: broken on purpose") == 1, said
    assert "2 runs: 1 done in" in said and "1 failed" in said and "Traceback" not in said
    status = {record.status: record for record in read_records(store / "runs")}
    assert sorted(status) == ["done", "failed"]
    assert "broken on purpose" in status["failed"].error and not status["failed"].results
    again, said, _ = command("-m", *QUICK, f"method._target_={broken},pdrop.methods.pyramiddrop.PyramidDrop")
    assert again == 1 and said.count("done already") == 1, "a failed run is tried again, a finished one is not"


def test_an_interrupt_ends_in_one_line_and_the_same_command_goes_on(command, monkeypatch):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure", interrupted)
        code, said, store = command(*QUICK, "method=fastv")
    assert code == 130 and "resumes from here" in said and "Traceback" not in said
    assert [record.status for record in read_records(store / "runs")] == ["failed"]
    code, said, _ = command(*QUICK, "method=fastv")
    assert code == 0 and [record.status for record in read_records(store / "runs")] == ["done"]


def test_jobs_that_share_a_store_take_turns_at_one_run(command, monkeypatch):
    command(*QUICK, "method=fastv")
    folder = next((Path("results") / "runs").iterdir())
    finished = (folder / "record.json").read_text()
    (folder / "record.json").unlink()
    (folder / "answers.jsonl").unlink()
    holding, waited, say = threading.Event(), threading.Event(), store.log.info

    def said_so(text: str, *more: object) -> None:
        say(text, *more)
        if text.startswith("waiting"):
            waited.set()

    monkeypatch.setattr(store.log, "info", said_so)

    def other_job() -> None:
        with store.locked(folder):
            holding.set()
            waited.wait(timeout=60)
            (folder / "record.json").write_text(finished)

    job = threading.Thread(target=other_job)
    job.start()
    holding.wait()
    code, said, _ = command(*QUICK, "method=fastv")
    job.join()
    assert code == 0 and "waiting" in said and "done already" in said, said
    assert (folder / "record.json").read_text() == finished and not (folder / "answers.jsonl").exists()


def test_what_changes_numbers_changes_the_identity(command, tmp_path):
    def run_ids() -> set[str]:
        return {record.run_id for record in read_records(tmp_path / "results/runs")}

    tasks = tmp_path / "tasks"
    shutil.copytree(ROOT / "pdrop/embedded/tasks", tasks, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "pdrop/embedded/data", tmp_path / "data")
    call = (*QUICK, "method=none", f"task_folders=[{tasks}]")
    command(*QUICK, "method=none")
    command(*call)
    shipped = run_ids()
    assert len(shipped) == 1, "the same files in another folder are the same tasks"
    template = tasks / "_embedded_template_yaml"
    template.write_text(template.read_text() + "\n# changed\n")
    task_index.content.cache_clear()  # read once a process
    code, said, _ = command(*call)
    assert code == 0 and len(run_ids()) == 2, said
    quick = ["latency=quick", "latency.warmup=1", "latency.min_seconds=0"]
    command(*QUICK[:-1], *quick, "latency.pairs=1")
    command(*QUICK[:-1], *quick, "latency.pairs=2")
    assert len(run_ids()) == 4, "another protocol is another measurement"


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    """A folder with a checkpoint that sees nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


REFUSED = {
    "ratio": (["ratio=1.2"], ["ratio", "1.2", "between 0 and 1"]),
    "ratio is not a number": (["ratio=half"], ["ratio", "half"]),
    "stages": (["stages=40"], ["40 stages", "12 layers"]),
    "layers": (["layers=[3,12]"], ["layer 12", "0..11"]),
    "layers fall": (["layers=[6,3]"], ["rise"]),
    "layer 0": (["method=fastv", "layers=[0]"], ["FastV", "boundary 0", "layers=[1]"]),
    "a grid thinned out twice": (["method=pool", "layers=[0,2]"], ["exactly one boundary"]),
    "fastv takes one layer": (["method=fastv", "layers=[2,4]"], ["exactly one boundary"]),
    "task": (["tasks=embedded_chrat"], ["embedded_chrat", "embedded_chart"]),
    "method": (["method=pyramid"], ["pyramid", "pyramiddrop", "fastv"]),
    "dial": (["ratoi=0.5"], ["ratoi", "did you mean ratio", "stages"]),
    "positions": (["positions=gaps"], ["positions", "compact", "original", "gaps"]),
    "dtype": (["dtype=float7"], ["float7", "bfloat16"]),
    "device": (["device=cuda:7"], ["cuda:7", "device=cpu"]),
    "limit": (["limit=0"], ["limit", "from 1 on"]),
    "batch": (["batch_size=0"], ["batch_size", "from 1 on"]),
    "missing folder": (["model=folder", "model.name=x", "model.path=/no/where"], ["/no/where", "no such folder"]),
    "name missing": (["model=folder"], ["model.name"]),
    "name with a slash": (["model.name=a/b"], ["model.name", "a/b"]),
}


@pytest.mark.product(6)
@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_get_one_clear_line(command, arguments, words):
    quick = [a for a in QUICK if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
    code, said, store = command(*quick, *arguments)
    assert code != 0 and "Traceback" not in said
    if "error: " in said:  # ours, not Hydra's own about the shape of the configuration
        assert len(said.strip().splitlines()) == 1, said
    for word in words:
        assert word in said, said
    assert not (store / "runs").exists(), "nothing is written for a run that cannot start"


def test_a_checkpoint_that_is_no_vision_language_model_is_refused(command, text_only):
    code, said, _ = command(*QUICK, "model=folder", "model.name=llama", f"model.path={text_only}")
    assert code != 0 and "is not a vision-language model" in said and "Traceback" not in said


def test_costs_without_tasks(command):
    quick = ["latency=quick", "latency.warmup=1", "latency.pairs=2", "latency.min_seconds=0", "batch_size=2"]
    code, said, store = command("tasks=none", *quick, "ratio=0.3")
    assert code == 0, said
    (record,) = read_records(store / "runs")
    timed = record.cost.prefill_time_ratio
    assert timed.unit == "ratio" and len(timed.values) >= 2 and timed.low <= timed.median <= timed.high
    assert record.results == {}


CONFIGS = [
    p for group in ("method", "model", "latency", "task_sets") for p in sorted((ROOT / "conf" / group).glob("*.yaml"))
]


@pytest.mark.parametrize("path", CONFIGS, ids=[f"{p.parent.name}/{p.stem}" for p in CONFIGS])
def test_every_shipped_choice_says_what_it_is(path):
    assert path.read_text().startswith("# "), f"{path}: open with a comment that says what it is"
    assert OmegaConf.load(path) is not None


@pytest.mark.product(4)
@pytest.mark.parametrize("name", conf.choices("method"))
def test_every_method_composes_for_every_depth(name, tmp_path):
    from hydra import compose, initialize_config_dir

    (tmp_path / "config.json").touch()
    folder = [f"method.clip={tmp_path}"] if name == "cdpruner" else []
    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("run", [f"method={name}", "ratio=0.3", *folder]))
        for layers in (12, 28, 32, 40):
            schedule = conf.instantiate(config.schedule, num_layers=layers)
            assert isinstance(schedule, Schedule)
            assert (config.method is None) == (not schedule)
            if config.method is not None:
                assert isinstance(conf.instantiate(config.method), Method)


@pytest.mark.product(6)
@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes(path):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf.CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("run", [f"experiments={path.stem}"]))
    assert config.experiment and path.stem.startswith(config.experiment), "parts of an experiment share its name"


def test_a_store_that_cannot_be_written_to_is_refused_before_a_model_is_loaded(command, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write wherever the file system lets it
    monkeypatch.setattr(Settings, "load", lambda _: pytest.fail("loaded"))
    code, said, results = command(*QUICK)
    assert code == 1 and said.count("\n") == 1, said
    assert "/embedded-pyramiddrop-" in said and "cannot be written (Permission denied)" in said, said
    assert said.rstrip().endswith("name another folder with results=DIR") and not results.exists()


@pytest.mark.parametrize(("words", "dial"), [((), "hydra.run.dir"), (("-m",), "hydra.sweep.dir")])
def test_a_full_disk_under_hydra_is_one_line(command, words, dial):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))  # a file that can grow no further, as on a full disk
    try:
        told = run.unwritable([*words, *QUICK])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert (
        told
        == f"{Path.cwd()} cannot be written (File too large), and Hydra keeps its note of a command there: {dial}=DIR"
    )
    assert run.unwritable([*words, *QUICK]) is None and run.unwritable(["--help"]) is None
