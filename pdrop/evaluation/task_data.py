"""The sources of tasks' data: a repository on the Hub, or files; and whether they are in the local cache.

The datasets library does the download and checks that it is complete. No torch, no lmms-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdrop.evaluation import task_index
from pdrop.evaluation.generation_arguments import read_config

FILES = ("parquet", "json", "csv", "arrow", "text", "imagefolder", "videofolder")  # builders of local files
PASSED = ("data_dir", "data_files", "revision")  # the dataset_kwargs that select data


@dataclass(frozen=True)
class TaskData:
    """A dataset on the Hub.

    Attributes:
        path: Its repository.
        name: Its configuration; None: the only one.
        tasks: The tasks that need it.
        kwargs: Other arguments that select data, for `datasets.load_dataset_builder`.
    """

    path: str
    name: str | None
    tasks: tuple[str, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def called(self) -> str:
        return self.path if self.name is None else f"{self.path} ({self.name})"

    def here(self) -> bool:
        """Whether it can be loaded without a network."""
        from datasets.load import CachedDatasetModuleFactory

        try:
            found = CachedDatasetModuleFactory(self.path).get_module()
        except (FileNotFoundError, ConnectionError):
            return False
        return self.name is None or self.name in str(found.builder_kwargs.get("config_name", self.name))

    def builder(self) -> Any:
        """The `datasets` builder that downloads and prepares it."""
        import datasets

        return datasets.load_dataset_builder(self.path, self.name, **self.kwargs)


def on_the_hub(tasks: Sequence[str], folders: Sequence[str | Path] = ()) -> list[TaskData]:
    """The datasets on the Hub that tasks need.

    Raises:
        ValueError: For an unknown task, or a file that is not YAML.
    """
    found: dict[tuple[str, str | None], TaskData] = {}
    for name, paths in task_index.find(tasks, folders).items():
        for path in paths:
            config = read_config(path)
            source = config.get("dataset_path")
            if not isinstance(source, str) or source in FILES or Path(source).expanduser().exists():
                continue
            key = source, config.get("dataset_name")
            given = config.get("dataset_kwargs")
            kwargs = {n: v for n, v in given.items() if n in PASSED} if isinstance(given, Mapping) else {}
            asked = (*(found[key].tasks if key in found else ()), name)
            found[key] = TaskData(*key, tuple(dict.fromkeys(asked)), kwargs)
    return list(found.values())
