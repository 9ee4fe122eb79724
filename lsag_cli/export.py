"""lsag export and lsag convert"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import InputError, OutputError, UsageError
from lsag_cli.options import Json, OptionalPreset, Overrides, read_preset
from lsag_cli.output import note, print_json, stdout

Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint.  [default: best.pt of the newest run in runs/]", show_default=False),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file.  [default: the checkpoint's name, .onnx]")] = None,
    preset: OptionalPreset = None,
    overrides: Overrides = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Export --preset untrained.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model as one ONNX file that takes uint8 images, compared with PyTorch before it gets its name."""
    if not onnx:
        raise UsageError("no format was asked for", "add --onnx")
    if random_weights:
        if preset is None or checkpoint is not None:
            raise UsageError(
                "--random-weights needs --preset, and no checkpoint",
                "lsag export --onnx --preset NAME --random-weights",
            )
        resolved = read_preset(preset, overrides)
        out = out or Path(f"{resolved.name}-random.onnx")
    elif preset is not None or overrides:
        raise UsageError("a checkpoint brings its own preset", "drop --preset and --set, or add --random-weights")
    else:
        checkpoint = checkpoint or newest_best()
        out = out or checkpoint.with_suffix(".onnx")
    refuse_existing(out, force)

    from lsag.checkpoint import load_checkpoint, random_checkpoint
    from lsag.export import export_onnx

    if checkpoint is None:
        source = random_checkpoint(resolved)
    else:
        source = load_checkpoint(checkpoint)
        note(f"exporting {checkpoint}")
    done = export_onnx(source, out)
    if as_json:
        figures = {"opset": done.opset, "bytes": done.bytes, "max_difference": done.max_difference}
        print_json("export", path=str(done.path), preset=source.preset.name, **figures)
        return
    console = stdout()
    console.print(
        f"{done.path}: {source.preset.name}, opset {done.opset}, {done.bytes / 1e6:.1f} MB, "
        f"within {done.max_difference:.1g} of PyTorch at batch 1, 2 and 5",
    )
    if checkpoint is not None:
        console.print("next: " + shlex.join(["lsag", "eval", str(done.path)]))


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors' release.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", help="The preset it fits.", show_default=False)],
    overrides: Overrides = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset it was trained on, if not the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file.  [default: FILE with -lsag.pt]")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint of the authors' release into one of ours."""
    resolved = read_preset(preset, overrides, dataset)
    out = out or file.with_name(f"{file.stem}-lsag.pt")
    refuse_existing(out, force)

    from lsag.convert import convert_file

    convert_file(file, resolved, out)
    if as_json:
        print_json("convert", path=str(out), preset=resolved.name)
        return
    stdout().print(f"{out}: {resolved.name}\nnext: " + shlex.join(["lsag", "eval", str(out)]))


def newest_best() -> Path:
    """best.pt of the run that saved one last."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("no checkpoint was given and there is none in runs/", "lsag train, or lsag export CKPT --onnx")
    return found[-1]


def refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise OutputError(f"{path} exists", "add --force, or choose another --out")
