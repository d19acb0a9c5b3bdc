"""python -m pdrop fetch: what is here, what is missing and how large; a run without a network names what it lacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pdrop.cli import fetch
from pdrop.cli.compose import compose
from pdrop.evaluation import task_data

LLAVA = "llava-hf/llava-1.5-7b-hf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Caches that are empty, and a Hub that notes what is brought from it; POPE's data cannot be had."""
    brought: list[str] = []

    def snapshot(path: str, **options: Any) -> Any:
        return [
            SimpleNamespace(file_size=14e9, will_download=True),
            SimpleNamespace(file_size=1e9, will_download=False),
        ]

    def builder(data: task_data.TaskData) -> Any:
        if "POPE" in data.path:
            raise ConnectionError("no answer\nin ten lines")
        info = SimpleNamespace(download_size=3.5e8)
        return SimpleNamespace(info=info, download_and_prepare=lambda: brought.append(data.path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(fetch, "online", lambda: True)
    monkeypatch.setattr(fetch.checkpoint, "at_hand", lambda path, revision=None: path.startswith("package://"))
    monkeypatch.setattr(fetch.checkpoint, "locate", lambda path, **options: brought.append(path))
    monkeypatch.setattr(task_data.TaskData, "here", lambda data: data.path in brought)
    monkeypatch.setattr(task_data.TaskData, "builder", builder)
    return brought


def test_what_is_missing_is_brought_and_the_rest_is_said(hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llava_1_5_7b", "tasks=[mme,pope,embedded_chart]"]
    assert fetch.main([*words, "plan=true"]) == 1 and hub == [], "one of them cannot even be listed"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"missing  model {LLAVA}: 14.00 GB"
    assert "of mme: 0.35 GB" in said[1] and said[2].startswith("FAILED   data") and said[2].endswith("no answer")
    assert fetch.main(words) == 1 and len(hub) == 2 and hub[0] == LLAVA
    assert capsys.readouterr().out.count("fetched") == 2, "what fails keeps nothing else from being brought"
    assert fetch.main(["tasks=[mme,embedded_chart]"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["here", "here"]
    with pytest.raises(SystemExit, match=r"error: unknown task 'poep' .did you mean pope"):
        fetch.main(["tasks=poep"])


@pytest.mark.parametrize("online", [False, True])
def test_without_a_network_a_run_names_all_that_it_lacks(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    monkeypatch.setattr(fetch, "online", lambda: online)
    cfg, _ = compose({"model": "llava_1_5_7b", "tasks": ["pope", "mme"]})
    if online:
        fetch.refuse_missing(cfg)
        return
    told = r"the model llava-hf/llava-1.5-7b-hf, the data .*POPE, the data .*MME are missing here.*"
    told += r"python -m pdrop fetch model=llava_1_5_7b tasks=\[pope,mme\]"
    with pytest.raises(ValueError, match=told):
        fetch.refuse_missing(cfg)
    for enough in ({"tasks": "embedded"}, {"model": "llava_1_5_7b", "tasks": []}):
        fetch.refuse_missing(compose(enough)[0])
    fetch.refuse_missing(compose({"model": "folder", "model.name": "x", "model.path": "/no/where", "tasks": []})[0])


def test_without_a_network_it_lists_and_asks_nobody(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main(["tasks=[mme]"]) == 0 and len(hub) == 1
    monkeypatch.setattr(fetch, "online", lambda: False)
    monkeypatch.setattr(fetch.TaskData, "builder", lambda self: pytest.fail("it was asked for"))
    monkeypatch.setattr(fetch, "model_size", lambda cfg: pytest.fail("it was asked for"))
    capsys.readouterr()
    for more in ([], ["plan=true"]):
        assert fetch.main(["model=llava_1_5_7b", "tasks=[mme,pope]", *more]) == 1
        said = capsys.readouterr()
        assert [line.split()[:2] for line in said.out.splitlines()] == [
            ["here", "data"],
            ["missing", "model"],
            ["missing", "data"],
        ]
        assert "POPE" in said.out.splitlines()[2] and said.err.count("\n") == 1 and "no network" in said.err
    assert fetch.main(["tasks=[mme]"]) == 0, "where everything is here, no network is needed"


def test_an_empty_cache_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert not task_data.TaskData("lmms-lab/NOWHERE", None, ("t",)).here()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not fetch.online()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not fetch.online(), "nobody listens there"
