"""latency=full: fresh processes measure before this one loads anything, and with nothing of it on the device."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdrop import PyramidDrop, pyramid
from pdrop.cli import compose
from pdrop.methods.cdpruner import Clip
from pdrop.models import checkpoint, source
from pdrop.models.source import ModelSource
from pdrop.runs import timed
from pdrop.runs.run import RunFailed, run
from pdrop.runs.settings import Settings, scheduled
from pdrop.runs.worker import Worker
from pdrop.timing import measure, nvidia
from pdrop.timing.protocol import TimingProtocol
from tests.support.official import clip_folder
from tests.support.pretended_cuda import OnDevice, moved
from tests.support.saved_checkpoints import LAYERS, save_llava

FULL = TimingProtocol("full", warmup=1, pairs=2, new_tokens=(1, 2), memory=True, fresh=True, repeats=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_llava(tmp_path / "llava")


def settings(folder: Path, results: Path) -> Settings:
    dials = {"model": "folder", "model.name": "tiny", "model.path": str(folder), "tasks": [], "device": "cpu"}
    found = compose.settings(dials | {"results": str(results), "method": "none"})
    return scheduled(replace(found, method=PyramidDrop(), protocol=FULL), pyramid(LAYERS, layers=(2,), ratio=0.5))


def test_nothing_is_loaded_here_and_once_in_each_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are stood in for by calls; whose loading is which shows from where it is asked."""
    loads: list[bool] = []
    inside: list[bool] = []
    real = ModelSource.load

    def load(*given: Any) -> Any:
        loads.append(bool(inside))
        return real(*given)

    class Here:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Here:
            inside.append(True)
            return self

        def __exit__(self, *_: object) -> None:
            inside.clear()

        def submit(self, function: Any, *given: Any) -> Any:
            found = function(*given)
            return type("Future", (), {"result": lambda self: found})()

    monkeypatch.setattr(timed, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(ModelSource, "load", load)
    record = run(settings(folder, tmp_path / "results"))
    assert loads == [True, True], "once per process, and never here: there are no questions"
    cost = record.cost
    assert cost is not None and cost.timing is not None and cost.prefill_ms is not None
    assert len(cost.timing["stages"]["prefill"]["ratio"]["values"]) == 4
    assert cost.timed_prompt is not None and cost.timed_prompt["visual"] == 16 == cost.visual_tokens
    assert cost.visual_tokens_per_layer == [16.0, 16.0, 8.0, 8.0]


def test_with_questions_too_nothing_is_loaded_before_the_processes_have_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(folder, tmp_path / "results")
    order: list[str] = []

    def alone(asked: Settings) -> timed.Alone:
        order.append("measured")
        return timed.Alone({"stages": {}}, {"text": 1.0, "visual": 16.0}, None)

    def load(*_: Any) -> Any:
        order.append("loaded")
        raise ZeroDivisionError("that will do")

    monkeypatch.setattr(timed, "in_fresh_processes", alone)
    monkeypatch.setattr(ModelSource, "load", load)
    with pytest.raises(RunFailed, match="that will do"):
        run(replace(given, spec=replace(given.spec, tasks=("asked",))))
    assert order == ["measured", "loaded"]


def test_an_indication_has_its_conditions_and_is_refused_by_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """latency=quick: a busy machine is noted, a card that slowed down is not believed."""
    quick = replace(settings(folder, tmp_path / "results"), protocol=TimingProtocol("quick", pairs=2))
    moments = iter([{"load": 99.0, "clock_mhz": 1980.0}, {"clock_mhz": 1980.0}] * 2)
    real = measure.conditions
    monkeypatch.setattr(measure, "conditions", lambda model: real(model) | next(moments))
    cost = run(quick).cost
    assert cost is not None and cost.timing is not None and cost.prefill_time_ratio is not None
    assert cost.timing["invalid"] == [] and set(cost.timing["stages"]) == {"prefill"} and not cost.timing["end_to_end"]
    assert cost.timing["conditions"]["before"]["load"] == 99 and cost.timing["conditions"]["after"]["threads"] > 0
    assert cost.timing["protocol"] == "quick 1/2/0"
    slowed = iter([{"clock_mhz": 1980.0}, {"clock_mhz": 1200.0, "slowed": ["heat"]}])
    monkeypatch.setattr(measure, "conditions", lambda model: real(model) | next(slowed))
    cost = run(replace(quick, force=True)).cost
    assert cost is not None and cost.timing is not None and cost.prefill_ms is not None
    assert cost.prefill_time_ratio is None
    assert [reason.split()[0] for reason in cost.timing["invalid"]] == ["changed", "the"]


def test_a_worker_makes_room_for_fresh_processes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(folder, tmp_path / "results")
    worker, cost = Worker(1), SimpleNamespace(timing=None, timed_prompt=None)
    worker._generator, worker._run = object(), given.spec.run_id  # type: ignore[assignment]

    def alone(asked: Settings) -> timed.Alone:
        assert worker._generator is None and worker._run is None, "the model that it answered with is gone"
        return timed.Alone({"stages": {}}, {"text": 1.0, "visual": 16.0}, None)

    monkeypatch.setattr(timed, "in_fresh_processes", alone)
    monkeypatch.setattr(timed, "time_run", lambda *taken: found.extend(taken))
    found: list[Any] = []
    assert worker.timed(given, cost) is cost  # type: ignore[arg-type,comparison-overlap]
    assert found[2] is None and found[3].timed_prompt["visual"] == 16, "nothing is loaded in the worker"


def test_what_cannot_be_loaded_is_refused_before_a_record_is_written(folder: Path, tmp_path: Path) -> None:
    wrong = settings(folder, tmp_path / "results")
    data = json.loads((folder / "config.json").read_text())
    data["text_config"]["hidden_size"] = 48
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        run(wrong)
    assert not (tmp_path / "results").exists()


def test_a_gpu_of_one_process_is_said_before_another_is_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(settings(folder, tmp_path / "results"), device="cuda")
    forgotten: list[int] = []
    monkeypatch.setattr(source, "forget", lambda: forgotten.append(1))
    monkeypatch.setattr(ModelSource, "check", lambda self, device: None)
    monkeypatch.setattr("pdrop.environment.accelerator", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(nvidia, "exclusive", lambda device: True)
    used = {"reserved_bytes.all.allocated": 1 << 30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: used)
    with pytest.raises(RunFailed, match=r"takes one process at a time.*one run per command"):
        run(given)
    assert forgotten, "the model of the run before has been let go"
    used.clear()
    timed.leave_the_device("cuda")  # a process that has put nothing there has no context
    timed.leave_the_device("cpu")


def on_the_device() -> int:
    """Tensors that are there, and whose owner is still there."""
    gc.collect()
    return sum(isinstance(one, OnDevice) for one in gc.get_objects())


def test_nothing_of_earlier_runs_stays_on_the_device(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the last model, nor CDPruner's own, which is cached apart, nor what measured a budget."""
    given = replace(settings(folder, tmp_path), protocol=TimingProtocol("quick", pairs=2))
    there, clip = given.load(), Clip.load(str(clip_folder(tmp_path, 8)), "cpu")
    before = on_the_device()
    timed.prefill_ms(given, PyramidDrop())(given.schedule)
    for model in (there.model, clip.model):
        moved(model)
    assert given.load() is there and on_the_device() > before + 100
    del there, clip, model
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    timed.leave_the_device("cuda")
    assert on_the_device() == before


def test_a_model_leaves_before_another_comes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may have room for one; a worker, too, lets go what it answered with."""
    first = settings(folder, tmp_path)
    other = compose.settings(
        {"model": "folder", "model.name": "other", "model.path": str(save_llava(tmp_path / "other")), "tasks": []}
        | {"device": "cpu", "method": "none"}
    )
    there: list[bool] = []
    real = checkpoint.load

    def load(*given: Any, **options: Any) -> Any:
        there.append(any(one() is not None for one in models))
        found = real(*given, **options)
        models.append(weakref.ref(found.model))
        return found

    models: list[weakref.ref[Any]] = []
    monkeypatch.setattr(checkpoint, "load", load)
    source.forget()
    worker = Worker(1)
    for asked in (first, first, other, first):
        worker._under(asked)
    assert there == [False] * 3, "one model at a time, and loaded again where it is another"
    del asked
    source.forget()


def test_other_protocols_are_measured_here(folder: Path, tmp_path: Path) -> None:
    quick = replace(settings(folder, tmp_path / "results"), protocol=TimingProtocol("quick", pairs=2))
    assert not quick.timed_alone and quick.timed
    assert not replace(quick, method=None).timed and not replace(quick, protocol=TimingProtocol("off")).timed
    assert settings(folder, tmp_path).timed_alone


def test_a_card_without_room_is_said_in_a_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While loading, before a record is written; and while measuring, with what to do."""
    quick = replace(settings(folder, tmp_path / "results"), protocol=TimingProtocol("quick", pairs=2))
    told = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.\nGPU 0 has ...")

    def full(*_: Any, **__: Any) -> Any:
        raise told

    with monkeypatch.context() as patch:
        patch.setattr(ModelSource, "load", full)
        with pytest.raises(ValueError, match=r"tiny in float32 cannot be loaded on device=cpu: CUDA out .* nvidia-smi"):
            run(quick)
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(timed, "time_here", full)
    with pytest.raises(RunFailed, match=r"failed: OutOfMemoryError(.|\n)*; use a smaller batch_size, or see"):
        run(quick)
    monkeypatch.setattr(ModelSource, "load", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # anything else is not explained away
        quick.load()
