"""Bring a model and the data of tasks into the local caches, for machines without a network.

    python -m pdrop fetch model=llava_1_5_7b tasks=paper            what is missing is downloaded
    python -m pdrop fetch model=llava_1_5_7b tasks=paper plan=true  only listed: here, or missing and how large

The dials are run.py's. huggingface_hub and datasets download, into their own caches (HF_HOME).
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdrop.cli.choices import complaint
from pdrop.cli.compose import CONF, choices, task_names
from pdrop.cli.overrides import first_line, misfit
from pdrop.command_help import CommandHelp
from pdrop.commands import as_typed, typed
from pdrop.evaluation.task_data import TaskData, on_the_hub
from pdrop.models import checkpoint, shipped
from pdrop.names import printable

HUB = re.compile(r"[\w.-]+/[\w.-]+")  # a repository's name


def main(words: Sequence[str]) -> int:
    """The command; returns its exit code: 0 if everything is here at the end (with plan=true: could be listed)."""
    parser = argparse.ArgumentParser(
        f"{typed('pdrop')} fetch", description=as_typed(__doc__ or ""), formatter_class=CommandHelp
    )
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help=f"as of {typed('run')} --help")
    words = parser.parse_args(words).words
    if told := complaint(words, CONF) or misfit(words, CONF, "run"):
        sys.exit(f"error: {told}")
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg: Any = hydra.compose("run", list(words))
        return fetch(cfg)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {printable(first_line(error))}")


def fetch(cfg: Any) -> int:
    """List what a configuration needs, and download what is missing. Without a network, what is missing is only named:
    the libraries would ask for each dataset six times."""
    failed = 0
    model, data = needed(cfg)
    missing = [*([f"model {model}"] if model else []), *(f"data {one.called}" for one in data if not one.here())]
    if missing and not online():
        for what in [*([] if model else [f"model {cfg.model.path}"]), *(f"data {one.called}" for one in data)]:
            if what not in missing:
                say("here", what)
        for what in missing:
            say("missing", f"{what}: its size is known where there is a network")
        sys.stderr.write("error: there is no network, so nothing can be downloaded\n")
        return 1
    if model is None:
        say("here", f"model {cfg.model.path}")
    else:
        failed += brought(f"model {model}", lambda: model_size(cfg), lambda: checkpoint.locate(
            model, revision=cfg.model.revision, weights=cfg.model.weights
        ), cfg.plan)  # fmt: skip
    for one in data:
        what = f"data {one.called} of {', '.join(one.tasks)}"
        if one.here():
            say("here", what)
        else:
            failed += brought(what, lambda: data_size(one), lambda: one.builder().download_and_prepare(), cfg.plan)  # noqa: B023
    if not data:
        say("here", "data: the tasks need none from the Hub")
    return 1 if failed else 0


def brought(what: str, size: Any, bring: Any, plan: bool) -> int:
    """Say how large something missing is, and download it; 1 if that fails."""
    try:
        say("missing", f"{what}: {size()}")
        if not plan:
            bring()
            say("fetched", what)
        return 0
    except Exception as error:  # the libraries may raise anything; the rest can still be downloaded
        say("FAILED", f"{what}: {first_line(error)}")
        return 1


def model_size(cfg: Any) -> str:
    """The size of the model's download, in words."""
    from huggingface_hub import snapshot_download

    found: Any = snapshot_download(
        cfg.model.path,
        revision=cfg.model.revision,
        allow_patterns=checkpoint.wanted_files(cfg.model.weights),
        dry_run=True,
    )
    return gigabytes(sum(one.file_size for one in found if one.will_download))


def data_size(one: TaskData) -> str:
    """The size of a dataset's download according to its card, in words."""
    size = one.builder().info.download_size
    return "of unknown size" if size is None else gigabytes(size)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# ---------------------------------------------------------------------- before a run


def needed(cfg: Any) -> tuple[str | None, list[TaskData]]:
    """What a run needs from the Hub: the model (None if it is here, or not on the Hub), and the data of its tasks."""
    given: Any = OmegaConf.to_container(cfg.tasks) if OmegaConf.is_config(cfg.tasks) else cfg.tasks
    folders = list(cfg.task_folders)
    tasks, path = task_names(given, folders), str(cfg.model.path)
    counted = not tasks and shipped.of_checkpoint(path) is not None  # then its sizes are known here
    there = not HUB.fullmatch(path) or checkpoint.at_hand(path, cfg.model.revision)
    return None if there or counted or cfg.model.weights == "random" else path, on_the_hub(tasks, folders)


def refuse_missing(cfg: Any) -> None:
    """Without a network, name everything that a run lacks before anything is loaded.

    Raises:
        ValueError: If something is missing; with the command that downloads it.
    """
    model, data = needed(cfg)
    missing = [
        *([f"the model {model}"] if model else []),
        *(f"the data {one.called}" for one in data if not one.here()),
    ]
    if missing and not online():
        named = cfg.model.name in choices("model")
        called = f"model={cfg.model.name}" if named else f"model=folder model.name=x model.path={model}"
        words = [called] if model else []
        words += [f"tasks=[{','.join(dict.fromkeys(task for one in data for task in one.tasks))}]"] if data else []
        raise ValueError(
            f"there is no network, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing here; "
            f"on a machine with one: {typed('pdrop')} fetch {' '.join(words)}"
        )


def online() -> bool:
    """Whether the Hub may be asked, and answers."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    place = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def say(state: str, what: str) -> None:
    """A line of the list."""
    sys.stdout.write(printable(f"{state:8s} {what}") + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
