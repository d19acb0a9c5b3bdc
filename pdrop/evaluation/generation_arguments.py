"""A task's generation arguments, applied as in lmms-eval's own models (llava_hf, internvl_hf, qwen2_5_vl, qwen3_vl).

    max_new_tokens          most tokens of an answer; null: the run's
    min_new_tokens          fewest tokens of an answer
    temperature             above 0 answers are sampled, otherwise greedy; default: 0
    do_sample               ignored, since temperature decides (with a warning if the two contradict)
    top_p, top_k            for sampling; default: the checkpoint's own (generation_config.json)
    num_beams               1: no beam search
    repetition_penalty, no_repeat_ngram_size, length_penalty    as in transformers; default: the checkpoint's
    until                   one or several texts: the answer ends before the first of them
    skip_special_tokens     false: special tokens stay in the answer
    seed                    of sampling, together with the run's own seed
    num_return_sequences    1, since one answer per request is scored; a task's `repeats` ask again
    image_aspect_ratio      ignored: image_mode says how pictures are prepared, for all tasks of a run

Any other name is refused, before a model is loaded if it is in the task's YAML. No torch, no lmms-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pdrop.evaluation import task_index

MEANT = {"max_gen_toks": "max_new_tokens", "max_tokens": "max_new_tokens", "max_length": "max_new_tokens"} | {
    name: "until" for name in ("stop", "stop_sequences", "stop_strings")
}
REMEDY = "a YAML of your own (task_folders) that includes the task's may say its generation_kwargs anew"


@dataclass(frozen=True)
class GenerationArguments:
    """Checked generation arguments, described above. None: as the run or the checkpoint has it."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float = 0.0
    do_sample: bool | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    length_penalty: float | None = None
    until: tuple[str, ...] = ()
    skip_special_tokens: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> GenerationArguments:
        """Check a task's arguments.

        Raises:
            ValueError: For an unknown name or an invalid value, naming the argument.
        """
        if unknown := [str(name) for name in given if name not in READERS]:
            raise ValueError("; ".join(map(_unknown, unknown)) + f" ({REMEDY})")
        read = {name: READERS[name](name, value) for name, value in given.items()}
        found = cls(**{name: value for name, value in read.items() if name in cls.__dataclass_fields__})
        least, most = found.min_new_tokens, found.max_new_tokens
        if least is not None and most is not None and least > most:
            raise ValueError(f"generation_kwargs: min_new_tokens {least} is more than max_new_tokens {most}")
        return found

    @property
    def samples(self) -> bool:
        """Whether answers are sampled, so that a seed matters."""
        return self.temperature > 0

    @property
    def contradiction(self) -> str | None:
        """The warning if do_sample contradicts temperature; None if it does not."""
        if self.do_sample is None or self.do_sample == self.samples:
            return None
        done = "sampled" if self.samples else "not sampled"
        said = str(self.do_sample).lower()
        return (
            f"answers are {done}, for temperature is {self.temperature:g}, as lmms-eval's models do; do_sample: {said}"
        )

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        """Arguments for `generate`.

        Args:
            max_new_tokens: The run's, used if the task sets none.

        Raises:
            ValueError: If the task's min_new_tokens is larger.
        """
        if self.max_new_tokens is None and (self.min_new_tokens or 0) > max_new_tokens:
            raise ValueError(
                f"generation_kwargs: min_new_tokens {self.min_new_tokens} is more than the run's max_new_tokens "
                f"{max_new_tokens}, and the task sets none: max_new_tokens={self.min_new_tokens}"
            )
        found: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens or max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.samples,
        }
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if not self.samples:
            found |= dict.fromkeys(sampling)  # transformers warns of sampling values under greedy decoding
            sampling = {}
        for name in ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "length_penalty"):
            sampling[name] = getattr(self, name)
        return found | {name: value for name, value in sampling.items() if value is not None}


def check(
    names: Sequence[str], task_dirs: Sequence[str | Path] = (), answer_tokens: Callable[[str], int] | None = None
) -> bool:
    """Check the arguments in the YAMLs of tasks; nothing is imported or loaded.

    Args:
        names: Tasks, groups or tags.
        task_dirs: Folders with the user's own tasks.
        answer_tokens: The run's answer length for a task that sets none; None: not known yet.

    Returns:
        Whether any of the tasks samples its answers.

    Raises:
        ValueError: For unknown tasks; for unknown arguments or wrong values, naming task and argument.
    """
    samples = False
    for path in dict.fromkeys(path for paths in task_index.find(names, task_dirs).values() for path in paths):
        for name, given in _arguments(read_config(path), path):
            samples |= of_task(name, given, None if answer_tokens is None else answer_tokens(name)).samples
    return samples


