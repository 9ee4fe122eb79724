"""Training: one loop, read from top to bottom. It is a generator; what it yields is for whoever shows progress."""

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lsag.checkpoint import initialise_from, load_checkpoint, save_checkpoint
from lsag.config import Preset, Recompute
from lsag.data.loading import EpochBatches, batches, choose_workers, eval_loader, random_key, train_loader
from lsag.data.sources import FolderSource, Source, check_classes, open_split
from lsag.device import autocast, autocast_dtype, peak_memory
from lsag.distributed.world import World, joined, lost_peers, world_size_here
from lsag.errors import CheckError, InputError, LsagError, OutputError, UsageError, WorkerError
from lsag.failpoints import failpoint
from lsag.files import replacing
from lsag.inference.classifier import Classifier
from lsag.inference.evaluate import evaluate
from lsag.model.build import build_model, check_training, image_shape, set_recompute
from lsag.plots import draw_curves
from lsag.runs import BEST, CURVES, PRESET, step_files
from lsag.training.events import Epoch, Finished, Progress, Started, Step
from lsag.training.optim import lr_at, make_optimizer, moving_average
from lsag.training.run import RunFolder, check_run_folder
from lsag.training.signals import Signals, StopRequestedError, stopped
from lsag.training.state import Position, State

REPORT_SECONDS = 0.5
"""How often a Step is reported."""
CURVES_SECONDS = 30
"""How often at most the curves are drawn, after an epoch."""
EVAL_BATCH = 128
"""Images that a rank evaluates at a time; it does not depend on the number of ranks, so that they all give the same."""
MAX_SKIPPED = 10
"""Steps in a row whose loss or gradient may be not finite; they are skipped."""

logger = logging.getLogger(__name__)


