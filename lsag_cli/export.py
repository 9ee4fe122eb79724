"""lsag export and lsag convert"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lsag.config import DATASETS, Preset
from lsag.errors import InputError, UsageError
from lsag.files import read_bytes
from lsag.inference.providers import OPSETS, Opset
from lsag.runs import BEST, RUNS, newest_run
from lsag.weights import model_file
from lsag_cli.options import (
    Force,
    Json,
    OldBatch,
    OptionalPreset,
    Overrides,
    loading,
    read_preset,
    refuse_existing,
    renamed,
)
from lsag_cli.output import note, print_json, say, show_status, status


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint, or a preset with trained weights.", show_default="best.pt of the newest run in runs/"
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Write the weights as safetensors, for other tools.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write.", show_default="the checkpoint's name, .onnx or .safetensors")
    ] = None,
    preset: OptionalPreset = None,
    overrides: Overrides = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Export an untrained --preset.")] = False,
    opset: Annotated[
        Opset, typer.Option(help="23 has attention as one operator; 20 is for onnxruntime before 1.23.")
    ] = 23,
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="Precision of the graph; input and output stay the same.")
    ] = "fp32",
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="Fix the batch size.", show_default="any")
    ] = None,
    raw_input: Annotated[
        bool, typer.Option("--raw-input", help="Take normalised float32 N x C x H x W instead of uint8 N x H x W x C.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", hidden=True)] = False,
    batch: OldBatch = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a model to one ONNX file, verified against PyTorch before it is saved; or its weights to safetensors."""
    fp16 = renamed("fp16" if half else None, "--half", "--precision fp16", precision) == "fp16"
    batch_size = renamed(batch, "--batch", "--batch-size", batch_size)
    if onnx == safetensors:
        raise UsageError("one format is needed", "add --onnx or --safetensors")
    if safetensors and (opset != 23 or fp16 or batch_size or raw_input):
        raise UsageError("--opset, --precision, --batch-size and --raw-input are for --onnx", "remove them")
    suffix = ".onnx" if onnx else ".safetensors"
    if random_weights:
        if preset is None or checkpoint is not None:
            raise UsageError(
                "--random-weights needs --preset, and no checkpoint",
                "lsag export --onnx --preset NAME --random-weights",
            )
        resolved = read_preset(preset, overrides)
        out = out or Path(f"{resolved.name}-random{suffix}")
    elif preset is not None or overrides:
        raise UsageError("a checkpoint has its own preset", "remove --preset and --set, or add --random-weights")
    else:
        checkpoint = checkpoint or newest_best()
        read_bytes(model_file(checkpoint), what="checkpoint", size=0)
        out = out or checkpoint.with_suffix(suffix)
    if out.suffix != suffix:
        raise UsageError(f"--out {out} does not end in {suffix}", f"choose a {suffix} file")
    refuse_existing(out, force, source=checkpoint)

    with loading():
        from lsag.checkpoint import load_checkpoint, random_checkpoint, save_safetensors
    with status("opening the model"):
        source = load_checkpoint(checkpoint) if checkpoint else random_checkpoint(resolved)
    if safetensors:
        save_safetensors(out, source)
        if as_json:
            return print_json("export", path=str(out), preset=source.preset.name, bytes=out.stat().st_size)
        say(f"{out}: {source.preset.name}, {out.stat().st_size / 1e6:.1f} MB")
        return say(eval_command(out, source.preset)) if checkpoint is not None else None
    with loading("loading ONNX"):
        from lsag.inference.export import export_onnx
    with status("exporting"):
        done = export_onnx(
            source,
            out,
            opset=opset,
            half=fp16,
            batch=batch_size,
            raw_input=raw_input,
            on_verify=lambda: show_status("comparing with PyTorch ..."),
        )
    if as_json:
        figures = {key: value for key, value in asdict(done).items() if key != "path"}
        runs_from = {"oldest_onnxruntime": OPSETS[done.opset]}
        print_json("export", path=str(done.path), preset=source.preset.name, **figures, **runs_from)
        return
    for line in done.notes:
        note(line)
    if checkpoint is not None:
        note(f"exported from {checkpoint} (epoch {source.epoch} of {source.preset.train.epochs})")
    takes = "normalised float32 images" if raw_input else "uint8 images"
    say(
        f"{done.path}: {source.preset.name}{', fp16' if fp16 else ''}, {takes}, opset {done.opset} "
        f"(onnxruntime {OPSETS[done.opset]} or newer), {done.bytes / 1e6:.1f} MB"
    )
    say(
        f"verified with {' and '.join(done.differences)} against PyTorch at batch "
        f"{', '.join(map(str, done.batches))}: "
        f"logits within {' and '.join(f'{value:.1g}' for value in done.differences.values())}, "
        f"same top-1 for {done.same_top1} of {done.compared} images"
    )
    if checkpoint is not None:
        say(eval_command(done.path, source.preset))


def newest_best() -> Path:
    """best.pt of the newest run in ./runs. InputError if there is none."""
    run = newest_run(BEST)
    if run is None:
        raise InputError(
            f"no checkpoint given, and no {BEST} in ./{RUNS}", "run lsag train first, or name a checkpoint"
        )
    return run / BEST


def convert(
    file: Annotated[Path, typer.Argument(help="Checkpoint released by the authors.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", help="The preset of its model.", show_default=False)],
    overrides: Overrides = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset it was trained on, if not the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="FILE-lsag.pt")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert the authors' checkpoint to lsag's format."""
    resolved = read_preset(preset, overrides, dataset)
    read_bytes(file, what="checkpoint", size=0)
    out = out or file.with_name(f"{file.stem}-lsag.pt")
    refuse_existing(out, force, source=file)

    with loading():
        from lsag.convert import convert_file
    with status("converting"):
        convert_file(file, resolved, out)
    if as_json:
        print_json("convert", path=str(out), preset=resolved.name)
        return
    say(f"{out}: {resolved.name}", eval_command(out, resolved))


def eval_command(path: Path, preset: Preset) -> str:
    """A line with the command that evaluates `path`."""
    data = " --data-dir DIR" if preset.data.dataset == "imagenet" or preset.data.dataset not in DATASETS else ""
    return f"next: lsag eval {shlex.quote(str(path))}{data}"