def with_stops(paths: Iterable[Path]) -> set[str]:
    """The tasks whose files set `until`.

    For all others lmms-eval sets "\\n\\n", which its own models ignore: an answer of several paragraphs is not cut
    after the first.
    """
    named = (entry for path in paths for entry in _arguments(read_config(path), path))
    return {name for name, given in named if isinstance(given, Mapping) and given.get("until") is not None}


def of_task(name: str, given: Mapping[str, Any] | None, max_new_tokens: int | None = None) -> GenerationArguments:
    """The arguments of a task, also checked against the run's `max_new_tokens` if that is given.

    Raises:
        ValueError: Naming the task and the argument.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"task {name}: generation_kwargs are names with values, not {given!r}")
    try:
        found = GenerationArguments.parse(given or {})
        if max_new_tokens is not None:
            found.options(max_new_tokens)
        return found
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from error


def read_config(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task's YAML with the files it includes, as lmms-eval reads it, but without importing any function.

    Raises:
        ValueError: If it is not YAML, or includes itself.
    """
    if path.resolve() in within:
        raise ValueError(f"{path} includes itself")
    try:
        config = yaml.load(path.read_text(encoding="utf8"), _Plain)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        return {}
    included = config.pop("include", None) or []
    found: dict[str, Any] = {}
    for name in reversed([included] if isinstance(included, str) else included):
        other = Path(name) if Path(name).is_file() else path.parent / name
        if not other.is_file():
            raise ValueError(f"{path} includes {name}, which is not there")
        found |= read_config(other, (*within, path.resolve()))
    return found | config


def _arguments(config: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """Task and generation_kwargs of a YAML: of a task, or of the members of a group that have their own."""
    members = config.get("task")
    if isinstance(members, list):
        for member in members:
            if isinstance(member, dict):
                yield from _arguments({**config, **member}, path)
        return
    if "generate" not in str(config.get("output_type", "generate_until")):
        return
    given = config.get("generation_kwargs")
    special = config.get("model_specific_generation_kwargs")
    if isinstance(special, Mapping) and isinstance(given, Mapping):
        given = {**given, **(special.get("default") or {})}
    yield str(members or path.stem), given


class _Plain(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without objects: `!function` and similar tags are None."""


_Plain.add_multi_constructor("", lambda loader, tag, node: None)


def _unknown(name: str) -> str:
    close = [MEANT[name]] if name in MEANT else get_close_matches(name, READERS, 1)
    hint = f"write {close[0]}" if close else f"known are {', '.join(READERS)}"
    return f"generation_kwargs: {name} is not known: {hint}"


def _whole(least: int) -> Callable[[str, Any], int | None]:
    def read(name: str, value: Any) -> int | None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"generation_kwargs: {name} is a whole number from {least} on, not {value!r}")
        return value

    return read


def _number(least: float = -math.inf, most: float = math.inf, above: bool = False) -> Callable[[str, Any], float]:
    def read(name: str, value: Any) -> float:
        try:  # YAML reads 1e-1 as text, and lmms-eval takes it
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or not least <= number <= most or (above and number == least):
            within = "" if math.isinf(least) else f" above {least:g}" if above else f" from {least:g}"
            within += "" if math.isinf(most) else f" to {most:g}"
            raise ValueError(f"generation_kwargs: {name} is a number{within}, not {value!r}")
        return number

    return read


def _optional(read: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else read(name, value)


def _yes_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"generation_kwargs: {name} is true or false, not {value!r}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"generation_kwargs: {name} is a text or a list of texts, not {value!r}")
    return tuple(texts)


def _one(name: str, value: Any) -> int:
    if value not in (1, None):
        raise ValueError(
            f"generation_kwargs: {name} is 1, not {value!r}: one answer of a request is scored, `repeats` asks again"
        )
    return 1


READERS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _whole(1),
    "min_new_tokens": _whole(0),
    "temperature": _number(),
    "do_sample": _optional(_yes_no),
    "top_p": _optional(_number(0, 1)),
    "top_k": _whole(0),
    "num_beams": lambda name, value: 1 if value is None else _whole(1)(name, value),
    "repetition_penalty": _optional(_number(0, above=True)),
    "no_repeat_ngram_size": _whole(0),
    "length_penalty": _optional(_number()),
    "until": _texts,
    "skip_special_tokens": _yes_no,
    "seed": _whole(0),
    "num_return_sequences": _one,
    "image_aspect_ratio": lambda name, value: value,
}
