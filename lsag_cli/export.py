"""lsag export and lsag convert"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lsag.config import Preset
from lsag.errors import InputError, OutputError, UsageError
from lsag_cli.options import Json, OptionalPreset, Overrides, read_preset
from lsag_cli.output import note, print_json, say

Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint.", show_default="best.pt of the newest run in runs/"),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="the checkpoint's name, .onnx")] = None,
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
        refuse_folder(checkpoint)
        out = out or checkpoint.with_suffix(".onnx")
    refuse_existing(out, force)

    from lsag.checkpoint import load_checkpoint, random_checkpoint
    from lsag.export import export_onnx

    if checkpoint is None:
        source = random_checkpoint(resolved)
    else:
        source = load_checkpoint(checkpoint)
        note(f"exporting {checkpoint} (epoch {source.epoch} of {source.preset.train.epochs})")
    done = export_onnx(source, out)
    if as_json:
        figures = {"opset": done.opset, "bytes": done.bytes, "max_difference": done.max_difference}
        print_json("export", path=str(done.path), preset=source.preset.name, **figures)
        return
    say(
        f"{done.path}: {source.preset.name}, opset {done.opset}, {done.bytes / 1e6:.1f} MB, "
        f"within {done.max_difference:.1g} of PyTorch at batch 1, 2 and 5",
    )
    if checkpoint is not None:
        say(eval_command(done.path, source.preset))


def convert(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the authors' release.", show_default=False)],
    preset: Annotated[str, typer.Option("--preset", help="The preset it fits.", show_default=False)],
    overrides: Overrides = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset it was trained on, if not the preset's.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="FILE-lsag.pt")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint of the authors' release into one of ours."""
    resolved = read_preset(preset, overrides, dataset)
    refuse_folder(file)
    out = out or file.with_name(f"{file.stem}-lsag.pt")
    refuse_existing(out, force)

    from lsag.convert import convert_file

    convert_file(file, resolved, out)
    if as_json:
        print_json("convert", path=str(out), preset=resolved.name)
        return
    say(f"{out}: {resolved.name}\n" + eval_command(out, resolved))


def eval_command(path: Path, preset: Preset) -> str:
    """The line that says how to evaluate `path`."""
    where = " --data-dir DIR" if preset.data.dataset in ("folder", "imagenet") else ""
    return f"next: lsag eval {shlex.quote(str(path))}{where}"


def newest_best() -> Path:
    """best.pt of the run that saved one last."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("no checkpoint was given and there is none in runs/", "lsag train, or lsag export CKPT --onnx")
    return found[-1]


def refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder", "give a checkpoint file")


def refuse_existing(path: Path, force: bool) -> None:
    if not force and (path.exists() or path.is_symlink()):
        raise OutputError(f"{path} exists", "add --force, or choose another --out")
