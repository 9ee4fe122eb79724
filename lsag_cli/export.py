"""lsag export and lsag convert"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lsag.config import Preset
from lsag.errors import InputError, UsageError
from lsag.runs import BEST, RUNS, newest_run
from lsag_cli.options import Force, Json, OptionalPreset, Overrides, read_preset, refuse_existing
from lsag_cli.output import note, print_json, say


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint.", show_default="best.pt of the newest run in runs/"),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX graph.")] = False,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Write the weights as safetensors, for other tools.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The file.", show_default="the checkpoint's name, .onnx or .safetensors")
    ] = None,
    preset: OptionalPreset = None,
    overrides: Overrides = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Export --preset untrained.")] = False,
    opset: Annotated[
        Literal["20", "23"], typer.Option(help="20 runs on older onnxruntimes; 23 has attention as one operator.")
    ] = "20",
    half: Annotated[bool, typer.Option("--half", help="Compute in fp16; input and output stay as they are.")] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, max=65_536, help="A fixed batch.", show_default="any batch")
    ] = None,
    raw_input: Annotated[
        bool, typer.Option("--raw-input", help="Take normalised float32 N x C x H x W instead of uint8 N x H x W x C.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model as one ONNX file, compared with PyTorch before it gets its name; or its weights as safetensors."""
    if onnx == safetensors:
        raise UsageError("ask for one format", "add --onnx or --safetensors")
    if safetensors and (opset != "20" or half or batch or raw_input):
        raise UsageError("--opset, --half, --batch and --raw-input are for --onnx", "leave them away")
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
        raise UsageError("a checkpoint brings its own preset", "drop --preset and --set, or add --random-weights")
    else:
        checkpoint = checkpoint or newest_best()
        refuse_folder(checkpoint)
        out = out or checkpoint.with_suffix(suffix)
    if out.suffix != suffix:
        raise UsageError(f"--out {out} does not end in {suffix}", "give a file of that kind")
    refuse_existing(out, force, source=checkpoint)

    from lsag.checkpoint import load_checkpoint, random_checkpoint, save_safetensors
    from lsag.inference.export import OPSETS, export_onnx

    if checkpoint is None:
        source = random_checkpoint(resolved)
    else:
        source = load_checkpoint(checkpoint)
        epoch = f" of {checkpoint} (epoch {source.epoch} of {source.preset.train.epochs})"
    if safetensors:
        save_safetensors(out, source)
        if as_json:
            return print_json("export", path=str(out), preset=source.preset.name, bytes=out.stat().st_size)
        say(f"{out}: {source.preset.name}, {out.stat().st_size / 1e6:.1f} MB")
        return say(eval_command(out, source.preset)) if checkpoint is not None else None
    done = export_onnx(source, out, opset=int(opset), half=half, batch=batch, raw_input=raw_input)
    if as_json:
        figures = {key: value for key, value in asdict(done).items() if key != "path"}
        runs_from = {"oldest_onnxruntime": OPSETS[done.opset]}
        print_json("export", path=str(done.path), preset=source.preset.name, **figures, **runs_from)
        return
    if checkpoint is not None:
        note(f"made{epoch}")
    takes = "normalised float32 images" if raw_input else "uint8 images"
    say(
        f"{done.path}: {source.preset.name}{', fp16' if half else ''}, {takes}, opset {done.opset} "
        f"(onnxruntime {OPSETS[done.opset]} or newer), {done.bytes / 1e6:.1f} MB"
    )
    say(
        f"compared with PyTorch at batch {', '.join(map(str, done.batches))}: logits within {done.max_difference:.1g}, "
        f"same top-1 for {done.same_top1} of {done.compared} images"
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
    refuse_existing(out, force, source=file)

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
    """best.pt of the newest run in ./runs. InputError if there is none."""
    run = newest_run(BEST)
    if run is None:
        raise InputError(
            f"no checkpoint was given and there is none in {RUNS}/", "lsag train, or lsag export CKPT --onnx"
        )
    return run / BEST


def refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder", "give a checkpoint file")
