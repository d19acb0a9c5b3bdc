"""transformers' Trainer with rates by part, batches by modality, batches without an answer, and a log of each step."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from pdrop.pace import Pace, on_a_terminal
from pdrop.training.batches import ByModality
from pdrop.training.parts import Rates, groups

CURVE, COMPLETE = "curve.csv", "complete"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm")
TIMES = ("step_wall_s", "step_cpu_s", "data_wall_s", "tokens", "tokens_per_s")


class TrainingFailed(RuntimeError):
    """The training cannot continue; one line that says why."""


class PartsTrainer(Trainer):
    """Trains the parts of a vision-language model at separate learning rates.

    Losses are means over all answer tokens of a step, across accumulated batches and processes (the official code
    averages batch means). A batch without an answer adds nothing, instead of NaN.

    Args:
        rates: The learning rates of the parts.
        lengths: The records' lengths, negative for text only.
        grouped: Whether records of one modality and of similar lengths go together.
        visual_ids: Input ids of visual tokens, for counting.
    """

    def __init__(self, *, rates: Rates, lengths: Sequence[int], grouped: bool, visual_ids: Tensor, **options: Any):
        super().__init__(**options)
        # Qwen's models declare that they do not take the number of answer tokens. Their loss does; without that number
        # it would be a mean of batch means, NaN for a batch without an answer.
        self.model_accepts_loss_kwargs = True
        self.rates, self.lengths, self.grouped, self.visual_ids = rates, lengths, grouped, visual_ids
        self.counts = torch.zeros(3, dtype=torch.long)  # records, their tokens, the visual ones among these

    def _get_train_sampler(self, train_dataset: Any = None) -> ByModality:
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByModality(self.lengths, step, self.args.seed, lambda: int(self.state.epoch or 0), self.grouped)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name, over groups of parameters by rate.

        Raises:
            ValueError: If the optimizer chooses its parameters itself.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(f"optim={self.args.optim} chooses its parameters itself: use adamw_torch or the like")
            named = groups(model, self.rates, set(self.get_decay_parameter_names(model)), self.args.weight_decay)
            # the first group's rate is the one that is logged
            self.optimizer = kind(sorted(named, key=lambda group: -group["lr"]), **options)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own, which would train one step too many after a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def all_counts(self) -> Tensor:
        """The sum of `counts` over all processes, in each of them; every process calls this."""
        total: Tensor = self.accelerator.reduce(self.counts.to(self.args.device), "sum")
        return total.cpu()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint through from_pretrained.

        A checkpoint is saved under the names of the published files, which for LLaVA are not those of the modules.
        transformers' own loading takes the file unchanged, warns about missing keys, and continues with the initial
        weights.
        """
        model = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):  # sharded, or adapters under their own names
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved: Any = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As transformers' own; for a batch without an answer see the class."""
        there = inputs["attention_mask"].bool()
        self.visual_ids = self.visual_ids.to(there.device)  # copied once: each copy would wait for the device
        visual = torch.isin(inputs["input_ids"], self.visual_ids) & there
        rows = there.new_full((), len(there), dtype=torch.long)
        self.counts = self.counts.to(there.device) + torch.stack([rows, there.sum(), visual.sum()])
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class LossCurve(TrainerCallback):
    """Times the steps, writes curve.csv, and adds the times to the other logs.

    Seconds are means over the steps of a row: `step` from the end of one to the end of the next, of which `data` was
    spent waiting for the batch; checkpoints are not counted. CPU seconds are this process's. When a training resumes,
    the rows after the checkpoint are removed: they will be made again.

    Args:
        folder: Of the training.
        resumed_step: The checkpoint's; 0: none.
        seen: Tokens so far, over all processes and sessions; read when a row is written, since it waits for the device.
    """

    def __init__(self, folder: Path, resumed_step: int, seen: Callable[[], int]) -> None:
        self.path, self.seen = folder / CURVE, seen
        self.sums, self.steps, self.tokens = dict.fromkeys(TIMES[:3], 0.0), 0, 0
        self.mark = (0.0, 0.0)
        rows = read_curve(self.path) if resumed_step else []
        self.rows = [row for row in rows if int(row["step"]) <= resumed_step]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark, self.tokens = self._now(), self.seen()
        if state.is_world_process_zero:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS + TIMES)
                writer.writeheader()
                writer.writerows(self.rows)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums["data_wall_s"] += self._now()[0] - self.mark[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._now()
        self.sums["step_wall_s"] += now[0] - self.mark[0]
        self.sums["step_cpu_s"] += now[1] - self.mark[1]
        self.steps += 1
        self.mark = now
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = self._now()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a row, if the step is logged.

        Raises:
            TrainingFailed: If the loss is NaN or infinite.
        """
        if not logs or "loss" not in logs or not self.steps:
            return
        seen, wall = self.seen(), self.sums["step_wall_s"]
        tokens = seen - self.tokens
        logs |= {name: value / self.steps for name, value in self.sums.items()}
        logs |= {"tokens": tokens, "tokens_per_s": tokens / wall}
        self.sums, self.steps, self.tokens = dict.fromkeys(self.sums, 0.0), 0, seen
        row = {"step": state.global_step, **{name: logs[name] for name in (COLUMNS + TIMES)[1:] if name in logs}}
        self.rows.append({name: str(value) for name, value in row.items()})
        if state.is_world_process_zero:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS + TIMES).writerow(row)
        if not math.isfinite(logs["loss"]):
            raise TrainingFailed(
                f"the loss is {logs['loss']} at step {state.global_step}: lower train.learning_rate, or look at the "
                f"records of that step; {self.path} has the curve"
            )

    def totals(self) -> dict[str, float]:
        """Over all sessions: means per step (step_wall_s, step_cpu_s, data_wall_s), tokens_per_s, and sums (wall_s,
        cpu_s)."""
        steps, before = [], 0
        for row in self.rows:
            steps.append(int(row["step"]) - before)
            before = int(row["step"])
        sums = {name: sum(n * float(row[name]) for n, row in zip(steps, self.rows)) for name in TIMES[:3]}
        tokens = sum(float(row["tokens"]) for row in self.rows)
        means = {name: value / max(1, before) for name, value in sums.items()}
        wall = sums["step_wall_s"]
        return means | {"tokens_per_s": tokens / wall if wall else 0.0, "wall_s": wall, "cpu_s": sums["step_cpu_s"]}

    def final_loss(self) -> float:
        """The mean loss over the last tenth of the rows."""
        last = [float(row["loss"]) for row in self.rows[-max(1, len(self.rows) // 10) :]]
        return sum(last) / len(last)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


class MarkComplete(TrainerCallback):
    """Marks each complete checkpoint with a file, which a training that is killed while saving does not leave.

    The file has the counts of the records so far, over all sessions, like the curve.
    """

    def __init__(self, trainer: PartsTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counts = self.trainer.all_counts()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
            path.write_text(json.dumps(counts.tolist()))


def counts_at(checkpoint: Path) -> Tensor:
    """PartsTrainer.all_counts at a complete checkpoint."""
    return torch.tensor(json.loads((checkpoint / COMPLETE).read_text()), dtype=torch.long)


class Bar(TrainerCallback):
    """Progress, loss and seconds per step: a bar on a terminal, otherwise a plain line every half a minute."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.line: Any = None
        self.pace: Pace | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        if state.is_world_process_zero and on_a_terminal():
            options = dict(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
            self.line = tqdm(desc=self.name, unit=" steps", **options)
        elif state.is_world_process_zero:
            self.pace = Pace(self.name, "steps", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.line is not None:
            self.line.update(1)
        if self.pace is not None:
            self.pace.at(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if self.line is not None:
                self.line.set_postfix(loss=f"{logs['loss']:.3f}", rate=f"{logs['learning_rate']:.2g}", refresh=False)
            if self.pace is not None:
                self.pace.what = f"{self.name}, loss {logs['loss']:.3f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.line is not None:
            self.line.close()


def read_curve(path: Path) -> list[dict[str, str]]:
    """The rows of a curve.csv; none without the file. A last row that a kill cut off is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row["tokens_per_s"]]


def means_of(counts: Tensor) -> Mapping[str, float]:
    """The mean record's text_tokens and visual_tokens, from PartsTrainer.all_counts."""
    records, tokens, visual = (float(count) for count in counts)
    return {"text_tokens": (tokens - visual) / max(1.0, records), "visual_tokens": visual / max(1.0, records)}
