"""Trains the embedded model from scratch on the procedural corpus and writes it as a transformers folder.

    python -m recipes.embedded.train [--work build/embedded] [--out pdrop/embedded/model] [--workers 2] [--device cuda]

The last checkpoint and its model are in --work; a second start continues from there. The finished model is written to
--out with curve.csv: loss, exact match per family on images never seen before, and patch accuracies, over windows of
steps. With several workers the curve shows the images and CPU seconds of the first.

A step takes about a second on a CPU and much less on a GPU, for which separate processes make the images in advance
(--loader-workers).
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pdrop.command_help import CommandHelp
from pdrop.embedded.drawing import PATCH_HEADS
from pdrop.embedded.model import FOLDER, save
from pdrop.embedded.vocabulary import FAMILIES
from recipes.embedded.loader import batches
from recipes.embedded.recipe import RECIPE
from recipes.embedded.stage import TrainingPhase
from recipes.embedded.trainer import Trainer, read_checkpoint

CHECKPOINT = "checkpoint.pt"
_LOADER_WORKERS = 8  # make the recipe's images in a minute or two; more would fill a container's shared memory
_COLUMNS = (
    "stage", "step", "images", "cpu_seconds", "wall_seconds", "loss", "gradient", *FAMILIES, "spelled", "moved",
    *(f"patch_{name}" for name in PATCH_HEADS),
)  # fmt: skip


def _write_curve(path: Path, row: Mapping[str, object]) -> None:
    """Appends a row; a run that continues from a checkpoint first drops the rows after it."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _trim_curve(path: Path, images: int) -> tuple[float, float]:
    """Drops rows after `images` (they will be made again); returns the CPU and wall seconds up to there."""
    if not path.exists():
        return 0.0, 0.0
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["images"]) <= images]
    path.unlink()
    for row in rows:
        _write_curve(path, row)
    return (float(rows[-1]["cpu_seconds"]), float(rows[-1]["wall_seconds"])) if rows else (0.0, 0.0)


def train(
    work: Path,
    out: Path,
    device: str = "cpu",
    loader_workers: int = 0,
    recipe: tuple[TrainingPhase, ...] = RECIPE,
    window: int = 25,
    checkpoint_seconds: float = 120.0,
) -> None:
    """Runs the recipe from the last checkpoint in `work` to its end; writes the model to `out`.

    In a process group every process runs this, and the first one writes. `loader_workers` more processes make images.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, device=device)
    writes = trainer.rank == 0
    checkpoint, curve = work / CHECKPOINT, work / "curve.csv"
    if checkpoint.exists():
        trainer.load(checkpoint)
    if trainer.workers > 1:
        dist.barrier()  # nobody writes before all have read
    spent = _trim_curve(curve, trainer.images) if writes else (0.0, 0.0)
    began, saved, answers = (time.process_time(), time.monotonic()), time.monotonic(), False
    for batch in batches(trainer.data, trainer.data.number(trainer.place), loader_workers):
        stage = trainer.stage
        answers = answers or stage.trains_decoder
        trainer.step(batch.to(trainer.device))
        step = trainer.step_index or stage.steps
        ended = trainer.step_index == 0
        if writes and (step % window == 0 or ended):
            means = {name: f"{value:.4f}" for name, value in trainer.window.take().items()}
            now = time.process_time(), time.monotonic()
            seconds, wall = (before + at - start for before, at, start in zip(spent, now, began))
            row = {
                "stage": stage.name,
                "step": step,
                "images": trainer.images,
                "cpu_seconds": f"{seconds:.0f}",
                "wall_seconds": f"{wall:.0f}",
            }
            _write_curve(curve, row | means)
            shown = " ".join(f"{name.removeprefix('patch_')}={value}" for name, value in means.items())
            place = f"{stage.name} {step}/{stage.steps} images={trainer.images}"
            sys.stderr.write(f"{place} cpu={seconds:.0f}s wall={wall:.0f}s {shown}\n")
            if ended or time.monotonic() - saved > checkpoint_seconds:
                trainer.save(checkpoint)
                saved = time.monotonic()
                if answers:
                    save(trainer.model, work / "model")
    if writes:
        save(trainer.model, out)
        shutil.copy(curve, out / "curve.csv")


def _worker(rank: int, workers: int, port: int, work: Path, out: Path, loader_workers: int) -> None:
    """One of several training processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        train(work, out, loader_workers=loader_workers)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=CommandHelp)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the finished model")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each that share a CPU's steps")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--loader-workers",
        type=int,
        help=f"processes that make images; for a GPU one fewer than there are cores, at most {_LOADER_WORKERS}",
    )
    options = parser.parse_args(arguments)
    loader_workers = options.loader_workers
    if loader_workers is None:
        loader_workers = (
            0 if options.device == "cpu" else max(1, min(_LOADER_WORKERS, len(os.sched_getaffinity(0)) - 1))
        )
    if options.workers < 1 or loader_workers < 0:
        parser.error(
            f"--workers must be at least 1, got {options.workers}; --loader-workers at least 0, got {loader_workers}"
        )
    if options.device != "cpu" and options.workers > 1:
        parser.error(
            f"--workers {options.workers} share the steps of a CPU: leave it out with --device {options.device}"
        )
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no CUDA device here; leave it out to train on the CPU")
    try:
        if (checkpoint := options.work / CHECKPOINT).exists():
            read_checkpoint(checkpoint, RECIPE)
    except ValueError as error:
        parser.error(str(error))
    if options.workers == 1:
        torch.set_num_threads(1)
        train(options.work, options.out, options.device, loader_workers)
    else:
        spawn(_worker, (options.workers, _free_port(), options.work, options.out, loader_workers), options.workers)


if __name__ == "__main__":
    main()
