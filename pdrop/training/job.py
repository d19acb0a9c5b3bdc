"""One training: skip it if it is done, otherwise continue from its last checkpoint, and write model and record.

It takes plain arguments and leaves a folder with the model, its curve and a TrainingRecord.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pdrop import names
from pdrop.commands import typed
from pdrop.engine import attach
from pdrop.engine.visual import visual_ids
from pdrop.environment import environment
from pdrop.models.attention import sdpa_order
from pdrop.models.checkpoint import Checkpoint, load
from pdrop.schedule import Schedule
from pdrop.shapes import ModelSizes
from pdrop.store import Hold, locked, refuse_links
from pdrop.timing.memory import peak_since, restart_peak
from pdrop.training.arguments import arguments_of
from pdrop.training.batches import Collator
from pdrop.training.conversations import Conversations
from pdrop.training.cost import cost_of
from pdrop.training.encode import Encoder, Rows
from pdrop.training.loop import (
    COMPLETE,
    Bar,
    LossCurve,
    MarkComplete,
    PartsTrainer,
    TrainingFailed,
    counts_at,
    means_of,
)
from pdrop.training.parts import checkpoint_activations, layers_of, prepare
from pdrop.training.record import FILE, TrainingRecord
from pdrop.training.refusals import (
    check_parallel,
    refuse_data_parallel,
    refuse_quantised,
    refuse_uneven,
    refuse_untrainable,
)
from pdrop.training.settings import TrainingSettings, code_of
from pdrop.training.start import begin

if TYPE_CHECKING:
    from pdrop.methods.base import Method

log = logging.getLogger("pdrop")


def train(
    settings: TrainingSettings,
    method_name: str,
    method: Method | None,
    make_schedule: Callable[[int], Schedule],
    overrides: Sequence[str] = (),
) -> TrainingRecord:
    """Run one training, unless it is done.

    Args:
        settings: The model, the data and how to train.
        method_name: The method's name in tables.
        method: Ranks the visual tokens; None drops nothing.
        make_schedule: The schedule for a decoder of that many layers.
        overrides: The command line's, for the record.

    Raises:
        ValueError: If something asked for is not available; nothing has been written then.
        TrainingFailed: If it failed; its record has status "failed" and the traceback.
    """
    settings.check()
    names.check("method", method_name)
    refuse_data_parallel(arguments_of(settings, settings.output / "unused", 1))  # and what else can be refused early
    records = Conversations(settings.data, settings.images)
    refuse_quantised(settings)
    checkpoint = load(
        settings.path,
        name=settings.model,
        revision=settings.revision,
        weights=settings.weights,
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        seed=settings.seed,
    )
    started = begin(checkpoint, settings.start, settings.seed)
    ModelSizes.from_config(checkpoint.model.config)  # refuses a model whose steps cannot be counted
    schedule = make_schedule(checkpoint.num_layers)
    refuse_untrainable(method_name, method, schedule)
    refuse_uneven(settings, schedule, records.lengths)
    encoder = Encoder(
        checkpoint.processor, settings.format, settings.image_mode, settings.max_length, settings.overlong
    )
    encoder.check(records)
    spec = settings.identity(
        method_name, method, schedule, checkpoint.fingerprint, records.fingerprint, len(records), started
    )
    folder, code = settings.output / spec.folder, code_of(method)
    refuse_links(folder)
    main = is_first()
    log.setLevel(logging.NOTSET if main else logging.WARNING)  # only the main process logs
    with locked(folder) if main else contextlib.nullcontext() as held:
        before = TrainingRecord.read(folder) if (folder / FILE).exists() and not settings.force else None
        if before is not None and before.code != code:
            made = "made" if before.status == "done" else "begun"
            log.warning("%s was %s by other code; force=true starts again", folder, made)
        if before is not None and before.status == "done":
            log.info("done already  %s", folder)
            return before
        record = TrainingRecord(spec, "running", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        record.sessions = before.sessions + 1 if before is not None else 1
        record.recipe, record.code, record.command = settings.as_given(), code, [typed("train").split()[-1], *overrides]
        record.environment = environment(settings.device)
        if main and settings.force:  # otherwise a later start would continue from an earlier training's checkpoints
            for old in (*folder.glob("checkpoint-*"), *folder.glob("model")):
                shutil.rmtree(old)
        log.info("training      %s  %s", f"{method_name} [{schedule or 'nothing dropped'}]", folder)
        with recorded(record, folder, held):
            run(record, checkpoint, Rows(records, encoder), method, schedule, settings, folder)
    seconds = record.cost.step_wall_s if record.cost is not None else 0.0
    log.info("done          %s  loss %.4f, %.2f s a step", folder, record.final_loss, seconds)
    log.info("to score it:  %s %s", typed("run"), shlex.join(record.scoring(spec.folder, folder / "model")))
    return record


@contextlib.contextmanager
def recorded(record: TrainingRecord, folder: Path, held: Hold | None) -> Iterator[None]:
    """Write the record when its training begins and ends; checkpoints of a finished training are removed.

    Args:
        record: The record, with status "running".
        folder: The training's.
        held: The hold on the folder, in the process that writes; None in the others.

    Raises:
        TrainingFailed: If the training fails.
    """
    if held is not None:
        record.write(folder)
    try:
        yield
    except BaseException as error:
        # an interrupted training can be continued; so can a failed one once its cause is fixed, unless that
        # was in the data: other data make another training
        record.status = "failed" if isinstance(error, Exception) else "running"
        record.error = traceback.format_exc()
        if held is not None:
            held.check()  # else another process has taken it over
            record.write(folder)
        if not isinstance(error, Exception):
            raise
        raise TrainingFailed(f"{folder} failed: {error} (traceback in {folder / FILE})") from error
    record.status = "done"
    if held is not None:
        held.check()
        record.write(folder)
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)


def run(
    record: TrainingRecord,
    checkpoint: Checkpoint,
    rows: Rows,
    method: Method | None,
    schedule: Schedule,
    settings: TrainingSettings,
    folder: Path,
) -> None:
    """The steps, from the last checkpoint on; writes the model and fills in `record`."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers import set_seed
    from transformers.integrations.integration_utils import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    spec, caches = record.spec, checkpoint.model.config.get_text_config().use_cache
    set_seed(settings.seed)  # adapters are drawn before the Trainer seeds
    model = prepare(checkpoint.model.train(), settings.rates, settings.lora)
    if settings.gradient_checkpointing:
        checkpoint_activations(checkpoint.model)
    arguments = arguments_of(settings, folder, spec.steps, layers_of(model))
    resumed = None if settings.force else last_checkpoint(folder)
    step = int(resumed.name.partition("-")[2]) if resumed else 0
    curve = LossCurve(folder, step, lambda: int(trainer.all_counts()[1]))
    trainer = PartsTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator(rows.encoder, pad_of(checkpoint), always_image=torch.distributed.is_initialized()),
        processing_class=checkpoint.processor,
        callbacks=[curve, TensorBoardCallback(SummaryWriter(str(folder / "tensorboard")))],
        rates=settings.rates,
        lengths=rows.records.lengths,
        grouped=settings.grouped,
        visual_ids=torch.tensor(visual_ids(checkpoint.model.config)),
    )
    if resumed is not None and is_first():  # the counts are of all processes
        trainer.counts = counts_at(resumed)
    restart_peak(arguments.device)
    trainer.add_callback(MarkComplete(trainer))
    check_parallel(trainer, settings.parallel, settings.device)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.add_callback(Bar(f"{record.spec.recipe} {record.spec.method}"))
    drops = attach(model, method, schedule, tokenizer=checkpoint.tokenizer) if schedule else contextlib.nullcontext()
    with drops, sdpa_order(settings.sdpa_kernel):
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    record.steps_done, record.final_loss = trainer.state.global_step, curve.final_loss()
    checkpoint.model.config.get_text_config().use_cache = caches  # the Trainer sets it to False, and would save that
    save(trainer, checkpoint, settings, folder)
    means, sizes = means_of(trainer.all_counts()), ModelSizes.from_config(checkpoint.model.config)
    record.cost = cost_of(curve.totals(), means, peak_since(arguments.device), sizes, method, schedule, settings)


def save(trainer: PartsTrainer, checkpoint: Checkpoint, settings: TrainingSettings, folder: Path) -> None:
    """model/ with weights and processor. LoRA: adapter/ too, and merged into the model."""
    if settings.lora is not None:
        trainer.save_model(str(folder / "adapter"))
        if trainer.is_world_process_zero():
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder / "model")
    else:
        trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        (folder / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle
        checkpoint.processor.save_pretrained(folder / "model")


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; incomplete ones are removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append(path)
        elif is_first():
            log.warning("%s was not finished and is removed", path)
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def is_first() -> bool:
    """Whether this process is the one that writes, of those that train together."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def pad_of(checkpoint: Checkpoint) -> int:
    """Token id of padding: the tokenizer's, but never an image's."""
    pad = checkpoint.processor.tokenizer.pad_token_id
    if pad is None or pad in visual_ids(checkpoint.model.config):
        raise ValueError(f"{checkpoint.path}: its tokenizer has no pad token of its own; set one in its config")
    return int(pad)
