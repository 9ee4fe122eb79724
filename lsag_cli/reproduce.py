"""lsag reproduce"""

import contextlib
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from lsag.config import default_data_dir, parse_overrides
from lsag.errors import CheckError, InterruptedByUserError, OutputError, TerminatedError, UsageError
from lsag.files import replacing, writing
from lsag.machine import available_cores
from lsag.paper.reproduce import Run, Summary, execute, markdown, plan, summarise
from lsag.paper.tables import TABLES, Scale
from lsag.training.signals import StopRequestedError
from lsag_cli.display import counted, duration
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Json,
    Overrides,
    Precision,
    Recompute,
    Workers,
    loading,
)
from lsag_cli.output import note, percent, print_json, say
from lsag_cli.plan import count_images
from lsag_cli.processes import lsag_command

RELEASED_GPUS = 8
"""On which the authors trained each model, and which each drew their own mixup."""


def reproduce(
    table: Annotated[
        int, typer.Option(min=2, max=6, help="Number of the paper's table; 2 is counted, the others are trained.")
    ],
    scale: Annotated[
        Literal["nano", "full"], typer.Option(help="nano: the size of cifar-nano; full: the paper's.")
    ] = "nano",
    rows: Annotated[str | None, typer.Option(metavar="A,B,...", help="Train only these rows.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs.", show_default="the preset's")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings per row, each with a different seed.")] = 3,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and reports.", show_default="runs/reproduce-SCALE")
    ] = None,
    device: Device = "auto",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Trainings at the same time.", show_default="one per GPU"),
    ] = None,
    accum: Annotated[int, typer.Option(min=1, help="Gradient-accumulation steps.")] = 1,
    precision: Precision = "auto",
    recompute: Recompute = "none",
    workers: Workers = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start at any cost; required for --scale full.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained and its cost.")] = False,
    as_json: Json = False,
) -> None:
    """Train the rows of one of the paper's tables and compare them with its figures. Finished runs are skipped."""
    selected = select_rows(table, rows)
    changes = parse_overrides(overrides or ())
    for key in ("name", "train.seed", "train.patience", *(["train.epochs"] if epochs else [])):
        if key in changes:
            raise UsageError(f"--set {key} is not for reproduce", "use --seeds and --epochs; runs get their own names")
    trained = table > 2
    if not trained:
        if rows is not None or epochs or dataset or data_dir or changes or jobs:
            raise UsageError("table 2 is counted, and nothing is trained", "remove the other options")
        scale, seeds = "full", 1
    out = out or Path("runs") / f"reproduce-{scale}"
    if not dry_run:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    if epochs:
        changes["train.epochs"] = epochs
    runs = plan(TABLES[table], scale=scale, seeds=seeds, out=out, dataset=dataset, overrides=changes)
    if not any(run.row in selected for run in runs):
        raise UsageError(f"table {table} has no such rows at the scale {scale}", "use --scale full, or other --rows")
    todo = [run for run in runs if trained and run.row in selected and run.top1 is None]
    dataset = runs[0].preset.data.dataset
    where = data_dir or default_data_dir(dataset)
    if trained:
        check_data(out, dataset, where, write=not dry_run)
    if todo and epochs and (warmup := runs[0].preset.train.warmup_epochs):
        note(f"warm-up: {warmup:g} of {epochs} epochs")
    if todo and scale == "full" and accum != RELEASED_GPUS:
        drawn = f"mixup is drawn {accum} times a batch" if accum > 1 else "mixup is drawn once a batch"
        note(f"{drawn}; in the release by each of {RELEASED_GPUS} GPUs: --accum {RELEASED_GPUS}")
    gpus, cores = devices_here(device) if todo else ([], 1)
    num_jobs = min(jobs or max(1, len(gpus)), max(1, len(todo)))
    hours = estimate_hours(todo, device=device, data_dir=where, num_jobs=num_jobs) if todo else 0.0
    if dry_run:
        note(f"{counted(len(todo), 'training')} to do, {len(runs) - len(todo)} already finished or not selected")
        if as_json:
            print_json("reproduce", dry_run=True, table=table, scale=scale, trainings=len(todo), hours=hours)
        return
    if todo and scale == "full" and not yes:
        raise UsageError("the paper's setting is trained only when its cost is accepted", "add --yes")
    command = [*lsag_command(), "train", "--device", device, "--data-dir", str(where)]
    command += ["--accum", str(accum), "--precision", precision, "--recompute", recompute]
    command += [] if workers is None else ["--workers", str(workers)]
    trainings = execute(
        todo,
        command=command,
        devices=[gpus[job % len(gpus)] if gpus else None for job in range(num_jobs)],
        threads=None if gpus or num_jobs == 1 else max(1, cores // num_jobs),
    )
    train_and_report(trainings, runs, num_todo=len(todo), table=table, scale=scale, out=out, as_json=as_json)


def train_and_report(
    trainings: Generator[Run, None, None],
    runs: list[Run],
    *,
    num_todo: int,
    table: int,
    scale: Scale,
    out: Path,
    as_json: bool,
) -> None:
    """Show each training as it ends, keep the report in `out` current, and show it. CheckError if any failed."""
    try:
        with contextlib.closing(trainings):
            for index, run in enumerate(trainings, start=1):
                runs = [run if old.folder == run.folder else old for old in runs]
                result = run.error or f"{percent(run.top1)} in {duration(run.seconds or 0)}"
                note(f"{run.row}, seed {run.preset.train.seed}: {result} ({index} of {num_todo})")
                report(table, runs, out, scale)
    except KeyboardInterrupt:
        raise InterruptedByUserError("interrupted; the trainings are saved", "resume with the same command") from None
    except StopRequestedError:
        raise TerminatedError("stopped; the trainings are saved", "resume with the same command") from None
    summaries = report(table, runs, out, scale)
    failed = [run for run in runs if run.error]
    if not as_json:
        say(*(out / f"table-{table}.md").read_text().splitlines())
    elif not failed:
        print_json("reproduce", table=table, scale=scale, rows=[asdict(item) for item in summaries])
    if failed:
        what = f"{len(failed)} of {num_todo} trainings failed, first {failed[0].row}: {failed[0].error}"
        raise CheckError(what, "fix it, then resume with the same command")


def select_rows(table: int, names: str | None) -> set[str]:
    """The rows of a table that `names` lists, or all of them. UsageError for a name that the table does not have."""
    known = {row.name.lower(): row.name for row in TABLES[table]}
    wanted = [name.strip() for name in names.split(",")] if names is not None else list(known)
    for name in wanted:
        if name.lower() not in known:
            raise UsageError(f"table {table} has no row '{name}'", f"it has {', '.join(known.values())}")
    return {known[name.lower()] for name in wanted}


def check_data(out: Path, dataset: str, data_dir: Path, *, write: bool) -> None:
    """OutputError if the runs in `out` were trained on other data; with `write`, note there which data it is."""
    path, given = out / "data.json", {"dataset": dataset, "data_dir": str(data_dir.absolute())}
    if path.is_file():
        with contextlib.suppress(ValueError):
            original = json.loads(path.read_text())
            if original != given:
                raise OutputError(
                    f"the runs in {out} were trained on {original}", "use the same data, or choose another --out"
                )
    if write:
        with replacing(path) as file:
            file.write(json.dumps(given).encode())


def devices_here(device: str) -> tuple[list[str], int]:
    """The GPUs over which trainings may be spread, and the number of CPU cores."""
    with loading():
        import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return [], available_cores()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())], available_cores()


