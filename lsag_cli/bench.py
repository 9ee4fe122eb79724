"""lsag bench"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lsag import config
from lsag.errors import UsageError
from lsag.machine import processor
from lsag_cli.display import counted
from lsag_cli.options import (
    BatchSize,
    Device,
    Force,
    Json,
    OldBatch,
    Precision,
    Recompute,
    loading,
    refuse_existing,
    renamed,
)
from lsag_cli.output import is_terminal, mega, operations, percent, print_json, say, say_prose, say_table, stderr

if TYPE_CHECKING:
    from lsag.bench import Result

DEFAULT = ("cifar-tiny", "plain:cifar-tiny")
COLUMNS = (
    "model",
    "type",
    "params",
    "MACs",
    "img/s",
    "spread",
    "ratio",
    "p50 ms\nbatch 1",
    "p90 ms\nbatch 1",
    "memory\nMiB",
    "MACs/s",
    "of\nmatmul",
)
DROP = ("MACs/s", "params", "p90 ms\nbatch 1", "MACs", "of\nmatmul", "memory\nMiB", "spread", "p50 ms\nbatch 1")
"""What leaves a narrow terminal first."""


def bench(
    contenders: Annotated[
        list[str] | None,
        typer.Argument(
            help="Presets, checkpoints, .onnx files (host:FILE includes copies to and from the device, openvino:FILE "
            "is run by OpenVINO), timm:NAME, plain:PRESET (the released formulation), compiled:PRESET; presets and "
            "timm models accept settings, as NAME,KEY=VALUE. bf16:, fp32: and the like set a precision. Ratios "
            "are relative to the first.",
            show_default=" ".join(DEFAULT),
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Measure Table 2's presets beside their peers in the paper's Tables 3 and 4."),
    ] = False,
    mode: Annotated[
        Literal["inference", "training"], typer.Option(help="Measure a forward pass, or a whole training step.")
    ] = "inference",
    batch_size: BatchSize = 8,
    batch: OldBatch = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of times that the contenders take turns.")] = 10,
    precision: Precision = "auto",
    dtype: Annotated[config.Precision | None, typer.Option("--dtype", hidden=True)] = None,
    device: Device = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the models with torch.compile.")] = False,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4_096, help="CPU threads for each contender.", show_default="depends on the machine"),
    ] = None,
    system_allocator: Annotated[
        bool,
        typer.Option("--system-allocator", help="Use the system's default memory allocator for all contenders."),
    ] = False,
    recompute: Recompute = "none",
    plot: Annotated[Path | None, typer.Option(help="Draw the images per second as a bar chart (PNG).")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure models side by side: images/s, latency, memory, share of the machine's matrix-multiply rate."""
    batch_size = renamed(batch, "--batch", "--batch-size", batch_size)
    precision = renamed(dtype, "--dtype", "--precision", precision)
    if plot and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot} does not end in .png", "choose a name that does")
    if plot:
        refuse_existing(plot, force, option="--plot")
    if peers and contenders:
        raise UsageError("--peers brings its own contenders", "remove the others")
    if recompute != "none" and mode == "inference":
        raise UsageError("--recompute is for training", "add --mode training")
    if len(set(contenders or ())) < len(contenders or ()):
        raise UsageError("a contender is named twice", "name each only once")
    with loading():
        from rich.progress import Progress

        from lsag.bench import PEERS
        from lsag.bench import bench as run
        from lsag.plots import draw_bench

    groups = PEERS if peers else {"": dict.fromkeys(contenders or DEFAULT)}
    with Progress(console=stderr(), transient=True, disable=not is_terminal(sys.stderr)) as bar:
        measured = {}
        for group, specs in groups.items():
            task = bar.add_task(group or "rounds", total=rounds)
            measured[group] = run(
                list(specs),
                mode=mode,
                batch_size=batch_size,
                device=device,
                precision=precision,
                compile=compile,
                recompute=recompute,
                threads=threads,
                keep_memory=not system_allocator,
                rounds=rounds,
                on_round=lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
            )
    if plot:
        speeds = {}
        for group, found in measured.items():
            speeds[group] = {result.name: (result.images_per_second, result.spread) for result in found.results}
        place = f"{processor()}, {counted(found.threads, 'thread')}" if found.device == "cpu" else found.device
        draw_bench(speeds, plot, title=f"{mode}, batch {batch_size} on {place}; whiskers: quartiles")
    if as_json:
        figures = [{"group": group, **asdict(found)} for group, found in measured.items()]
        return print_json(
            "bench",
            mode=mode,
            batch_size=batch_size,
            compile=compile,
            recompute=recompute,
            system_allocator=system_allocator,
            groups=figures,
        )
    for group, found in measured.items():
        how = f"{mode}, batch {batch_size}{', compiled' if compile else ''}"
        how += "" if recompute == "none" else f", recompute {recompute}"
        how += ", system allocator" if system_allocator else ""
        rates = ", ".join(f"{operations(rate)}MACs/s ({name})" for name, rate in found.matrix_rates.items())
        where = f"{found.device}, {counted(found.threads, 'thread')}, matrix products {rates}"
        columns, rows = list(COLUMNS), [list(cells(result)) for result in found.results]
        if peers:
            columns.append("paper's\nimg/s")
            for row, result in zip(rows, found.results, strict=True):
                paper = groups[group][result.name]
                row.append(f"{paper:,.1f}" if paper else "-")
        say_table(columns, rows, title=f"{group} {how} on {where}".lstrip(), drop=DROP)
    say_prose(
        "ratio: img/s over the first contender's. of matmul: MACs/s over the rate of matrix products in the same run. "
        "memory: peak of tensors, without libraries."
    )
    if plot:
        say(f"wrote {plot}")


def cells(result: "Result") -> tuple[str, ...]:
    latency = [f"{1000 * value:.1f}" if value else "-" for value in (result.latency_p50, result.latency_p90)]
    return (
        result.name,
        result.precision,
        mega(result.params),
        operations(result.macs),
        f"{result.images_per_second:,.1f}",
        f"{100 * result.spread:.0f} %" if result.spread else "-",
        f"{result.ratio:.2f}",
        *latency,
        f"{result.peak_memory / 2**20:,.0f}" if result.peak_memory else "-",
        operations(result.macs_per_second),
        percent(result.share),
    )
