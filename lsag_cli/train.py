"""lsag train"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lsag.config import Preset
from lsag.errors import InterruptedByUserError, UnavailableError, UsageError
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Json,
    NoDownload,
    Overrides,
    PresetName,
    Workers,
    data_dir_or_default,
    read_preset,
)
from lsag_cli.output import giga, is_terminal, mega, note, percent, print_json, say, stderr

if TYPE_CHECKING:
    from lsag.train import Epoch, Started, Step


def train(
    preset: PresetName = "digits-nano",
    dataset: Dataset = None,
    data_dir: DataDir = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Train for so many epochs.")] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/PRESET-TIME")] = None,
    device: Device = "auto",
    gpus: Annotated[int | None, typer.Option(min=0, help="0 or 1 for now.")] = None,
    workers: Workers = None,
    no_download: NoDownload = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and touch nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model. Without arguments: digits-nano, on handwritten digits that need no download, in a minute."""
    resolved = read_preset(preset, [*(overrides or []), *([f"train.epochs={epochs}"] if epochs else [])], dataset)
    if dry_run:
        return show_plan(resolved, as_json)
    device = device_for(gpus, device)
    out = out or Path("runs") / f"{resolved.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"

    from lsag.train import Epoch, Started, Step
    from lsag.train import train as run

    display: Display | None = None
    last: Epoch | None = None
    try:
        for event in run(
            resolved,
            data_dir=data_dir_or_default(data_dir),
            out=out,
            device=device,
            workers=workers,
            download=not no_download,
        ):
            if isinstance(event, Started):
                display = Display(event)
            elif isinstance(event, Step) and display:
                display.step(event)
            elif isinstance(event, Epoch) and display:
                display.epoch(event)
                last = event
    except KeyboardInterrupt:
        kept = f"the last finished epoch is in {out / 'last.pt'}" if (out / "last.pt").exists() else ""
        raise InterruptedByUserError("interrupted", kept) from None
    finally:
        if display:
            display.close()
    assert last is not None, "a training has at least one epoch"

    checkpoint = out / "best.pt"
    where = ["--data-dir", str(data_dir)] if data_dir else []
    next_steps = [
        shlex.join(["lsag", "eval", str(checkpoint), *where]),
        shlex.join(["lsag", "export", str(checkpoint), "--onnx"]),
    ]
    if as_json:
        figures = {"best_top1": last.best_top1, "last_top1": last.top1, "epochs": last.epoch, "seconds": last.seconds}
        print_json("train", out=str(out), checkpoint=str(checkpoint), **figures, next=next_steps)
        return
    say(f"best accuracy  {percent(last.best_top1)}  in {duration(last.seconds)}")
    say(f"everything is in {out}: best.pt, last.pt, curves.png, metrics.jsonl, preset.json")
    for command in next_steps:
        say(f"next: {command}")


def device_for(gpus: int | None, device: str) -> str:
    """What `--gpus` and `--device` together ask for. UnavailableError or UsageError if it cannot be had."""
    if gpus is None:
        return device
    if gpus == 0 and device in ("auto", "cpu"):
        return "cpu"
    if gpus and device.partition(":")[0] in ("auto", "cuda"):
        import torch

        found = torch.cuda.device_count()
        if found < gpus:
            raise UnavailableError(f"asked for {gpus} GPUs, found {found}", f"use --gpus {min(found, 1)}")
        if gpus > 1:
            raise UsageError("training on more than one GPU is not supported yet", "use --gpus 1")
        return "cuda" if device == "auto" else device
    raise UsageError(f"--gpus {gpus} contradicts --device {device}", "give one of them")


def show_plan(preset: Preset, as_json: bool) -> None:
    """The resolved preset and what training it means."""
    from lsag.config import DATASETS
    from lsag.flops import count

    total, recipe = count(preset.model), preset.train
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
        "peak_lr": recipe.lr * recipe.lr_scale,
    }
    if as_json:
        print_json("train", dry_run=True, preset=preset.model_dump(mode="json"), **plan)
        return
    for key, value in flatten(preset.model_dump(mode="json")):
        say(f"{key} = {json.dumps(value)}")
    say("")
    say(f"parameters       {total.params:,}")
    say(f"MACs per image   {giga(total.macs)}, of which {giga(total.macs_run)} are run")
    say(f"steps            {recipe.epochs} epochs of {steps or 'as many steps as the folder has batches'}")
    say(f"effective batch  {recipe.batch_size}")
    say(f"peak lr          {plan['peak_lr']:.3g} ({recipe.lr:g} x {recipe.batch_size} / 512)")


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


class Display:
    """Progress of a training on stderr: a live bar on a terminal, elsewhere a plain line for each epoch."""

    def __init__(self, started: "Started") -> None:
        self.epochs, self.steps = started.preset.train.epochs, started.steps_per_epoch
        self.begin, self.accuracy = time.monotonic(), "-"
        note(
            f"{started.preset.name}: {mega(started.parameters)} parameters on {started.device}, "
            f"{started.train_images:,} training and {started.eval_images:,} evaluation images, "
            f"{self.epochs} epochs of {self.steps} steps; writing to {started.out}"
        )
        self.bar = None
        if is_terminal(sys.stderr):
            from rich.progress import BarColumn, Progress, TextColumn

            text, bar = TextColumn("{task.description}"), BarColumn(bar_width=None)
            self.bar = Progress(text, bar, console=stderr(), transient=True, expand=True)
            self.task = self.bar.add_task("starting", total=self.epochs * self.steps)
            self.bar.start()

    def step(self, event: "Step") -> None:
        if self.bar:
            done = (event.epoch - 1) * self.steps + event.step
            text = (
                f"epoch {event.epoch}/{self.epochs} step {event.step}/{self.steps}  loss {event.loss:.3f}  "
                f"top-1 {self.accuracy}  {event.images_per_second:,.0f} img/s  {self.left(done)} left"
            )
            self.bar.update(self.task, completed=done, description=text)

    def epoch(self, event: "Epoch") -> None:
        self.accuracy = percent(event.top1)
        line = (
            f"epoch {event.epoch}/{self.epochs}  loss {event.train_loss:.3f}  eval loss {event.eval_loss:.3f}  "
            f"top-1 {self.accuracy}  {event.images_per_second:,.0f} img/s"
        )
        if self.bar:
            self.bar.console.print(line)
        else:
            note(f"{line}  data wait {100 * event.data_wait:.0f} %  {self.left(event.epoch * self.steps)} left")

    def left(self, steps_done: int) -> str:
        """The time that remains, if it goes on as it went so far."""
        elapsed = time.monotonic() - self.begin
        return duration(elapsed / steps_done * (self.epochs * self.steps - steps_done))

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