def train(
    preset: Preset,
    *,
    data_dir: str | Path,
    out: str | Path,
    device: str = "auto",
    workers: int | None = None,
    download: bool = True,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    init_from: str | Path | None = None,
    reset_head: bool = False,
    accum: int = 1,
    precision: str = "auto",
    compile: bool = False,
    recompute: Recompute = "none",
    deterministic: bool = False,
    save_minutes: float = 5.0,
    save_retry_minutes: float = 30.0,
) -> Iterator[Progress]:
    """Train `preset` on its dataset below `data_dir`, evaluating after each epoch.

    Writes preset.json, metrics.jsonl, steps.jsonl, curves.png, best.pt and the last three checkpoints to `out`: before
    the first step, every `save_minutes`, at the end, and when a signal asks for it. A checkpoint that cannot be written
    is tried again for `save_retry_minutes`. `out` must be new or empty, or with `resume` may hold a run of the same
    preset (but for the keys in `allow_change`), which is then continued as if it had never stopped.

    `init_from` is a checkpoint whose weights are the first ones, with `reset_head` all but the classifier's. The batch
    is cut over the processes of the world that this one is part of (torchrun's variables), and each cuts its part into
    `accum` slices, one after the other. `precision` is that of `autocast_dtype`; `compile` compiles the model in place;
    `recompute` saves the memory of the local block, or of all blocks; `deterministic` allows only operations that give
    the same bits again. The number of `workers` that prepare images is chosen by default, and changes no result.

    Yields Started once, then Steps and Epochs, then Finished. Raises those of lsag.errors; CheckError for losses that
    are not finite; TerminatedError or InterruptedByUserError after a signal, the run being saved.
    """
    began = time.monotonic()
    data_dir, out = Path(data_dir), Path(out)
    signals = Signals()
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(joined(device, acknowledged=lambda: signals.acknowledged))
        on, alone, leads = world.device, world.size == 1, world.rank == 0
        if deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        out = Path(world.of_rank_0(str(out)))
        if leads:
            check_run_folder(out, resume=resume)
        check_training(preset.model, slice_size=preset.slice_size(world.size * accum), recompute=recompute)

        preset, train_source, eval_source = open_data(preset, data_dir, world, download=download)
        dataset = f"{train_source.fingerprint()} {eval_source.fingerprint()}"
        world.check_equal("preset", preset.model_dump_json())
        world.check_equal("dataset", dataset)
        if workers is None:
            workers = choose_workers(len(train_source), processes=world_size_here())
        recipe, eval_batch = preset.train, min(preset.train.batch_size, EVAL_BATCH)
        order = EpochBatches(len(train_source), preset, rank=world.rank, size=world.size, accum=accum)
        loader = train_loader(train_source, preset, order, workers=workers, pin=on.type == "cuda")
        eval_batches = eval_loader(
            eval_source, preset, batch_size=eval_batch, workers=workers, rank=world.rank, size=world.size
        )
        mix = make_mixup(preset)
        steps_per_epoch, classes = order.num_steps, tuple(train_source.classes)

        # Output: the lock, and the checkpoint to go on from
        folder, path, checkpoint, notes = None, None, None, []
        if leads:
            folder = RunFolder(out)
            stack.callback(folder.close)
            path, checkpoint = folder.newest() or (None, None)
        path = world.of_rank_0(path)
        if path is not None and not leads:
            checkpoint = load_checkpoint(path)

        # Model
        torch.manual_seed(random_key(recipe.seed, "init"))
        model = build_model(preset.model).to(on)
        if init_from is not None and checkpoint is None:
            said = initialise_from(model, init_from, num_classes=len(classes), reset_head=reset_head)
            notes += [f"weights from {init_from}", *said]
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        set_recompute(model, recompute)
        optimizer = make_optimizer(model, recipe)
        dtype = autocast_dtype(on, precision)
        scaler = torch.amp.GradScaler(on.type, enabled=dtype is torch.float16)
        ema = moving_average(model, recipe.ema_decay) if recipe.ema_decay else None
        position = Position()
        ways = {"slices": world.size * accum, "ranks": world.size, "precision": str(dtype).removeprefix("torch.")}
        state = State(model, optimizer, scaler, ema, preset, classes, dataset, ways, position)
        if checkpoint is not None:
            state.check_same_run(checkpoint, allow_change=allow_change, where=out)
        classify = Classifier(state.checkpoint(), device=on)
        if compile:
            model.compile()
        ddp = None
        if not alone:
            ddp = data_parallel(model, on, dtype, shape=(order.slice_size, *image_shape(preset.model)))
            optimizer.zero_grad()
        net: nn.Module = ddp or model
        if checkpoint is not None:
            state.restore(checkpoint)
            position = state.position
            if not 0 <= position.step - position.epoch * steps_per_epoch <= steps_per_epoch:
                raise UsageError(
                    f"step {position.step} of {out} lies outside its epoch: other batch size or number of images",
                    "give it those it had",
                )
            notes.append(f"continues after step {position.step}")
            earlier = dict((checkpoint.training or {}).get("ways") or {})
            other = [
                f"{key} {earlier.get(key)} before, {way} now" for key, way in ways.items() if earlier.get(key) != way
            ]
            if other:
                notes.append(f"computed another way, so not to the same bits: {', '.join(other)}")
        fresh, checkpoint, history = checkpoint is None, None, []  # its tensors are copied by now
        if folder:
            folder.check_space(num_parameters * 4 * (4 if ema else 3))  # fp32: weights, moving average, AdamW's moments
            folder.steps.rewind(lambda row: row["step"] <= position.step)
            history = folder.epochs.rewind(lambda row: Epoch(**row).epoch <= position.epoch)
        before, saving, saved, curves_drawn = position.seconds, 0.0, (-1, -1), -math.inf
        save_due = time.monotonic() + 60 * save_minutes

        def persist(write: Callable[[], object]) -> None:
            """Write to the run folder, and when that fails, again for a while: disks are emptied, mounts come back."""
            nonlocal saving
            start, failed = time.monotonic(), False
            while True:
                try:
                    write()
                    break
                except OutputError as error:
                    stopping = signals.stop or signals.acknowledged
                    if failed and (time.monotonic() - start > 60 * save_retry_minutes or stopping):
                        raise
                    if not failed:
                        logger.warning("%s; trying again for %g minutes", error.what, save_retry_minutes)
                    failed = True
                    time.sleep(1)
            saving += time.monotonic() - start

        def save() -> None:
            nonlocal saved, save_due
            if folder and saved != (position.step, position.epoch):
                position.seconds = before + time.monotonic() - began
                persist(lambda: folder.save(state.checkpoint(), position.step))
                saved = position.step, position.epoch
            save_due = time.monotonic() + 60 * save_minutes

        def stop(number: float) -> LsagError:
            """Save, and wait until rank 0 has; the error to raise."""
            signals.acknowledged = True
            save()
            world.total([0])
            return stopped(
                int(number), f"step {position.step} is saved in {out}", f"continue with: lsag train --resume {out}"
            )

        def heed_signals(images: int) -> None:
            if world.total([signals.stop])[0]:
                raise StopRequestedError

        signals.lasting = not alone
        stack.enter_context(signals)
        if folder:
            with replacing(out / PRESET) as file:
                file.write(preset.model_dump_json(indent=2).encode() + b"\n")
            if fresh:
                folder.save(state.checkpoint(), 0)
            saved = position.step, position.epoch
        yield Started(
            preset=preset,
            out=out,
            device=str(on),
            parameters=num_parameters,
            train_images=len(train_source),
            eval_images=len(eval_source),
            steps_per_epoch=steps_per_epoch,
            first_step=position.step,
            ranks=world.size,
            slice_size=order.slice_size,
            notes=tuple(notes),
        )

        try:
            for epoch in range(position.epoch, recipe.epochs):
                failpoint("epoch_begin")
                order.epoch, order.first_step = epoch, position.step - epoch * steps_per_epoch
                model.train()
                epoch_start = report_time = time.monotonic()
                waited = reported_wait = 0.0
                reported_steps, reported_loss, reported_losses = (
                    order.first_step,
                    position.loss_sum,
                    position.loss_steps,
                )
                loading = batches(loader)
                for done in range(order.first_step + 1, steps_per_epoch + 1):
                    # One step. Mixup and drop-path draw from generators that depend on the seed and on the slice, which
                    # is the how-manieth of the run: however many ranks there are, a slice is treated alike.
                    lr = lr_at(position.step, train=recipe, steps_per_epoch=steps_per_epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    total, put_back = torch.zeros((), device=on), remember_buffers(model)
                    for index in order.slices:
                        waiting = time.monotonic()
                        failpoint("fetch")
                        with signals.interruptible() if alone and index == 0 else contextlib.nullcontext():
                            images, labels = next(loading)
                        waited += time.monotonic() - waiting
                        slice_number = position.step * world.size * accum + index
                        torch.manual_seed(random_key(recipe.seed, "net", slice_number))
                        np.random.seed(random_key(recipe.seed, "mix", slice_number) & 0xFFFFFFFF)
                        images, labels = images.to(on, non_blocking=True), labels.to(on, non_blocking=True)
                        targets = labels
                        if mix is not None:
                            images, targets = mix(images, labels)
                        last = index == order.slices[-1]
                        with ddp.no_sync() if ddp and not last else contextlib.nullcontext(), lost_peers():
                            with autocast(on, dtype):
                                logits = net(images)
                            smoothing = 0.0 if mix is not None else preset.augment.label_smoothing  # Mixup smooths
                            loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) / accum
                            if failpoint("after_forward"):
                                loss = loss * math.nan
                            scaler.scale(loss).backward()
                        failpoint("after_backward")
                        total += loss.detach()
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
                    loss_here, grad_norm = torch.stack([total, norm]).tolist()
                    finite = math.isfinite(loss_here) and math.isfinite(grad_norm)
                    # What all ranks must agree on, in one exchange.
                    interrupt, terminate = signals.stop == signal.SIGINT, signals.stop not in (0, signal.SIGINT)
                    due = signals.save or (leads and time.monotonic() > save_due)
                    interrupts, terminates, saves, broken, loss_sum = world.total(
                        [interrupt, terminate, due, not finite, loss_here if finite else 0.0]
                    )
                    failpoint("before_opt")
                    row = {"step": position.step + 1, "epoch": epoch + 1, "loss": None, "lr": lr, "grad_norm": None}
                    if broken:
                        position.skipped += 1
                        position.skipped_in_a_row += 1
                        put_back()
                    else:
                        scaler.step(optimizer)
                        if ema:
                            ema.update_parameters(model)
                        row |= {"loss": loss_sum / world.size, "grad_norm": grad_norm}
                        position.loss_sum += loss_sum / world.size
                        position.loss_steps += 1
                        position.skipped_in_a_row = 0
                    scaler.update()
                    optimizer.zero_grad()
                    position.step += 1
                    failpoint("after_opt")
                    if folder:
                        folder.steps.add(row)
                    if position.skipped_in_a_row >= MAX_SKIPPED:
                        raise diverged(out, f"in {MAX_SKIPPED} steps in a row, up to step {done} of epoch {epoch + 1}")
                    if interrupts or terminates:
                        raise stop(signals.stop or (signal.SIGTERM if terminates else signal.SIGINT))
                    if saves:
                        save()
                        if signals.save:
                            logger.warning("step %d is saved in %s", position.step, out)
                        signals.save = False

                    now = time.monotonic()
                    if now - report_time > REPORT_SECONDS or done == steps_per_epoch:
                        if folder:
                            with contextlib.suppress(OutputError):  # the next save tries again, and tells
                                folder.steps.flush()
                        count, seconds = done - reported_steps, now - report_time
                        losses = position.loss_steps - reported_losses
                        yield Step(
                            epoch=epoch + 1,
                            step=done,
                            loss=(position.loss_sum - reported_loss) / losses if losses else math.nan,
                            lr=lr,
                            images_per_second=count * recipe.batch_size / seconds,
                            data_wait=(waited - reported_wait) / seconds,
                            memory=peak_memory(on),
                        )
                        report_time, reported_steps, reported_wait = now, done, waited
                        reported_loss, reported_losses = position.loss_sum, position.loss_steps
                train_seconds = max(time.monotonic() - epoch_start, 1e-9)

                # Evaluate, record, save
                world.share_buffers(state.evaluated)
                state.evaluated.eval()
                metrics = evaluate(
                    classify,
                    eval_batches,
                    count=len(eval_source),
                    batch_size=eval_batch,
                    num_classes=preset.model.num_classes,
                    world=world,
                    on_batch=heed_signals,
                )
                if not math.isfinite(metrics.loss):
                    raise diverged(out, f"in the evaluation after epoch {epoch + 1}")
                improved = metrics.top1 > position.best_top1
                if improved:
                    position.best_top1, position.best_epoch = metrics.top1, epoch + 1
                position.last_top1, position.last_eval_loss = metrics.top1, metrics.loss
                train_loss = position.loss_sum / max(position.loss_steps, 1)
                position.epoch, position.loss_sum, position.loss_steps = epoch + 1, 0.0, 0
                summary = Epoch(
                    epoch=epoch + 1,
                    step=position.step,
                    lr=lr_at(position.step - 1, train=recipe, steps_per_epoch=steps_per_epoch),
                    train_loss=train_loss,
                    eval_loss=metrics.loss,
                    top1=metrics.top1,
                    top5=metrics.top5,
                    best_top1=position.best_top1,
                    images_per_second=(steps_per_epoch - order.first_step) * recipe.batch_size / train_seconds,
                    data_wait=waited / train_seconds,
                    save_share=saving / train_seconds,
                    skipped_steps=position.skipped,
                    seconds=before + time.monotonic() - began,
                )
                saving = 0.0  # what is saved from here on counts for the next epoch
                failpoint("epoch_end")
                history.append(asdict(summary))
                if folder:
                    folder.epochs.add(history[-1])
                    # First the best, then the state that says that it is the best.
                    if improved:
                        best = replace(state.checkpoint(), training=None)
                        persist(partial(save_checkpoint, out / BEST, best))
                    if epoch + 1 == recipe.epochs or time.monotonic() > save_due:
                        save()
                    if epoch + 1 == recipe.epochs or time.monotonic() - curves_drawn > CURVES_SECONDS:
                        draw(history, out / CURVES, title=preset.name)
                        curves_drawn = time.monotonic()
                    with contextlib.suppress(OutputError):
                        folder.epochs.flush()
                yield summary
        except StopRequestedError:
            raise stop(signals.stop or signal.SIGTERM) from None
        except (InputError, WorkerError):
            # A broken image, a dead worker, a lost peer: what is done is saved, for which no other rank is needed. With
            # NCCL a lost peer raises nothing here, but blocks: see leaving_when_stuck.
            if folder:
                position.seconds = before + time.monotonic() - began
                with contextlib.suppress(OutputError):
                    folder.save(state.checkpoint(), position.step)
            raise
        yield Finished(
            out=out,
            epochs=position.epoch,
            best_top1=position.best_top1,
            best_epoch=position.best_epoch,
            last_top1=position.last_top1,
            seconds=before + time.monotonic() - began,
        )


