"""The whole course of a training on one page. `train` is a generator; what it yields is for whoever shows progress.

The loop asks, and each object decides for itself: TrainStep updates the State, Run decides what is kept and when, Meter
has the clocks, Signals the wishes to stop, World what the ranks agree on.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

from lsag.config import Preset
from lsag.device import deterministic, tf32
from lsag.distributed.world import World, joined
from lsag.errors import CheckError, InputError, WorkerError
from lsag.failpoints import failpoint
from lsag.inference.classifier import Classifier
from lsag.inference.evaluate import Metrics, evaluate
from lsag.model.build import check_training
from lsag.runs import check_run_folder, step_files
from lsag.training.begin import begin
from lsag.training.data import Data, open_data
from lsag.training.events import Epoch, Finished, Progress, Started, Step
from lsag.training.meter import Meter
from lsag.training.options import TrainOptions
from lsag.training.run import NoRun, open_run
from lsag.training.signals import Signals, StopRequestedError, agreed_stop, stopped, wish_to_stop
from lsag.training.state import State
from lsag.training.step import TrainStep

MAX_SKIPPED = 10
"""Consecutive steps that may be skipped because a loss or gradient is not finite."""

logger = logging.getLogger(__name__)


def train(preset: Preset, options: TrainOptions) -> Iterator[Progress]:
    """Train `preset` on its dataset, evaluating after each epoch.

    Writes preset.json, options.json, metrics.jsonl, results.csv, steps.jsonl, curves.png, best.pt and the last three
    checkpoints to the run folder: before the first step, at intervals, at the end, and when a signal asks for it. The
    batch is cut over the processes of the world that this one is part of (torchrun's variables).

    Yields Started once, then Steps and Epochs, then Finished. Raises the errors of lsag.errors; CheckError for losses
    that are not finite; TerminatedError or InterruptedByUserError after a signal, once the run is saved.
    """
    began, signals = time.monotonic(), Signals()
    with (
        joined(options.device, options.rdzv_timeout, acknowledged=lambda: signals.acknowledged) as world,
        deterministic(options.deterministic),
        tf32(options.precision == "tf32"),
    ):
        options = prepare(preset, options, world)
        preset, data = open_data(preset, options, world)
        with open_run(options, world, signals) as run:
            state, notes = begin(preset, data, run, world, options)
            meter = Meter(state, began=began)
            signals.lasting = world.size > 1
            with signals:
                run.begin(state)
                yield started(state, data, world, options, notes)
                try:
                    yield from fit(state, data, run, world, signals, meter, options)
                except StopRequestedError as request:
                    signals.acknowledged = True
                    run.save(state)
                    run.list_broken(data.broken(world))
                    world.barrier()  # until rank 0 has saved
                    raise stopped(request.signal, state.position.step, options) from None
                except (InputError, WorkerError):
                    # A broken image, a dead worker or a lost peer. With NCCL a lost peer raises nothing here, but
                    # blocks: see leaving_when_stuck.
                    run.rescue(state)
                    raise
                yield finished(state, options)


def fit(
    state: State, data: Data, run: NoRun, world: World, signals: Signals, meter: Meter, options: TrainOptions
) -> Iterator[Step | Epoch]:
    """The epochs that are left. StopRequestedError, between two steps, when a signal asks to stop."""
    position = state.position
    step = TrainStep(state, data.order.slices, world, signals, meter, class_weights=data.class_weights)
    while not state.finished:
        epoch = position.epoch
        failpoint("epoch_begin")
        meter.begin_epoch()
        state.train()
        batches = data.epoch(epoch, meter.first_step)
        for _ in range(meter.first_step, state.steps_per_epoch):
            result = step(batches, save_due=run.save_due)
            position.seconds = meter.seconds
            run.log(result.row)
            if position.skipped_in_a_row >= MAX_SKIPPED:
                where = f"in {MAX_SKIPPED} steps in a row, up to step {state.step_in_epoch} of epoch {epoch + 1}"
                raise diverged(options.out, where, state.precision)
            if result.stop:
                raise StopRequestedError(result.stop)
            if result.save:
                run.save(state)
                if signals.save:
                    logger.warning("step %d is saved in %s", position.step, options.out)
                signals.save = False
            if report := meter.step(result.lr):
                run.flush()
                yield report
        metrics = evaluate_epoch(state, data, world, signals)
        if not math.isfinite(metrics.loss):
            raise diverged(options.out, f"in the evaluation after epoch {epoch + 1}", state.precision)
        position.seconds = meter.seconds
        summary = state.finish_epoch(metrics, meter.epoch(run.save_seconds))
        failpoint("epoch_end")
        run.list_broken(data.broken(world))
        run.finish_epoch(state, summary)
        yield summary


def prepare(preset: Preset, options: TrainOptions, world: World) -> TrainOptions:
    """Refuse what can be refused before any data is read; the options with rank 0's run folder."""
    out = Path(world.from_main(str(options.out)))
    if world.is_main:
        check_run_folder(out, resume=options.resume)
    check_training(
        preset.model,
        slice_size=preset.slice_size(world.size * options.accum),
        recompute=options.recompute,
        frozen=preset.train.freeze,
    )
    return options.model_copy(update={"out": out})


def evaluate_epoch(state: State, data: Data, world: World, signals: Signals) -> Metrics:
    """The metrics of the model whose accuracy counts, on every rank. StopRequestedError when a signal asks to stop."""

    def heed_signals(images: int) -> None:
        own_stop = signals.stop
        if stop := agreed_stop(own_stop, world.total(**wish_to_stop(own_stop))):
            raise StopRequestedError(stop)

    world.share_buffers(state.evaluated)
    state.evaluated.eval()
    return evaluate(
        Classifier(state.checkpoint(), device=world.device, precision=state.precision),
        data.eval_loader,
        count=data.num_eval,
        batch_size=data.eval_batch,
        num_classes=len(data.classes),
        world=world,
        on_batch=heed_signals,
    )


def diverged(out: Path, where: str, precision: str) -> CheckError:
    """The error for losses that are not finite; it names the last checkpoint from before them."""
    good = next(iter(step_files(out)), None)
    kept = f"; {good} is the last good checkpoint" if good else ""
    fix = "lower --set train.lr" + ("" if precision == "fp32" else ", or use --precision fp32")
    return CheckError(f"training diverged: loss or gradient not finite {where}{kept}", fix)


def started(state: State, data: Data, world: World, options: TrainOptions, notes: list[str]) -> Started:
    """Everything that could be refused has been accepted."""
    return Started(
        preset=state.preset,
        out=options.out,
        device=str(world.device),
        parameters=state.num_parameters,
        train_images=data.num_train,
        eval_images=data.num_eval,
        steps_per_epoch=data.steps_per_epoch,
        first_step=state.position.step,
        ranks=world.size,
        slice_size=data.order.slice_size,
        notes=(*data.notes, *notes),
    )


def finished(state: State, options: TrainOptions) -> Finished:
    """The training is complete."""
    position = state.position
    return Finished(
        out=options.out,
        epochs=position.epoch,
        best_top1=position.best_top1,
        best_epoch=position.best_epoch,
        last_top1=position.last_top1,
        seconds=position.seconds,
    )
