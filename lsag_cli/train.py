"""lsag train"""

import contextlib
import itertools
import logging
import shlex
import typing
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from lsag.config import DATASETS, Precision, Preset, default_data_dir, parse_overrides
from lsag.distributed.launch import MEETING_SECONDS
from lsag.errors import InputError, InterruptedByUserError, UsageError
from lsag.files import writing
from lsag.presets import for_fine_tuning
from lsag.runs import BEST, CURVES, METRICS, PRESET, RESULTS, RUNS, newest_run, step_files
from lsag_cli import trackers
from lsag_cli.display import Display, counted, duration
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Json,
    Model,
    OptionalPreset,
    Overrides,
    Recompute,
    Workers,
    loading,
    read_preset,
    renamed,
)
from lsag_cli.output import note, percent, print_json, say
from lsag_cli.plan import count_images, show_plan
from lsag_cli.processes import TrainCommand, join_or_launch, place

if typing.TYPE_CHECKING:
    from lsag.training.events import Finished

DEFAULT_PRESET = "digits-nano"
RUN_OPTIONS, DEVICES, SAVING, SPEED = "Resuming and fine-tuning", "Multiple devices", "Saving", "Speed and memory"


def train(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="With --resume: the run to resume.")] = None,
    preset: OptionalPreset = None,
    model: Model = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    val_split: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.99,
            help="Share of each class to hold out for evaluation, of images that are not split (data.val_split).",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs.")] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Stop after N epochs without a better top-1 (train.patience); 0: never."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default=f"{RUNS}/PRESET-TIME")] = None,
    device: Device = "auto",
    workers: Workers = None,
    download: Annotated[
        bool, typer.Option("--download/--no-download", help="Download the dataset if it is missing.")
    ] = True,
    skip_broken: Annotated[
        bool,
        typer.Option(
            "--skip-broken/--no-skip-broken",
            help="Train on other images in place of broken ones, which are listed in RUN/broken.txt.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan without training.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: time a few steps on synthetic images.")
    ] = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="wandb|mlflow|tensorboard|none",
            help="Also log to an experiment tracker; repeatable. A resumed run does so again; none ends that.",
        ),
    ] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard/--no-tensorboard", hidden=True)] = None,
    as_json: Json = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume RUN, the run in --out (or start it), or the newest one in ./runs, with the options "
            "it was started with.",
            rich_help_panel=RUN_OPTIONS,
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="With --resume: allow this setting to differ ('data': the images); repeatable.",
            rich_help_panel=RUN_OPTIONS,
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Fine-tune: start from the weights of a checkpoint, or of a preset that comes with some; without "
            "--preset with its own at a lower learning rate (docs/finetuning.md).",
            rich_help_panel=RUN_OPTIONS,
        ),
    ] = None,
    reset_head: Annotated[
        bool,
        typer.Option(
            "--reset-head",
            help="With --init-from: start with a new head, also for classes that the checkpoint knows.",
            rich_help_panel=RUN_OPTIONS,
        ),
    ] = False,
    freeze: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Keep the weights of the embedding and the first N stages (train.freeze).",
            rich_help_panel=RUN_OPTIONS,
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all|0,2", help="GPUs of this machine; 0 for the CPU.", rich_help_panel=DEVICES),
    ] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="With --device cpu: number of processes.", rich_help_panel=DEVICES)
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Number of machines; run the same command on each.", rich_help_panel=DEVICES)
    ] = 1,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Rendezvous address; required with --nodes.", rich_help_panel=DEVICES),
    ] = None,
    rdzv_timeout: Annotated[
        int,
        typer.Option(
            min=1, max=86_400, metavar="SECONDS", help="Time for all machines to meet.", rich_help_panel=DEVICES
        ),
    ] = MEETING_SECONDS,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Automatic restarts after a failure.", rich_help_panel=DEVICES)
    ] = 0,
    accum: Annotated[int, typer.Option(min=1, help="Gradient-accumulation steps.", rich_help_panel=SPEED)] = 1,
    precision: Annotated[
        Precision,
        typer.Option(
            help="auto: bf16 where the device multiplies it natively; else fp16 on CUDA, fp32 elsewhere.",
            rich_help_panel=SPEED,
        ),
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the model.", rich_help_panel=SPEED)
    ] = False,
    recompute: Recompute = "none",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Bit-for-bit reproducible on a GPU (slower).",
            rich_help_panel=SPEED,
        ),
    ] = False,
    save_minutes: Annotated[
        float, typer.Option(min=0, help="Minutes between checkpoints.", rich_help_panel=SAVING)
    ] = 5,
    save_retry_minutes: Annotated[
        float,
        typer.Option("--save-retry", min=0, help="Minutes to keep trying when saving fails.", rich_help_panel=SAVING),
    ] = 30,
) -> None:
    """Train a model. Without arguments: digits-nano, on handwritten digits that need no download, in a minute."""
    if run and (out or not resume):
        raise UsageError(f"unexpected argument {run}", "--resume RUN resumes a run, --out RUN starts one")
    if resume:
        out = run or out or run_to_resume()
        preset = preset or (None if init_from and not step_files(out) else preset_of(out))
    settings = {"train.epochs": epochs, "train.freeze": freeze, "train.patience": patience, "data.val_split": val_split}
    changes = [*(overrides or []), *(f"{key}={value}" for key, value in settings.items() if value is not None)]
    start = checkpoint_preset(init_from) if init_from and not preset else None
    notes: list[str] = []
    resolved = read_preset(start or preset or DEFAULT_PRESET, changes, dataset, model, notes)
    if tensorboard is not None:
        name, old = ("tensorboard", "--tensorboard") if tensorboard else ("none", "--no-tensorboard")
        log_to = renamed([name], old, f"--log-to {name}", log_to)
    given = {name: value for name, value in context.params.items() if name in TrainCommand.model_fields}
    given |= {
        "out": out or RUNS / f"{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
        "data_dir": data_dir or default_data_dir(resolved.data.dataset),
        "allow_change": allow_change or (),
        "log_to": trackers.chosen(log_to or ()),
    }
    if resolved.data.dataset not in DATASETS and "model.num_classes" in parse_overrides(changes):
        raise UsageError("images of your own have their number of classes", "remove --set model.num_classes")
    options = TrainCommand(**given)
    if resume:
        renamed_ones = {"log_to"} if tensorboard is not None else set()
        options = options.with_kept(given_on_the_command_line(context) | renamed_ones)
    check(options, named=bool(out), probe=probe, dry_run=dry_run)
    device, processes = place(options.gpus, options.device, options.procs, planned=dry_run)
    options = options.model_copy(update={"device": device})
    num_slices = processes * options.nodes * options.accum
    if start:
        _, num_images, _ = count_images(resolved, options.data_dir, download=options.download and not dry_run)
        resolved, changed = for_fine_tuning(
            resolved, start.train, given=parse_overrides(changes), num_images=num_images, num_slices=num_slices
        )
        notes += changed
    resolved.slice_size(num_slices)
    if dry_run:
        for line in notes:
            note(line)
        return show_plan(resolved, options, processes=processes * options.nodes, probe=probe, as_json=as_json)
    with contextlib.nullcontext(options.out) if out else own_folder(options.out) as folder:
        options = options.model_copy(update={"out": folder})
        ranks = [*([] if start else ["--preset", preset or DEFAULT_PRESET]), *([] if run else ["--out", str(folder)])]
        rank = join_or_launch(options, processes=processes, arguments=ranks)
        finished = None if rank is None else follow(resolved, options, notes=notes, main=rank == 0)
    if finished:
        show_result(finished, resolved, data_dir=options.data_dir, as_json=as_json)


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """`folder`, or one with a number after its name, made for this run alone; removed again if it stays empty."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for path in itertools.chain([folder], others):
        with writing(path), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()
            path.parent.rmdir()


def check(options: TrainCommand, *, named: bool, dry_run: bool, probe: bool) -> None:
    """UsageError for options that contradict each other; `named` says whether the run folder was named."""
    if options.allow_change and not options.resume:
        raise UsageError("--allow-change is for a run that is resumed", "add --resume")
    if options.reset_head and not options.init_from:
        raise UsageError("--reset-head is for --init-from", "add --init-from CHECKPOINT")
    met = options.rdzv_endpoint is not None
    if (met and options.nodes == 1) or (options.nodes > 1 and not (met and named) and not dry_run):
        raise UsageError("several machines need --nodes, --rdzv-endpoint and --out, all three", "see docs/cluster.md")
    if probe and not dry_run:
        raise UsageError("--probe is for --dry-run", "add --dry-run")
    trackers.check_installed(options.log_to)


def given_on_the_command_line(context: typer.Context) -> set[str]:
    """The names of the options that are not at their defaults by default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def run_to_resume() -> Path:
    """The newest run in ./runs. InputError if there is none."""
    found = newest_run(PRESET)
    if found is None:
        raise InputError(f"no run to resume in ./{RUNS}", "name one: lsag train --resume RUN")
    return found


