"""lsag reproduce"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from lsag.config import DATASETS
from lsag.errors import CheckError, InterruptedByUserError, OutputError, TerminatedError, UsageError
from lsag.files import replacing, writing
from lsag.paper.reproduce import Run, Summary, execute, markdown, plan, summarise
from lsag.paper.tables import TABLES, Scale
from lsag.training.signals import StopRequestedError
from lsag_cli.display import duration
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Json,
    Overrides,
    Recompute,
    Workers,
    data_dir_or_default,
    leaving_at_once,
    read_overrides,
)
from lsag_cli.output import note, percent, print_json, say


def reproduce(
    table: Annotated[int, typer.Option(min=2, max=6, help="The paper's table; 2 is counted, the others are trained.")],
    scale: Annotated[
        Literal["nano", "full"], typer.Option(help="nano: as small as cifar-nano; full: the paper's.")
    ] = "nano",
    rows: Annotated[str | None, typer.Option(metavar="A,B,...", help="Train only these rows.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the preset's")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each row.")] = 3,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Runs and reports.", show_default="runs/reproduce-SCALE")] = None,
    device: Device = "auto",
    jobs: Annotated[
        int | None, typer.Option(min=1, max=64, help="Trainings at a time.", show_default="one on each GPU")
    ] = None,
    accum: Annotated[int, typer.Option(min=1, help="As in lsag train.")] = 1,
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="As in lsag train.")] = "auto",
    recompute: Recompute = "none",
    workers: Workers = None,
    yes: Annotated[bool, typer.Option("--yes", help="Begin whatever it costs: needed for --scale full.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and its cost.")] = False,
    as_json: Json = False,
) -> None:
    """Train the rows of one of the paper's tables and report beside its figures. What is done is not done again."""
    chosen = choose_rows(table, rows)
    changes = read_overrides(overrides)
    own = {"name", "train.seed", *(["train.epochs"] if epochs else [])}
    if taken := sorted(own & changes.keys()):
        raise UsageError(f"--set {taken[0]} is not for reproduce", "it has --seeds and --epochs, and names of its own")
    if table == 2 and (rows is not None or epochs or dataset or data_dir or changes or jobs):
        raise UsageError("table 2 is counted, and nothing is trained", "leave the other options away")
    out = out or Path("runs") / f"reproduce-{scale}"
    if not dry_run:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    if epochs:
        changes["train.epochs"] = epochs
    if table == 2:
        scale, seeds = "full", 1
    runs = plan(TABLES[table], scale=scale, seeds=seeds, out=out, dataset=dataset, overrides=changes)
    if not any(run.row in chosen for run in runs):
        raise UsageError(f"table {table} has no such rows at the scale {scale}", "--scale full, or other --rows")
    todo = [run for run in runs if run.row in chosen and run.top1 is None and table > 2]
    where, hours = data_dir_or_default(data_dir), 0.0
    if table > 2:
        check_data(out, dataset or runs[0].preset.data.dataset, where, keep=not dry_run)
    gpus, cores = devices_here(device) if todo else ([], 1)
    at_a_time = min(jobs or max(1, len(gpus)), max(1, len(todo)))
    if todo:
        hours = state_cost(todo, device=device, data_dir=where, at_a_time=at_a_time)
    if dry_run:
        note(f"{len(todo)} trainings to do, {len(runs) - len(todo)} done or not asked for")
        if as_json:
            print_json("reproduce", dry_run=True, table=table, scale=scale, trainings=len(todo), hours=hours)
        return
    if todo and scale == "full" and not yes:
        raise UsageError("the paper's setting is trained only when its cost is accepted", "add --yes")
    command = [sys.executable, "-m", "lsag_cli", "train", "--device", device, "--data-dir", str(where)]
    command += ["--accum", str(accum), "--precision", precision, "--recompute", recompute]
    command += [] if workers is None else ["--workers", str(workers)]
    trainings = execute(
        todo,
        command=command,
        devices=[gpus[job % len(gpus)] if gpus else None for job in range(at_a_time)],
        threads=None if gpus or at_a_time == 1 else max(1, cores // at_a_time),
    )
    try:
        with contextlib.closing(trainings):
            for count, run in enumerate(trainings, start=1):
                runs = [run if old.folder == run.folder else old for old in runs]
                how = run.error or f"{percent(run.top1)} in {duration(run.seconds or 0)}"
                note(f"{run.row}, seed {run.preset.train.seed}: {how} ({count} of {len(todo)})")
                report(table, runs, out, scale)
    except KeyboardInterrupt:
        raise InterruptedByUserError("interrupted; the trainings are saved", "go on with the same command") from None
    except StopRequestedError:
        raise TerminatedError("stopped; the trainings are saved", "go on with the same command") from None
    summaries = report(table, runs, out, scale)
    failed = [run for run in runs if run.error]
    if not as_json:
        say((out / f"table-{table}.md").read_text().rstrip())
    elif not failed:
        print_json("reproduce", table=table, scale=scale, rows=[asdict(item) for item in summaries])
    if failed:
        what = f"{len(failed)} of {len(todo)} trainings failed, first {failed[0].row}: {failed[0].error}"
        raise CheckError(what, "mend it, and give the same command again")


def choose_rows(table: int, names: str | None) -> set[str]:
    """The names of the rows of a table, or of those that are named. UsageError for a name that is none."""
    known = {row.name.lower(): row.name for row in TABLES[table]}
    wanted = [name.strip() for name in names.split(",")] if names is not None else list(known)
    for name in wanted:
        if name.lower() not in known:
            raise UsageError(f"table {table} has no row '{name}'", f"it has {', '.join(known.values())}")
    return {known[name.lower()] for name in wanted}


def check_data(out: Path, dataset: str, data_dir: Path, *, keep: bool) -> None:
    """OutputError if the runs in `out` had other data; with `keep`, remember which it is."""
    path, mine = out / "data.json", {"dataset": dataset, "data_dir": str(data_dir.absolute())}
    if path.is_file():
        with contextlib.suppress(ValueError):
            theirs = json.loads(path.read_text())
            if theirs != mine:
                raise OutputError(f"the runs in {out} are on {theirs}", "give them theirs, or choose another --out")
    if keep:
        with replacing(path) as file:
            file.write(json.dumps(mine).encode())


def devices_here(device: str) -> tuple[list[str], int]:
    """The GPUs that trainings may be spread over, and the cores of the CPU."""
    with leaving_at_once():
        import torch

        from lsag.device import available_cores

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return [], available_cores()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())], available_cores()