def estimate_hours(todo: Sequence[Run], *, device: str, data_dir: Path, num_jobs: int) -> float:
    """Hours that the trainings will take, from a few steps of each network on made-up images; shown on stderr."""
    with loading():
        from lsag.bench import probe
        from lsag.device import choose_device

    on_cpu = choose_device(device).type == "cpu"
    num_images: dict[str, int] = {}
    per_image: dict[str, float] = {}  # seconds of a training step
    seconds = 0.0
    for run in todo:
        preset, dataset = run.preset, run.preset.data.dataset
        if dataset not in num_images:
            _, num_images[dataset], _ = count_images(preset, data_dir)
        images = num_images[dataset] * preset.train.epochs
        if preset.name not in per_image:
            fits = 64 if not on_cpu else 16 if preset.model.image_size < 64 else 2
            batch = min(preset.train.batch_size, fits)
            per_image[preset.name] = probe(preset, device=device, slice_size=batch)[0] / batch
            cost = duration(per_image[preset.name] * images)
            note(f"{run.row}: {preset.name}, {preset.train.epochs} epochs, about {cost} per seed")
        seconds += per_image[preset.name] * images
    hours = seconds / num_jobs / 3600
    note(f"{counted(len(todo), 'training')}, about {hours:.1f} hours, without loading and evaluation")
    return hours


def report(table: int, runs: Sequence[Run], out: Path, scale: Scale) -> list[Summary]:
    """Write table-N.md, .json and .png to `out` with the runs that are complete."""
    with loading():
        from lsag.model.build import count_model
        from lsag.plots import draw_table

    recipe, dataset = runs[0].preset.train, runs[0].preset.data.dataset
    if table == 2:
        paper_dataset, title, about = "", "Table 2", "Counted, nothing is trained."
    else:
        paper_dataset = "imagenet" if table == 4 else "cifar100" if dataset == "cifar100" else "cifar10"
        title = f"Table {table} at the scale {scale}"
        about = (
            f"{recipe.epochs} epochs on {dataset}; top-1 after the last one, mean and standard deviation over the "
            f"seeds. The paper's figures are for 300 epochs on {paper_dataset}. lsag {version('lsag')}, "
            f"torch {version('torch')}, {datetime.now(UTC):%F}."
        )
    summaries = summarise(
        TABLES[table], runs, count=lambda preset: count_model(preset.model), paper_dataset=paper_dataset
    )
    figures = {"table": table, "scale": scale, "about": about, "rows": [asdict(item) for item in summaries]}
    for suffix, text in (
        (".md", markdown(summaries, title=title, about=about)),
        (".json", json.dumps(figures, indent=2) + "\n"),
    ):
        with replacing(out / f"table-{table}{suffix}") as file:
            file.write(text.encode())
    if any(item.top1 for item in summaries):
        rows = [(item.name, item.top1, item.paper_top1) for item in summaries]
        draw_table(rows, out / f"table-{table}.png", title=title)
    return summaries