def preset_of(run: Path) -> str:
    """The preset file of a run. InputError if nothing was saved there."""
    if not step_files(run) or not (run / PRESET).is_file():
        there = "not a folder" if run.exists() else "no such folder"
        if run.is_dir():
            there = ", ".join(sorted(entry.name for entry in run.iterdir())[:5]) or "empty"
        raise InputError(f"no run to resume in {run} ({there})", "to start one there, add --preset NAME")
    return str(run / PRESET)


def checkpoint_preset(path: Path) -> Preset:
    """The preset of a checkpoint, without what concerned its own images or its length. The errors of load_checkpoint.

    A moving average over a long training would hold little but the first weights of a short one.
    """
    with loading():
        from lsag.checkpoint import load_checkpoint

    preset = load_checkpoint(path).preset
    data = preset.data.model_copy(update={"val_split": 0.0, "shuffle": "full", "balance": 0.0})
    train = preset.train.model_copy(update={"freeze": 0, "patience": 0, "class_weights": "none", "ema_decay": 0.0})
    return preset.model_copy(update={"data": data, "train": train})


def follow(preset: Preset, options: TrainCommand, *, notes: list[str], main: bool) -> "Finished | None":
    """Train in this process; the `main` rank shows `notes` and the progress, and gets the end."""
    with loading():
        if main:
            trackers.load(options.log_to)
        from lsag.training.events import Epoch, Finished, Started, Step
        from lsag.training.loop import train as run
    if not main:
        logging.getLogger().setLevel(logging.ERROR)
    display: Display | None = None
    logs: list[trackers.Tracker] = []
    finished = None
    try:
        for event in run(preset, options):
            if isinstance(event, Started) and main:
                event = replace(event, notes=(*notes, *event.notes))
                display = Display(event)
                logs = [trackers.Tracker(name, event, options.log_id) for name in options.log_to]
            elif isinstance(event, Step) and display:
                display.step(event)
            elif isinstance(event, Epoch) and display:
                display.epoch(event)
            elif isinstance(event, Finished) and main:
                finished = event
            for log in logs:
                log.add(event)
    except KeyboardInterrupt:
        if display is None:
            raise InterruptedByUserError("interrupted before the training started") from None
        raise InterruptedByUserError(
            "interrupted twice; stopped at once", f"resume with: {options.resume_command}"
        ) from None
    finally:
        if display:
            display.close()
        trackers.close(logs, finished=finished is not None)
    return finished


