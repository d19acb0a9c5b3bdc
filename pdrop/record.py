"""One run: what identifies it (RunSpec), what came out (RunRecord), and how both are kept on disk.

A run's folder is `results/runs/<model>-<method>-<run_id>/`:

    record.json                 the RunRecord: spec, status, scores, cost, environment
    answers.jsonl               one line per answered request, appended per batch: a killed run resumes from here
    samples.zip                 one line per sample: answer, scores, kept tokens (pdrop/samples.py)

Two runs are the same run exactly when their specs are equal, and then they share `run_id`. A record may come from an
untrusted source: invalid names (pdrop/names.py) are refused on reading. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pdrop import names
from pdrop.store import write_atomically

FORMAT = 1
Built = TypeVar("Built")
# conditions that must be equal for two times to be compared (pdrop/timing/conditions.py notes them)
EQUAL_CONDITIONS = (
    "device", "device_name", "dtype", "attention_decoder", "attention_tower", "threads", "cores", "tf32",
    "sdpa_kernels", "cuda_libraries",
)  # fmt: skip
CLOSE_CONDITIONS = {"clock_mhz": 0.05}  # those that may differ, by this share of the larger value
# what may differ between the trainings of one study (fields of pdrop.training.record.TrainingSpec)
TRAINING_VARIES = ("method", "method_args", "schedule", "positions", "seed")
# metrics of lmms-eval whose scores are percentages, for records that do not say so
PERCENTAGES = ("gpt_eval_score", "videomme_perception_score", "mvbench_accuracy", "mlvu_percetion_score")
Status = Literal["running", "done", "failed"]
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
ProtocolName = Literal["official", "lmms_eval", "checkpoint"]  # conf/protocols/, docs/protocols.md
PromptStyle = Literal["chat", "vicuna_v1", "qwen_1_5"]  # see pdrop/evaluation/prompts.py
ImageMode = Literal["crop", "pad"]
ImageBackend = Literal["pil", "torchvision", "qwen_vl_utils"]
ImagePlacing = Literal["marked", "front"]
Stop = Literal["task", "model"]
FrameSampling = Literal["ends", "nearest", "middles"]  # see pdrop/evaluation/frames.py

# transformers' own backends, and kernels by their name on the Hub: whether one is available shows on loading
ATTENTION = re.compile(r"sdpa|eager|flash_attention_\d|flex_attention|paged\|\w+|[\w.-]+/.+")


@dataclass(frozen=True)
class RunSpec:
    """Everything that can change a number of the run, after canonicalisation: its identity.

    `model_fingerprint` hashes the weights and processor files (or names seed and config of random weights), so a
    retrained checkpoint under the same name is another run. `schedule` is the resolved one in canonical spelling,
    so two ways to write it are one run, and dials that a method ignores do not appear at all.
    """

    model: str
    model_path: str
    revision: str | None
    weights: Literal["pretrained", "random", "architecture"]  # "architecture": closed form only, no model was loaded
    model_fingerprint: str
    method: str
    method_args: str  # canonical JSON of the method's own arguments
    schedule: str  # Schedule in canonical spelling; "" drops nothing
    positions: str  # "compact" | "original"; "original" where nothing is dropped
    tasks: tuple[str, ...]
    limit: int | None  # first n samples of each task; None = all
    seed: int
    batch_size: int
    dtype: Dtype
    attn_implementation: str
    device: str  # "cpu" | "cuda" | "mps"
    prompt: PromptStyle  # "chat": the checkpoint's template
    image_mode: ImageMode  # "crop": the checkpoint's own processing
    max_new_tokens: int  # for tasks that set none
    latency: str  # the timing protocol: "off", or name and numbers such as "quick 2/10/1.5"
    versions: str  # canonical JSON {package: version} of those that matter (pdrop/environment.py)
    code: str = ""  # digest of the sources that make the numbers, the method's own file included
    task_files: str = ""  # digest of the task files and data that do not come with lmms-eval
    format: int = FORMAT
    protocol: ProtocolName = "checkpoint"  # whose settings are used; what it sets is in the other fields
    system: str | None = None  # system message in front of the prompt; None: the style's or the template's own
    image_backend: ImageBackend = "pil"  # of the image processor
    min_pixels: int | None = None  # a smaller picture is enlarged to this many; None: as the processor has it
    max_pixels: int | None = None  # a larger one is made smaller
    max_tiles: int | None = None  # that a picture is cut into
    wrapper: str | None = None  # lmms-eval's model whose prompts of a task are taken; None: the task's default ones
    lengths: str = ""  # canonical JSON {task, or pattern of shells: max_new_tokens}, before max_new_tokens
    stop: Stop = "task"  # an answer ends where the task's file says, too ("task"), or where the model ends it alone
    image_placing: ImagePlacing = "marked"  # pictures are where the question marks them, or all before it
    frames: int = 8  # that a video is shown as, or, with `fps`, at most
    frame_sampling: FrameSampling = "middles"  # which these are
    fps: float | None = None  # this many frames of each second; None: `frames` of every video
    min_frame_pixels: int | None = None  # of a frame of a video; None: as the processor has it
    max_frame_pixels: int | None = None
    max_video_pixels: int | None = None  # of all frames together, those that the tower takes at once counted once
    frame_times: bool = False  # whether a sentence before the question says how long a video is, and its frames' times
    sdpa_kernel: str = ""  # which of torch's kernels comes first (pdrop/models/attention.py); "": CUDA's sdpa alone

    def check(self, called: Mapping[str, str] | None = None) -> None:
        """Refuse a value that its field does not allow, and a count below 1.

        Args:
            called: What the user calls a field, where that is not its name.

        Raises:
            ValueError: Naming the field and what it takes.
        """
        for name, hint in get_type_hints(RunSpec).items():
            value, told, options = getattr(self, name), (called or {}).get(name, name), get_args(hint)
            if get_origin(hint) is Literal:
                check_word(told, value, options)
            if name == "system" and value is not None and not str(value).strip():
                raise ValueError(f"{told} is a system message, or null, not {value!r}")
            if name == "attn_implementation" and not ATTENTION.fullmatch(value):
                raise ValueError(f"{told} is sdpa, eager or flash_attention_2, not {value!r}")
            if name == "seed":
                check_seed(told, value)
            elif name == "fps" and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{told} is a number of frames a second, above 0, or null, not {value}")
            elif isinstance(value, int) and not isinstance(value, bool) and value < 1:
                null = ", or null" if type(None) in options else ""
                raise ValueError(f"{told} is a whole number from 1 on{null}, not {value}")

    @property
    def asked_with(self) -> str:
        """In words: the protocol, the template, the pictures' processing, and how long answers may be."""
        parts = [f"{self.protocol} protocol", f"{self.prompt} prompt"]
        parts += ["a system message" if self.system is not None else "", f"image {self.image_mode}"]
        limited = ("min_pixels", "max_pixels", "max_tiles", "min_frame_pixels", "max_frame_pixels", "max_video_pixels")
        parts += [f"{name}={value}" for name in limited if (value := getattr(self, name)) is not None]
        if (self.frames, self.frame_sampling, self.fps) != (8, "middles", None):
            rate = "" if self.fps is None else f"{self.fps:g} a second, at most "
            parts.append(f"videos as {rate}{self.frames} frames ({self.frame_sampling})")
        parts += [f"by {self.image_backend}" if self.image_backend != "pil" else ""]
        parts += ["with the times of frames"] if self.frame_times else []
        parts += ["pictures in front of the question" if self.image_placing == "front" else ""]
        parts += [f"prompts of lmms-eval's {self.wrapper}" if self.wrapper is not None else ""]
        parts += ["answers end where the model ends them" if self.stop == "model" else ""]
        lengths: dict[str, int] = json.loads(self.lengths or "{}")
        others = [
            f"{tokens} for {', '.join(task for task, its in lengths.items() if its == tokens)}"
            for tokens in sorted(set(lengths.values()))
        ]
        parts.append(
            f"up to {self.max_new_tokens} tokens where a task sets none" + (f" ({'; '.join(others)})" if others else "")
        )
        return ", ".join(part for part in parts if part)

    def answer_tokens(self, task: str) -> int:
        """Most tokens of an answer to a task that sets none itself."""
        lengths: dict[str, int] = json.loads(self.lengths or "{}")
        fitting = [pattern for pattern in lengths if fnmatchcase(task, pattern)]
        return lengths[max(fitting, key=len)] if fitting else self.max_new_tokens

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the SHA-256 over the canonical JSON of all fields."""
        return hashed(asdict(self))

    @property
    def folder(self) -> str:
        """Folder name under results/runs/."""
        return f"{self.model}-{self.method}-{self.run_id}"


# a field with a default, other than the first ones, came later: at its default it is left out of the hash, so that
# older records keep their id
FIRST = ("code", "task_files", "format")
LATER: dict[str, Any] = {
    one.name: one.default for one in fields(RunSpec) if one.default is not MISSING and one.name not in FIRST
}


@dataclass
class Score:
    """One metric of one task over `n` samples; `value` as the task's aggregation gives it (usually 0..1).

    `full` is what faultless answers would score on these samples: 1 for a fraction, 100 for a percentage, more for
    points; None where that is not known, and in older records. `mean` says whether the value was the plain mean of its
    samples' numbers when it was written, so that a reader can check it against them; None in older records.
    """

    value: float
    n: int
    higher_is_better: bool = True
    full: float | None = None
    mean: bool | None = None


@dataclass
class TaskResult:
    """One task of a run. The hashes identify the data and prompts behind the scores: compare only equal ones."""

    scores: dict[str, Score]
    n: int  # samples scored
    n_total: int  # samples the task has
    version: str
    data_hash: str
    prompt_hash: str
    main_metric: str  # the metric tables show
    wall_s: float = 0.0
    invalid: int | None = None  # answers that no rule of the task reads; None: not counted (older records)
    boxes: str | None = None  # the family whose prompt and frame of boxes was asked (pdrop/evaluation/grounding.py)

    def full(self, metric: str) -> float | None:
        """What faultless answers would score: see `Score`."""
        known = self.scores[metric].full
        return 100.0 if known is None and metric in PERCENTAGES else known

    def share(self, metric: str) -> float:
        """A score as a fraction where it is a fraction or a percentage; points as they are."""
        value = self.scores[metric].value
        return value / 100 if self.full(metric) == 100 else value


@dataclass
class Interval:
    """A measured quantity: median, interquartile range, bootstrap 95 % interval of the median, raw values, unit."""

    unit: str
    median: float
    iqr: float
    low: float
    high: float
    values: list[float]


@dataclass
class Cost:
    """What a prefill of this run costs. Means are over the run's samples; per-layer lists have one entry per layer.

    MACs: one multiply-add = 1 (the papers' "FLOPs"). FLOPs: one multiply or one add = 1.
    """

    samples: int  # prompts the means are over
    text_tokens: float  # mean non-visual tokens of a prompt
    visual_tokens: float  # mean visual tokens of a prompt, before any dropping
    visual_tokens_per_layer: list[float]  # entering each layer
    tokens_per_layer: list[float]  # visual and text
    mean_keep: float  # mean over layers of visual_tokens_per_layer / visual_tokens
    paper_macs_visual: float  # PyramidDrop's Eq. 5, visual tokens only
    prefill_flops: float  # everything, closed form
    prefill_flops_ratio: float  # to the same prompts with nothing dropped
    kv_bytes: float  # of the cache after prefill
    kv_ratio: float
    prefill_ms: Interval | None = None  # this run's prefill
    baseline_prefill_ms: Interval | None = None  # the unpruned model's, interleaved in the same process
    prefill_time_ratio: Interval | None = None  # paired: this / unpruned
    flops_parts: dict[str, float] = field(default_factory=dict)  # prefill_flops by component
    prefill_flops_causal: float | None = None  # with the half of attention's square that a causal kernel computes
    prefill_flops_causal_ratio: float | None = None
    decode_flops_per_token: float | None = None  # of the step after the prefill
    decode_flops_ratio: float | None = None
    kv_bytes_per_layer: list[float] | None = None  # mean over the samples
    timing: dict[str, Any] | None = None  # stages, lengths, memory and conditions: see pdrop/timing/measure.py
    # text and visual tokens of the model's prompt, for which budgets and costs are, and of the one that was timed
    model_prompt: dict[str, float] | None = None
    timed_prompt: dict[str, float] | None = None


@dataclass
class RunRecord:
    """One run, as kept in record.json."""

    spec: RunSpec
    status: Status
    started_at: str
    wall_s: float = 0.0
    error: str | None = None
    results: dict[str, TaskResult] = field(default_factory=dict)
    cost: Cost | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    # each time that stored answers were rescored: when, by which code, and the scores that were replaced
    rescored: list[dict[str, Any]] = field(default_factory=list)
    samples_digest: str = ""  # SHA-256 of samples.zip; "" without one, and in older records

    @property
    def run_id(self) -> str:
        return self.spec.run_id

    def to_json(self) -> str:
        """Indented JSON with the run_id in front and a checksum at the end; `from_json` reads it back."""
        data = {"run_id": self.run_id, **asdict(self)}
        return json.dumps(data | {"checksum": checksum(data)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Read a record.

        Raises:
            ValueError: If a field is unknown or missing, or the run_id or the checksum does not match
                (older records have none).
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("it holds no object")
        proof = data.pop("checksum", None)
        held = checksum(data)
        run_id = data.pop("run_id", None)
        spec = dict(data.pop("spec", {}))
        spec["tasks"] = tuple(spec.get("tasks", ()))
        results = {
            name: build(TaskResult, {**r, "scores": {k: build(Score, v) for k, v in r["scores"].items()}})
            for name, r in data.pop("results", {}).items()
        }
        cost = data.pop("cost", None)
        if cost is not None:
            timed = ("prefill_ms", "baseline_prefill_ms", "prefill_time_ratio")
            cost = build(Cost, cost | {k: build(Interval, cost[k]) for k in timed if cost.get(k) is not None})
        record = build(cls, data | {"spec": build(RunSpec, spec), "results": results, "cost": cost})
        record.check_names()
        if run_id != record.run_id:
            raise ValueError(f"record says run_id {run_id}, but its spec hashes to {record.run_id}: edited by hand?")
        if proof is not None and proof != held:
            raise ValueError("it does not hold what was written, by its checksum: edited by hand, or damaged")
        return record

    def check_names(self) -> None:
        """Refuse names that would lead a path elsewhere: of model, method and tasks.

        Raises:
            ValueError: Naming the first.
        """
        names.check("spec.model", self.spec.model)
        names.check("spec.method", self.spec.method)
        for task in (*self.spec.tasks, *self.results):
            names.check("a task", task)

    def write(self, folder: Path) -> Path:
        """Write record.json into `folder` in one step: a reader sees the old one or the new one, never half."""
        path = folder / "record.json"
        write_atomically(path, self.to_json())
        return path

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of a run folder.

        Raises:
            ValueError: If the file is not a record of this version; the message names the file.
        """
        path = folder / "record.json"
        try:
            return cls.from_json(path.read_text(encoding="utf8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); move the folder away") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a record that this version reads ({error}); move the folder away"
            ) from error


def checksum(data: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 over a record's content: equal values give equal text, to the last digit."""
    plain = json.loads(json.dumps(data))  # keys as JSON has them
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hashed(spec: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 over a spec's fields, without those that have their default in LATER."""
    said = {name: value for name, value in spec.items() if name not in LATER or value != LATER[name]}
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()[:12]


def differing_conditions(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why two times must not be compared, in words: the conditions in which their measurements differ."""
    found = [
        f"{name}: {one.get(name)} and {other.get(name)}"
        for name in EQUAL_CONDITIONS
        if one.get(name) != other.get(name)
    ]
    for name, share in CLOSE_CONDITIONS.items():
        here, there = one.get(name), other.get(name)
        # a condition that one of the two did not note cannot be compared
        if here is not None and there is not None and abs(here - there) > share * max(here, there):
            found.append(f"{name}: {here:g} and {there:g}, more than {share:.0%} apart")
    return found


def check_seed(told: str, value: int) -> None:
    """Refuse a seed that the random generators of numpy and transformers do not accept.

    Raises:
        ValueError: Naming what the user calls it.
    """
    if not 0 <= value < 2**32:
        raise ValueError(f"{told} is a whole number from 0 to {2**32 - 1}, not {value}")


def check_word(told: str, value: str, words: Sequence[str]) -> None:
    """Refuse a word that is not one of `words`.

    Args:
        told: What the user calls it.

    Raises:
        ValueError: Naming it and the words.
    """
    if value not in words:
        raise ValueError(f"{told} is {', '.join(words[:-1])} or {words[-1]}, not {value!r}")


def build(kind: type[Built], data: Mapping[str, Any]) -> Built:
    """`kind(**data)`, with a clear error for unknown fields.

    Raises:
        ValueError: If `data` has fields that `kind` does not have, or lacks some it needs.
    """
    made_of: Any = kind  # a dataclass, which `type[Built]` cannot express
    unknown = set(data) - {f.name for f in fields(made_of)}
    if unknown:
        raise ValueError(f"unknown fields of {kind.__name__}: {', '.join(sorted(unknown))}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(str(error)) from error


def canonical_json(value: Any) -> str:
    """Sorted, compact JSON with floats at 12 significant digits: equal values give equal text."""

    def round_floats(x: Any) -> Any:
        if isinstance(x, float):
            return float(f"{x:.12g}")
        if isinstance(x, Mapping):
            return {k: round_floats(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [round_floats(v) for v in x]
        return x

    return json.dumps(round_floats(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def read_lines(path: Path) -> list[str]:
    """The lines of a JSONL file without their ends. Only "\\n" ends one: U+2028, U+2029 and U+0085 are text."""
    lines = path.read_bytes().decode("utf8").split("\n")
    return lines if lines[-1] else lines[:-1]


def read_records(store: Path) -> Iterator[RunRecord]:
    """All records under a store folder (results/runs), in the order of their folders' names."""
    for path in sorted(store.glob("*/record.json")):
        yield RunRecord.read(path.parent)