def open_data(preset: Preset, data_dir: Path, world: World, *, download: bool) -> tuple[Preset, Source, Source]:
    """The preset with its classes, and the training and the evaluation split; small folders in memory."""
    data, model = preset.data, preset.model

    def opened(*, train: bool) -> Source:
        may = download and world.local_rank == 0
        found = open_split(data.dataset, data_dir, train=train, mode=preset.image_mode, download=may)
        return found.packed() if isinstance(found, FolderSource) else found

    # One process of each machine comes first: what it downloads, the others find.
    if world.local_rank == 0:
        train_source, eval_source = opened(train=True), opened(train=False)
    world.total([0])
    if world.local_rank != 0:
        train_source, eval_source = opened(train=True), opened(train=False)
    check_classes(train_source.classes, eval_source.classes, what="the training split", where="the evaluation split")
    found = len(train_source.classes)
    if data.dataset == "folder":
        preset = preset.with_classes(found)
    elif found != model.num_classes:
        raise UsageError(
            f"{data.dataset} has {found} classes, model.num_classes is {model.num_classes}",
            f"--set model.num_classes={found}, or choose the data with --dataset, which sets it",
        )
    return preset, train_source, eval_source


def data_parallel(
    model: nn.Module, on: torch.device, dtype: torch.dtype, *, shape: tuple[int, int, int, int]
) -> DistributedDataParallel:
    """The model in DDP, which then sums gradients in the same order in each step; it leaves gradients to be zeroed.

    After the first backward DDP cuts its buckets anew, and sums in another order from then on. Only when that is over
    before the first step does a continued training sum as the uninterrupted one did.
    """
    put_back = remember_buffers(model)
    with lost_peers():
        ddp = DistributedDataParallel(model, device_ids=[on.index] if on.type == "cuda" else None)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # with one channel
        for _ in range(2):
            with autocast(on, dtype):
                logits = ddp(torch.zeros(shape, device=on))
            logits.float().sum().backward()
    put_back()
    return ddp


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives the buffers, such as running statistics, their values of now back."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def put_back() -> None:
        for buffer, value in before:
            buffer.copy_(value)

    return put_back


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


def draw(history: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """The curves; that they cannot be drawn stops no training."""
    try:
        draw_curves(history, path, title=title)
    except OutputError as error:
        logger.warning("%s", error.what)


def diverged(out: Path, where: str) -> CheckError:
    """The error for losses that are not finite, which names the last checkpoint from before them."""
    good = next(iter(step_files(out)), None)
    kept = f"; {good} is the last good checkpoint" if good else ""
    return CheckError(f"training diverged: loss or gradient not finite {where}{kept}", "lower --set train.lr")
