"""lsag train"""

import importlib.util
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lsag.config import Preset, TimmConfig
from lsag.distributed.launch import launch, launched
from lsag.errors import InputError, InterruptedByUserError, TerminatedError, UnavailableError, UsageError
from lsag_cli.display import Display, duration
from lsag_cli.flops import count_network
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Json,
    Model,
    NoDownload,
    OptionalPreset,
    Overrides,
    Recompute,
    Workers,
    data_dir_or_default,
    leaving_at_once,
    read_preset,
)
from lsag_cli.output import giga, note, percent, print_json, say

DEFAULT_PRESET = "digits-nano"
NOT_REPEATED = {
    "run_folder",
    "preset",
    "model",
    "dataset",
    "epochs",
    "overrides",
    "out",
    "dry_run",
    "probe",
    "as_json",
    "resume",
}
NOT_REPEATED |= {"allow_change", "init_from", "reset_head"}
"""What a command that goes on with a run does not say again: the run says it."""
RUNS, MACHINES, SAVING, SPEED = "Runs", "Many devices", "Saving", "Speed and memory"


def train(
    context: typer.Context,
    run_folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="With --resume: the run to go on with.")
    ] = None,
    preset: OptionalPreset = None,
    model: Model = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Train for so many epochs.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/PRESET-TIME")] = None,
    device: Device = "auto",
    workers: Workers = None,
    no_download: NoDownload = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and touch nothing.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: measure a few steps on made-up images.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write RUN/tensorboard too.")] = False,
    as_json: Json = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with RUN, with the run in --out (or start it), or with the newest in ./runs.",
            rich_help_panel=RUNS,
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="With --resume: a setting that may differ; 'data' for other images.",
            rich_help_panel=RUNS,
        ),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Fine-tune: begin with a checkpoint's weights.", rich_help_panel=RUNS)
    ] = None,
    reset_head: Annotated[
        bool, typer.Option("--reset-head", help="With --init-from: a new classifier.", rich_help_panel=RUNS)
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all|0,2", help="GPUs of this machine; 0 for the CPU.", rich_help_panel=MACHINES),
    ] = None,
    procs: Annotated[
        int | None, typer.Option(min=1, help="With --device cpu: so many processes.", rich_help_panel=MACHINES)
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines; run the same on each.", rich_help_panel=MACHINES)] = 1,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where several machines meet.", rich_help_panel=MACHINES)
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Resume by itself so often after a failure.", rich_help_panel=MACHINES)
    ] = 0,
    accum: Annotated[
        int,
        typer.Option(min=1, help="Slices that a device takes of a batch, one after the other.", rich_help_panel=SPEED),
    ] = 1,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option(help="auto: bf16 on GPUs, fp16 on those without it, else fp32.", rich_help_panel=SPEED),
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.", rich_help_panel=SPEED)] = False,
    recompute: Recompute = "none",
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same bits again on a GPU, more slowly.", rich_help_panel=SPEED),
    ] = False,
    save_minutes: Annotated[float, typer.Option(min=0, help="Time between checkpoints.", rich_help_panel=SAVING)] = 5,
    save_retry: Annotated[
        float, typer.Option(min=0, help="Minutes to try again when saving fails.", rich_help_panel=SAVING)
    ] = 30,
) -> None:
    """Train a model. Without arguments: digits-nano, on handwritten digits that need no download, in a minute."""
    if run_folder and (out or not resume):
        raise UsageError(f"unexpected argument {run_folder}", "--resume RUN goes on with a run, --out RUN begins one")
    if allow_change and not resume:
        raise UsageError("--allow-change is for a run that is resumed", "add --resume")
    if reset_head and not init_from:
        raise UsageError("--reset-head is for --init-from", "add --init-from CHECKPOINT")
    if (nodes > 1) != (rdzv_endpoint is not None) or (nodes > 1 and not (out or run_folder)):
        raise UsageError("several machines need --nodes, --rdzv-endpoint and --out, all three", "see docs/cluster.md")
    if probe and not dry_run:
        raise UsageError("--probe is for --dry-run", "add --dry-run")
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UnavailableError("the package tensorboard is not installed", "pip install 'lsag[tensorboard]'")
    changes = [*(overrides or []), *([f"train.epochs={epochs}"] if epochs else [])]
    if resume:
        out = run_folder or out or newest_run()
        if preset is None:
            preset = preset_of(out)
    resolved = read_preset(preset or DEFAULT_PRESET, changes, dataset, model)
    out = out or Path("runs") / f"{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    device, processes = place(gpus, device, procs)
    resolved.slice_size(processes * nodes * accum)
    if dry_run:
        way = {"device": device, "precision": precision, "compile": compile, "recompute": recompute} if probe else None
        cut = {"accum": accum, "processes": processes * nodes}
        return show_plan(resolved, as_json, **cut, recompute=recompute, probe=way)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    with leaving_at_once():
        from lsag.distributed.world import world_in_environment, world_size_here
        from lsag.training.events import Epoch, Finished, Started, Step
        from lsag.training.loop import train as run
        from lsag.training.run import check_run_folder

    again = continuation(context, out)
    spread = processes > 1 or nodes > 1 or max_restarts > 0
    # Inside a job of SLURM, --nodes means that one task on each node launches the others.
    world = None if nodes > 1 and "RANK" not in os.environ else world_in_environment()
    if world is None and spread:
        ranks = ["--preset", preset or DEFAULT_PRESET, *([] if run_folder else ["--out", str(out)])]
        if max_restarts and not resume:
            if nodes > 1:
                raise UsageError("--max-restarts on several machines needs --resume", "add it: it begins a run too")
            check_run_folder(out, resume=False)
            ranks.append("--resume")  # begins the run, and goes on with it when it is started again
        return launch(
            [sys.executable, "-m", "lsag_cli", *sys.argv[1:], *ranks],
            processes=processes,
            nodes=nodes,
            endpoint=rdzv_endpoint,
            run_id="lsag-" + re.sub(r"\W+", "-", str(out)),  # torch makes a folder of that name
            max_restarts=max_restarts,
            fix=f"continue with: {again}",
        )
    if world and not launched() and spread and (nodes > 1 or max_restarts or processes != world_size_here()):
        raise UsageError(
            f"RANK or SLURM_PROCID says that this is one of {world[1]} processes, {world_size_here()} of them here",
            "leave out --gpus, --procs, --nodes and --max-restarts",
        )
    leads = world is None or world[0] == 0
    logging.basicConfig(level=logging.WARNING if leads else logging.ERROR, handlers=[NoteHandler()])

    display: Display | None = None
    finished: Finished | None = None
    try:
        for event in run(
            resolved,
            data_dir=data_dir_or_default(data_dir),
            out=out,
            device=device,
            workers=workers,
            download=not no_download,
            resume=resume,
            allow_change=allow_change or (),
            init_from=init_from,
            reset_head=reset_head,
            accum=accum,
            precision=precision,
            compile=compile,
            recompute=recompute,
            deterministic=deterministic,
            save_minutes=save_minutes,
            save_retry_minutes=save_retry,
        ):
            if not leads:
                continue
            if isinstance(event, Started):
                out = event.out
                display = Display(event, tensorboard=tensorboard)
            elif isinstance(event, Step) and display:
                display.step(event)
            elif isinstance(event, Epoch) and display:
                display.epoch(event)
            elif isinstance(event, Finished):
                finished = event
    except (InterruptedByUserError, TerminatedError) as error:
        error.fix = f"continue with: {again}" if display or not leads else ""
        raise
    except KeyboardInterrupt:
        what = "interrupted twice, at once" if display else "interrupted before it began"
        raise InterruptedByUserError(what, f"continue with: {again}" if display else "") from None
    finally:
        if display:
            display.close()
    if finished is None:
        return

    checkpoint = out / "best.pt"
    where = ["--data-dir", str(data_dir)] if data_dir else []
    next_steps = [
        shlex.join(["lsag", "eval", str(checkpoint), *where]),
        shlex.join(["lsag", "export", str(checkpoint), "--onnx"]),
    ]
    if as_json:
        figures = {
            name: getattr(finished, name) for name in ("best_top1", "best_epoch", "last_top1", "epochs", "seconds")
        }
        print_json("train", out=str(out), checkpoint=str(checkpoint), **figures, next=next_steps)
        return
    say(f"best accuracy  {percent(finished.best_top1)} (epoch {finished.best_epoch})  in {duration(finished.seconds)}")
    say(f"everything is in {out}: best.pt, curves.png, metrics.jsonl, and checkpoints to go on from")
    for command in next_steps:
        say(f"next: {command}")