def state_cost(todo: Sequence[Run], *, device: str, data_dir: Path, at_a_time: int) -> float:
    """Say how many hours the trainings will take, from a few steps of each network on made-up images."""
    with leaving_at_once():
        from lsag.bench import probe
        from lsag.data.sources import open_split
        from lsag.device import choose_device

    seconds, images = 0.0, {}
    cpu = choose_device(device).type == "cpu"
    steps: dict[str, float] = {}
    for run in todo:
        preset, name = run.preset, run.preset.data.dataset
        if name not in images:
            known = DATASETS.get(name)
            images[name] = (
                known.train_images if known else len(open_split(name, data_dir, train=True, mode=preset.image_mode))
            )
        batch = min(preset.train.batch_size, (16 if preset.model.image_size < 64 else 2) if cpu else 64)
        if preset.name not in steps:
            steps[preset.name] = probe(preset, device=device, slice_size=batch)[0] / batch
            cost = steps[preset.name] * images[name] * preset.train.epochs
            note(f"{run.row}: {preset.name}, {preset.train.epochs} epochs, about {duration(cost)} for a seed")
        seconds += steps[preset.name] * images[name] * preset.train.epochs
    hours = seconds / at_a_time / 3600
    note(f"{len(todo)} trainings, about {hours:.1f} hours, without loading and evaluation")
    return hours


def report(table: int, runs: Sequence[Run], out: Path, scale: Scale) -> list[Summary]:
    """Write table-N.md, .json and .png to `out`, as far as the runs are done."""
    with leaving_at_once():
        from lsag.model.build import count_model
        from lsag.plots import draw_table

    recipe, data = runs[0].preset.train, runs[0].preset.data
    paper_dataset = "imagenet" if table == 4 else "cifar100" if data.dataset == "cifar100" else "cifar10"
    if table == 2:
        paper_dataset = ""
    summaries = summarise(
        TABLES[table], runs, count=lambda preset: count_model(preset.model), paper_dataset=paper_dataset
    )
    title = f"Table {table}" + (f" at the scale {scale}" if table > 2 else "")
    about = "Counted, nothing is trained."
    if table > 2:
        about = (
            f"{recipe.epochs} epochs on {data.dataset}; top-1 after the last one, mean and standard deviation over the "
            f"seeds. The paper's figures are of 300 epochs on {paper_dataset}. lsag {version('lsag')}, "
            f"torch {version('torch')}, {datetime.now(UTC):%F}."
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