def show_result(finished: "Finished", preset: Preset, *, data_dir: Path, as_json: bool) -> None:
    """What the training reached, where it is, and what to run next."""
    checkpoint = finished.out / BEST
    own = data_dir.absolute() == default_data_dir(preset.data.dataset).absolute()
    where = [] if own else ["--data-dir", str(data_dir)]
    next_steps = [
        shlex.join(["lsag", "eval", str(checkpoint), *where]),
        shlex.join(["lsag", "export", str(checkpoint), "--onnx"]),
    ]
    if as_json:
        names = ("best_top1", "best_epoch", "last_top1", "epochs", "seconds")
        figures = {name: getattr(finished, name) for name in names}
        return print_json("train", out=str(finished.out), checkpoint=str(checkpoint), **figures, next=next_steps)
    best, total = percent(finished.best_top1), duration(finished.seconds)
    say(f"best top-1  {best} (epoch {finished.best_epoch}), total time {total}")
    if finished.epochs < preset.train.epochs:
        say(f"ended after epoch {finished.epochs}: no better top-1 in {counted(preset.train.patience, 'epoch')}")
    files = ", ".join((BEST, CURVES, RESULTS, METRICS))
    say(f"everything is in {finished.out}: {files}, and checkpoints to resume from")
    for command in next_steps:
        say(f"next: {command}")