def continuation(context: typer.Context, out: Path) -> str:
    """The command that goes on with this run in the same way: with all that its preset does not say."""
    words = ["lsag", "train", "--resume", str(out)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in NOT_REPEATED and value != parameter.default:
            words += [parameter.opts[0], *([] if value is True else [str(value)])]
    return shlex.join(words)


def newest_run() -> Path:
    """The run folder below ./runs that was started last. InputError if there is none."""
    found = sorted(Path("runs").glob("*/preset.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("there is no run in ./runs to go on with", "--resume RUN")
    return found[-1].parent


def preset_of(out: Path) -> str:
    """The preset file of the run in `out`. InputError if nothing was saved there."""
    if not any(out.glob("step-" + "[0-9]" * 10 + ".pt")) or not (out / "preset.json").is_file():
        there = "not a folder" if out.exists() else "no such folder"
        if out.is_dir():
            there = ", ".join(sorted(entry.name for entry in out.iterdir())[:5])
        raise InputError(
            f"nothing to go on with in {out} ({there or 'empty'})", "to begin a run there, give its --preset"
        )
    return str(out / "preset.json")


def place(gpus: str | None, device: str, procs: int | None) -> tuple[str, int]:
    """The device and the number of processes that `--gpus`, `--device` and `--procs` together ask for.

    A list of GPUs becomes the visible ones. UnavailableError or UsageError if it cannot be had.
    """
    if procs is not None:
        if device != "cpu" or gpus not in (None, "0"):
            raise UsageError("--procs is for the CPU", "add --device cpu, or use --gpus")
        return device, procs
    if gpus is None:
        return device, 1
    kind = device.partition(":")[0]
    numbers = gpus.rstrip(",").split(",")
    if gpus != "all" and not all(number.isdecimal() for number in numbers):
        raise UsageError(f"--gpus {gpus} is no number of GPUs", "for example --gpus 2, --gpus all, or --gpus 0,2")
    if gpus == "0" and kind in ("auto", "cpu"):
        return "cpu", 1
    if kind not in ("auto", "cuda") or gpus == "0" or ":" in device:
        raise UsageError(f"--gpus {gpus} contradicts --device {device}", "give one of them")
    if launched():  # the launcher has made the asked ones the visible ones
        return "cuda", int(os.environ["LOCAL_WORLD_SIZE"])
    with leaving_at_once():
        import torch

    found = torch.cuda.device_count()
    asked = [str(index) for index in range(found)] if gpus == "all" else numbers
    if gpus != "all" and "," not in gpus:
        asked = [str(index) for index in range(min(int(gpus), found + 1))]
    if not asked or max(map(int, asked)) >= found:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = f" (CUDA_VISIBLE_DEVICES={visible!r})" if visible is not None else ""
        what = f"asked for GPUs {gpus}" if "," in gpus else f"asked for {gpus} GPUs"
        raise UnavailableError(
            f"{what}, found {found}{hint}", f"use --gpus {found}" + (", the CPU" if not found else "")
        )
    if len(set(asked)) != len(asked):
        raise UsageError(f"--gpus {gpus} names a GPU twice", "name each once")
    if "," in gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[int(index)] if seen != [""] else index for index in asked)
    return "cuda", len(asked)


class NoteHandler(logging.Handler):
    """What the library warns of, as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("lsag"):
            note(f"lsag: {record.getMessage()}")


def show_plan(
    preset: Preset,
    as_json: bool,
    *,
    accum: int,
    processes: int,
    recompute: Literal["none", "local", "all"],
    probe: dict[str, Any] | None,
) -> None:
    """The resolved preset and what training it means; with a `probe`, time and memory measured in that way."""
    from lsag.config import DATASETS

    slice_size, recipe = preset.slice_size(processes * accum), preset.train
    if isinstance(preset.model, TimmConfig):
        with leaving_at_once():
            from lsag.model.build import check_training

        check_training(preset.model, slice_size=slice_size, recompute=recompute)
    total = count_network(preset)
    known = DATASETS.get(preset.data.dataset)
    steps = known.train_images // recipe.batch_size if known else None
    if known and not steps:
        raise UsageError(
            f"{known.train_images} training images do not fill one batch of {recipe.batch_size}",
            "--set train.batch_size=...",
        )
    plan: dict[str, Any] = {
        "parameters": total.params,
        "macs": total.macs,
        "macs_run": total.macs_run,
        "train_images": known.train_images if known else None,
        "steps_per_epoch": steps,
        "steps": steps * recipe.epochs if steps is not None else None,
        "batch_size": recipe.batch_size,
        "processes": processes,
        "accum": accum,
        "slice_size": slice_size,
        "peak_lr": recipe.lr * recipe.lr_scale,
    }
    if probe is not None:
        with leaving_at_once():
            from lsag.bench import probe as measure

        seconds, memory = measure(preset, slice_size=plan["slice_size"], **probe)
        plan |= {"step_seconds": seconds * accum, "memory_bytes": memory}
        plan["training_seconds"] = plan["steps"] and plan["steps"] * plan["step_seconds"]
    if as_json:
        print_json("train", dry_run=True, preset=preset.model_dump(mode="json"), **plan)
        return
    for key, value in flatten(preset.model_dump(mode="json")):
        say(f"{key} = {json.dumps(value)}")
    say("")
    say(f"parameters       {total.params:,}")
    say(f"MACs per image   {giga(total.macs)}, of which {giga(total.macs_run)} are run")
    say(f"steps            {recipe.epochs} epochs of {steps or 'as many steps as the folder has batches'}")
    say(f"effective batch  {recipe.batch_size} = {processes} devices x {accum} slices x {plan['slice_size']} images")
    say(f"peak lr          {plan['peak_lr']:.3g} ({recipe.lr:g} x {recipe.batch_size} / 512)")
    if probe is not None:
        say(f"a step           {plan['step_seconds']:.3f} s, measured on one device; without loading and evaluation")
        say(f"memory           {plan['memory_bytes'] / 2**30:.2f} GiB at its peak")
        if plan["training_seconds"]:
            say(f"the training     {duration(plan['training_seconds'])}")


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as the dotted keys that --set takes."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from flatten(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{key}.{index}")
    else:
        yield key, value
