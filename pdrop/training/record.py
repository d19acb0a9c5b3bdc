"""A training: what identifies it (TrainingSpec) and its results (TrainingRecord), as JSON. No torch.

A training's folder is `<output>/<recipe>-<model>-<method>-<training_id>/`:

    training.json       the TrainingRecord
    model/              the trained model with its processor: run.py model=folder model.path=<this>
    curve.csv           one row per logged step: loss, learning rate, tokens per second, seconds
    tensorboard/        the same for TensorBoard
    checkpoint-N/       from which a killed training resumes
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pdrop import names
from pdrop.record import build, hashed
from pdrop.store import write_atomically

FILE = "training.json"
FORMAT = 1
Format = Literal["vicuna_v1", "plain", "chat"]  # of conversations: pdrop/training/encode.py
Overlong = Literal["stop", "skip"]


@dataclass(frozen=True)
class TrainingSpec:
    """Everything that can change the weights that come out. Two trainings with equal specs are one.

    The code is not part of it (the record names it), so that an edit does not end a training of days.
    """

    recipe: str
    model: str
    model_path: str
    revision: str | None
    weights: str
    model_fingerprint: str
    data_fingerprint: str
    records: int
    format: str
    image_mode: str
    max_length: int
    overlong: str
    method: str
    method_args: str  # canonical JSON of the method's own arguments
    schedule: str  # Schedule in canonical spelling; "" drops nothing
    positions: str
    seed: int
    steps: int  # optimizer steps
    batch_size: int  # records per step, over all processes
    micro_batch: int  # records at once on a device
    processes: int
    rates: str  # canonical JSON of each part's learning rate
    start: str  # canonical JSON of what parts come from instead of the checkpoint
    lora: str  # canonical JSON, or ""
    grouped: bool  # batches of one modality and similar lengths
    dtype: str  # of the weights
    bf16: bool  # matrix products in bfloat16
    attn_implementation: str
    device: str
    parallel: str
    arguments: str  # canonical JSON of the other TrainingArguments that are set
    versions: str
    format_version: int = FORMAT
    sdpa_kernel: str = ""  # as of a run

    @property
    def training_id(self) -> str:
        """First 12 hex digits of the SHA-256 over the canonical JSON of all fields."""
        return hashed(asdict(self))

    @property
    def folder(self) -> str:
        """The training's folder in its store."""
        return f"{self.recipe}-{self.model}-{self.method}-{self.training_id}"


@dataclass
class TrainingCost:
    """The measured cost of the steps. Means are over the steps; seconds are this process's."""

    step_wall_s: float  # from the end of a step to the end of the next, loading included, saving not
    step_cpu_s: float  # of this process and its threads
    data_wall_s: float  # the part of it spent waiting for data
    tokens_per_s: float  # of all processes, padding not counted
    wall_s: float  # of all steps
    cpu_s: float
    peak_memory_bytes: int | None  # of the device; on a CPU of the process; None if the system does not report it
    text_tokens: float  # mean of a record
    visual_tokens: float  # mean of a record, before dropping
    visual_tokens_per_layer: list[float]
    step_flops: float | None = None  # closed form for the mean record: pdrop/training/cost.py
    step_flops_unpruned: float | None = None  # the same with nothing dropped


@dataclass
class TrainingRecord:
    """One training, as kept in training.json."""

    spec: TrainingSpec
    status: Literal["running", "done", "failed"]
    started_at: str
    sessions: int = 1  # how often it was started; more than once after an interruption
    error: str | None = None
    steps_done: int = 0
    final_loss: float | None = None  # mean over the last tenth of the steps
    cost: TrainingCost | None = None
    recipe: dict[str, Any] = field(default_factory=dict)  # the settings as given
    code: str = ""  # digest of the sources
    environment: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Indented JSON with the training_id in front."""
        return json.dumps({"training_id": self.spec.training_id, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def scoring(self, name: str, path: Path | str) -> list[str]:
        """run.py's overrides for the model at `path`, with the prompt and image mode that it was trained with."""
        prompt = "chat" if self.spec.format == "chat" else "vicuna_v1"
        told = ["model=folder", f"model.name={name}", f"model.path={path}"]
        told += [f"model.prompt={prompt}"] if prompt != "chat" else []
        return told + ([f"model.image_mode={self.spec.image_mode}"] if self.spec.image_mode != "crop" else [])

    def write(self, folder: Path) -> None:
        """Write training.json in one step."""
        write_atomically(folder / FILE, self.to_json())

    @classmethod
    def read(cls, folder: Path) -> TrainingRecord:
        """The record of a training's folder.

        Raises:
            ValueError: If the file is not a record of this version; the message names it.
        """
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf8"))
            claimed, cost = data.pop("training_id"), data.pop("cost", None)
            spec = build(TrainingSpec, data.pop("spec"))
            record = build(cls, data | {"spec": spec, "cost": None if cost is None else build(TrainingCost, cost)})
            if claimed != spec.training_id:
                raise ValueError(f"it says training_id {claimed}, but its spec hashes to {spec.training_id}")
            for part in ("recipe", "model", "method"):
                names.check(f"spec.{part}", getattr(spec, part))
            return record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a record that this version reads ({error}); move the folder away, or set force=true"
            ) from error
