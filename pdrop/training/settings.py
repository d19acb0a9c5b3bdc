"""A training's settings, resolved to plain values, and its identity, which follows from them. No torch."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pdrop import names
from pdrop.commands import script
from pdrop.environment import versions
from pdrop.identity import TRAINED, code_digest
from pdrop.record import Dtype, ImageMode, canonical_json, check_word
from pdrop.training.parts import Lora, Rates
from pdrop.training.record import Format, Overlong, TrainingSpec
from pdrop.training.start import Start

if TYPE_CHECKING:
    from pdrop.methods.base import Method
    from pdrop.schedule import Schedule

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "accelerate", "peft")


@dataclass(frozen=True)
class TrainingSettings:
    """A training's settings, resolved. See conf/train.yaml and conf/train/ for what each means."""

    recipe: str
    model: str
    path: str
    revision: str | None
    weights: Literal["pretrained", "random"]
    dtype: Dtype
    attn_implementation: str
    device: str  # "cpu" or "cuda"; of several GPUs each process takes its own
    data: Path
    images: Path | None
    format: Format
    image_mode: ImageMode
    max_length: int
    overlong: Overlong
    steps: int | None
    epochs: float
    batch_size: int
    micro_batch: int
    rates: Rates
    start: Start
    lora: Lora | None
    grouped: bool
    gradient_checkpointing: bool
    bf16: bool
    tf32: bool
    seed: int
    save_steps: int
    log_steps: int
    workers: int
    parallel: str
    output: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)  # TrainingArguments that the recipe and the user set
    parallel_arguments: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    sdpa_kernel: str = ""  # which of torch's kernels comes first: pdrop/models/attention.py

    @property
    def processes(self) -> int:
        """The number of processes that train together, from torchrun's and accelerate's environment."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def accumulate(self) -> int:
        """The number of batches whose gradients are summed for a step."""
        return self.batch_size // (self.micro_batch * self.processes)

    def steps_for(self, records: int) -> int:
        """The number of optimizer steps over that many records."""
        batches = math.ceil(math.ceil(records / self.micro_batch) / self.processes)
        return self.steps if self.steps is not None else math.ceil(math.ceil(batches / self.accumulate) * self.epochs)

    def check(self) -> None:
        """Refuse settings that do not go together.

        Raises:
            ValueError: If two do not; names the setting and the remedy.
        """
        for name in ("batch_size", "micro_batch", "max_length", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is a number from 1 on, not {getattr(self, name)}")
        if self.save_steps % self.log_steps:
            raise ValueError(
                f"train.save_steps={self.save_steps} must be a multiple of train.log_steps={self.log_steps}: a "
                "training that resumes from a checkpoint logs from there on"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"train.steps is a number from 1 on, or null for train.epochs, not {self.steps}")
        if self.steps is None and not self.epochs > 0:
            raise ValueError(f"train.epochs is above 0, not {self.epochs}")
        if self.batch_size % (self.micro_batch * self.processes):
            raise ValueError(
                f"a step of batch_size={self.batch_size} records cannot be made of batches of micro_batch="
                f"{self.micro_batch} on {self.processes} processes: choose a multiple of {self.micro_batch} x "
                f"{self.processes}"
            )
        for told, value, hint in (
            ("train.format", self.format, Format),
            ("train.image_mode", self.image_mode, ImageMode),
            ("train.overlong", self.overlong, Overlong),
            ("dtype", self.dtype, Dtype),
        ):
            check_word(told, value, get_args(hint))
        names.check("model.name", self.model)
        names.check("train.name", self.recipe)
        if self.lora is not None and self.parallel in ("fsdp", "deepspeed_zero3"):
            raise ValueError(
                f"LoRA's adapters are merged at the end, which needs whole weights: parallel=ddp, not {self.parallel}"
            )
        if self.parallel == "fsdp" and self.device == "cpu":
            raise ValueError(
                "parallel=fsdp needs device=cuda: accelerate shards on GPUs only, and would train whole copies on the "
                "CPU; parallel=ddp does that by name"
            )
        if self.parallel.startswith("deepspeed") and self.device == "cpu" and self.processes > 1:
            raise ValueError(
                f"parallel={self.parallel} on the CPU is for one process, as which accelerate counts all of them: "
                "parallel=ddp trains with several"
            )
        if self.processes > 1 and self.parallel == "none":
            raise ValueError(f"{self.processes} processes were started: choose parallel=ddp, fsdp or deepspeed_zero2")
        if self.processes == 1 and self.parallel in ("ddp", "fsdp"):
            raise ValueError(
                f"parallel={self.parallel} is for several processes: torchrun --nproc_per_node=8 {script('train')} "
                f"parallel={self.parallel} ..."
            )

    def identity(
        self,
        method_name: str,
        method: Method | None,
        schedule: Schedule,
        model_fingerprint: str,
        data_fingerprint: str,
        records: int,
        start: Mapping[str, str],
    ) -> TrainingSpec:
        """The training's identity; dials that the method ignores are not part of it.

        `start` is what pdrop.training.start.begin returned.
        """
        arguments = {} if method is None else {k: v for k, v in asdict(method).items() if k != "positions"}
        return TrainingSpec(
            recipe=self.recipe,
            model=self.model,
            model_path=self.path,
            revision=self.revision,
            weights=self.weights,
            model_fingerprint=model_fingerprint,
            data_fingerprint=data_fingerprint,
            records=records,
            format=self.format,
            image_mode=self.image_mode,
            max_length=self.max_length,
            overlong=self.overlong,
            method=method_name,
            method_args=canonical_json(arguments),
            schedule=str(schedule),
            positions=method.positions if method is not None and schedule else "original",
            seed=self.seed,
            steps=self.steps_for(records),
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            processes=self.processes,
            rates=canonical_json(asdict(self.rates)),
            start=canonical_json(start),
            lora="" if self.lora is None else canonical_json(asdict(self.lora)),
            grouped=self.grouped,
            dtype=self.dtype,
            bf16=self.bf16,
            attn_implementation=self.attn_implementation,
            device=self.device,
            parallel=self.parallel,
            arguments=canonical_json({**self.arguments, "tf32": self.tf32}),
            versions=canonical_json(versions(PACKAGES)),
            sdpa_kernel=self.sdpa_kernel,
        )

    def as_given(self) -> dict[str, Any]:
        """All settings as JSON values, for the record."""
        values = asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def code_of(method: Method | None) -> str:
    """Digest of the sources that make the weights, including the method's own file."""
    parts = [] if method is None else method.parts
    files = [Path(source) for part in parts if (source := inspect.getsourcefile(type(part))) is not None]
    return code_digest(files, TRAINED)
