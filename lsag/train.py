"""Training: one loop, read from top to bottom. It is a generator; what it yields is for whoever shows progress."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

from lsag.checkpoint import Checkpoint, save_checkpoint
from lsag.config import Preset
from lsag.data import (
    EpochBatches,
    Source,
    batches,
    check_classes,
    choose_workers,
    eval_loader,
    open_split,
    random_key,
    train_loader,
)
from lsag.device import autocast, choose_device
from lsag.errors import CheckError, OutputError, UsageError
from lsag.evaluate import classifier, evaluate
from lsag.files import replacing, writing
from lsag.model import LSAG
from lsag.optim import lr_at, make_optimizer
from lsag.plots import draw_curves

REPORT_SECONDS = 0.5
"""How often a Step is reported, and the loss looked at: not at every step, as that waits for the device."""


@dataclass(frozen=True)
class Started:
    """The run is set up: everything that could be refused has been accepted."""

    preset: Preset
    out: Path
    device: str
    parameters: int
    train_images: int
    eval_images: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Step:
    """Where the training is, and the mean loss and speed since the last report."""

    epoch: int
    step: int
    loss: float
    lr: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: a line of metrics.jsonl. Accuracies are shares in 0..1, `seconds` since the start."""

    epoch: int
    step: int
    lr: float
    train_loss: float
    eval_loss: float
    top1: float
    top5: float
    best_top1: float
    images_per_second: float
    data_wait: float
    seconds: float


Progress = Started | Step | Epoch


def train(
    preset: Preset,
    *,
    data_dir: str | Path,
    out: str | Path,
    device: str = "auto",
    workers: int | None = None,
    download: bool = True,
) -> Iterator[Progress]:
    """Train `preset` on its dataset below `data_dir`, evaluating after each epoch.

    Writes preset.json, metrics.jsonl, last.pt, best.pt and curves.png to `out`, which must be new or empty. The number
    of `workers` that prepare images is chosen by default, and does not change the result.

    Yields Started once, then Steps and Epochs. Raises those of lsag.errors; CheckError for a loss that is not finite.
    """
    started = time.monotonic()
    data_dir, out = Path(data_dir), Path(out)
    on = choose_device(device)
    check_run_folder(out)

    # Data
    def source(*, train: bool) -> Source:
        return open_split(
            preset.data.dataset, data_dir, train=train, in_channels=preset.model.in_channels, download=download
        )

    train_source, eval_source = source(train=True), source(train=False)
    check_classes(train_source.classes, eval_source.classes, what="the training split", where="the evaluation split")
    if preset.data.dataset == "folder":
        preset = preset.with_classes(len(train_source.classes))
    elif len(train_source.classes) != preset.model.num_classes:
        found, asked = len(train_source.classes), preset.model.num_classes
        raise UsageError(
            f"{preset.data.dataset} has {found} classes, model.num_classes is {asked}",
            f"--set model.num_classes={found}, or choose the data with --dataset, which sets it",
        )
    if workers is None:
        workers = choose_workers(len(train_source))
    order = EpochBatches(len(train_source), preset)
    loader = train_loader(train_source, preset, order, workers=workers, pin=on.type == "cuda")
    eval_batches = eval_loader(eval_source, preset, batch_size=preset.train.batch_size, workers=workers)
    mix = make_mixup(preset)
    steps_per_epoch, recipe = len(order), preset.train

    # Model
    torch.manual_seed(random_key(recipe.seed, "init"))
    model = LSAG(preset.model).to(on)
    optimizer = make_optimizer(model, recipe)
    state = Checkpoint(model, preset, tuple(train_source.classes))
    classify = classifier(state, on)

    # Output
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "preset.json") as file:
        file.write(preset.model_dump_json(indent=2).encode() + b"\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield Started(preset, out, str(on), parameters, len(train_source), len(eval_source), steps_per_epoch)

    step, best, history = 0, -1.0, []
    for epoch in range(recipe.epochs):
        order.epoch = epoch
        model.train()
        losses, reported_loss = torch.zeros((), device=on), 0.0
        epoch_start = report_time = waiting = time.monotonic()
        waited, reported_steps = 0.0, 0
        for done, (images, labels) in enumerate(batches(loader), start=1):
            waited += time.monotonic() - waiting

            # One step. Mixup and drop-path draw from generators that depend on (seed, step) alone.
            torch.manual_seed(random_key(recipe.seed, "net", step))
            np.random.seed(random_key(recipe.seed, "mix", step) & 0xFFFFFFFF)
            images, labels = images.to(on, non_blocking=True), labels.to(on, non_blocking=True)
            targets = labels
            if mix is not None:
                images, targets = mix(images, labels)
            lr = lr_at(step, train=recipe, steps_per_epoch=steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast(on):
                logits = model(images)
            smoothing = 0.0 if mix is not None else preset.augment.label_smoothing  # Mixup smooths by itself
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            losses += loss.detach()
            step += 1

            if time.monotonic() - report_time > REPORT_SECONDS or done == steps_per_epoch:
                total = losses.item()
                if not math.isfinite(total):
                    raise diverged(out, epoch, f"at step {done}")
                now, count = time.monotonic(), done - reported_steps
                speed = count * recipe.batch_size / (now - report_time)
                yield Step(epoch + 1, done, (total - reported_loss) / count, lr, speed)
                report_time, reported_steps, reported_loss = time.monotonic(), done, total
            waiting = time.monotonic()
        train_seconds = time.monotonic() - epoch_start

        # Evaluate, record, save
        model.eval()
        metrics = evaluate(classify, eval_batches, num_classes=preset.model.num_classes)
        if not math.isfinite(metrics.loss):
            raise diverged(out, epoch, "in the evaluation after it")
        improved, best = metrics.top1 > best, max(best, metrics.top1)
        row = Epoch(
            epoch=epoch + 1,
            step=step,
            lr=lr,
            train_loss=reported_loss / steps_per_epoch,
            eval_loss=metrics.loss,
            top1=metrics.top1,
            top5=metrics.top5,
            best_top1=best,
            images_per_second=steps_per_epoch * recipe.batch_size / train_seconds,
            data_wait=waited / train_seconds,
            seconds=time.monotonic() - started,
        )
        state = replace(state, epoch=epoch + 1, metrics={"top1": metrics.top1, "loss": metrics.loss})
        save_checkpoint(out / "last.pt", state)
        if improved:
            save_checkpoint(out / "best.pt", state)
        history.append(asdict(row))
        with writing(out / "metrics.jsonl"), (out / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(history[-1]) + "\n")
        yield row

    draw_curves(history, out / "curves.png", title=preset.name)


def make_mixup(preset: Preset) -> Mixup | None:
    """timm's Mixup with the preset's settings, or None where the preset mixes nothing."""
    augment = preset.augment
    if not augment.mixes:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=preset.model.num_classes,
    )


def check_run_folder(out: Path) -> None:
    """OutputError if `out` could not be created and written, or has something in it. Creates nothing."""
    try:
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{out} is not empty", "choose another --out")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write to {there}", "choose another --out")
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}", "choose another --out") from error


def diverged(out: Path, epochs_done: int, where: str) -> CheckError:
    """The error for a loss that is not finite, which names the last checkpoint from before it."""
    good = f"; {out / 'last.pt'} is the state after epoch {epochs_done}" if epochs_done else ""
    what = f"training diverged: the loss is not finite in epoch {epochs_done + 1}, {where}{good}"
    return CheckError(what, "lower --set train.lr")
