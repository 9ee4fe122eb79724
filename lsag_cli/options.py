"""Options shared by several commands."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lsag import config
from lsag.config import Preset, parse_dataset, parse_overrides
from lsag.distributed.launch import launched
from lsag.errors import OutputError, UsageError
from lsag.inference import providers
from lsag.inference.providers import check_model
from lsag.machine import check_address_space
from lsag.presets import load_preset, preset_names
from lsag_cli.output import erase_status, note, status
from lsag_cli.start import stopping_at_once

if TYPE_CHECKING:
    from lsag.inference.classifier import Classifier
    from lsag.inference.session import Session

T = TypeVar("T")


def complete_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


OptionalPreset = Annotated[
    str | None,
    typer.Option("--preset", help="Preset name, or path to a .toml or .json file.", autocompletion=complete_preset),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the preset; repeatable.")
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="timm:NAME[,KEY=VALUE...]",
        help="Replace the preset's network with a timm model, with the same recipe (docs/baselines.md).",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, imagenet, folder (images in folders of classes), tar:PATTERN, list:TABLE or "
        "hf:NAME (docs/data.md).",
        show_default="the preset's",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Data folder.", show_default="$LSAG_DATA, or ./data; for tar:, list: and hf: the current folder"),
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="Take this split of the dataset.", show_default="that for evaluation")
]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N, mps or cpu.")]
Provider = Annotated[
    providers.Provider | None,
    typer.Option(
        help="For .onnx graphs: what runs them. auto is CUDA, else, with a note, OpenVINO where it is installed, else "
        "onnxruntime's CPU.",
        show_default="auto",
    ),
]
Profile = Annotated[
    bool, typer.Option("--profile", help="For .onnx graphs: show the number of nodes on each execution provider.")
]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Number of processes that load images.", show_default="depends on the machine"),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=65_536, help="Images per batch.")]
OldBatch = Annotated[int | None, typer.Option("--batch", min=1, max=65_536, hidden=True)]
Precision = Annotated[
    config.Precision,
    typer.Option(
        "--precision", help="Precision of matrix products; auto is bf16 where the device multiplies it natively."
    ),
]
ModelPrecision = Annotated[
    config.Precision | None,
    typer.Option("--precision", help="Precision of matrix products.", show_default="fp32, or the graph's own"),
]
Recompute = Annotated[
    config.Recompute,
    typer.Option(help="Save memory: recompute the local block, or all blocks, in the backward pass."),
]
NoDownload = Annotated[bool, typer.Option("--no-download", help="Do not download a missing dataset.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@contextlib.contextmanager
def loading(text: str = "loading PyTorch") -> Iterator[None]:
    """Around slow imports: a terminal shows `text`, and SIGINT and SIGTERM end the process at once."""
    check_address_space()
    with stopping_at_once(erase_status), status(text):
        yield


def renamed(value: T | None, old: str, new: str, default: T) -> T:
    """The value of an option, also under its old, hidden name, which works for one more release with a note on stderr.

    `value` is what was given with `old` (None: it was not), `default` the value of the option that replaces it:
    `batch_size = renamed(batch, "--batch", "--batch-size", batch_size)`.
    """
    if value is None:
        return default
    if any(word.partition("=")[0] == new.split()[0] for word in sys.argv):
        raise UsageError(f"{old} is now {new}, and both were given", f"remove {old}")
    if os.environ.get("RANK", "0") == "0" and not launched():  # one of several processes says it
        note(f"{old} is now {new}")
    return value


def read_preset(
    name: str | Preset,
    overrides: list[str] | None,
    dataset: str | None = None,
    model: str | None = None,
    notes: list[str] | None = None,
) -> Preset:
    """The preset with another `dataset` or network (`model`, timm:NAME), and the `--set` options applied last."""
    if model is not None and not model.startswith("timm:"):
        raise UsageError(f"--model {model} is not timm:NAME", "choose an LSAG with --preset")
    changes = parse_overrides(overrides or ())
    if model and "model.timm" in changes:
        raise UsageError("--model and --set model.timm name two networks", "remove one of them")
    timm = model.removeprefix("timm:") if model else None
    return load_preset(name, changes, dataset=dataset, timm=timm, notes=notes)


def refuse_existing(out: Path, force: bool, *, source: Path | None = None, option: str = "--out") -> None:
    """OutputError unless `out` can be written: it exists without `force`, is the `source` itself, or has no folder.

    `option` is the name of the option to blame.
    """
    if source and out.exists() and source.exists() and out.samefile(source):
        raise OutputError(f"{out} is the input file", f"choose another {option}")
    if out.exists() and not out.is_file():
        raise OutputError(f"cannot write {out}: it is not a regular file", "choose another name")
    if not force and (out.exists() or out.is_symlink()):
        raise OutputError(f"{out} exists", f"add --force, or choose another {option}")
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.parent}", "create the folder first")


def check_options(
    model: Path, *, device: str, provider: str | None, precision: config.Precision | None, profile: bool
) -> None:
    """Refuse what the machine or the kind of `model` rules out, before anything slow is imported."""
    if profile and model.suffix != ".onnx":
        raise UsageError("--profile is for .onnx graphs", "lsag export CKPT --onnx")
    check_model(model, device=device, provider=provider, precision=precision)


def check_source(images: object, dataset: str | None, data_dir: Path | None, *rest: object) -> None:
    """UsageError unless either `images` or a dataset is given, and `data_dir` and the `rest` only with a dataset."""
    if bool(images) == bool(dataset):
        raise UsageError("give either images or --dataset", "remove one, or add the name of an image file")
    if not dataset and (data_dir is not None or any(option is not None for option in rest)):
        raise UsageError("--data-dir, --split and --index are for --dataset", "add --dataset, or remove them")
    if dataset:
        parse_dataset(dataset)


def note_fallback(model: "Classifier | Session") -> None:
    """A line on stderr for a graph that runs on the CPU because what "auto" prefers did not load."""
    if reason := getattr(model, "fallback_reason", ""):
        note(f"running on the CPU ({reason})")


def nodes_line(nodes: dict[str, int]) -> str:
    """The number of nodes of a graph that ran on each provider."""
    total = sum(nodes.values())
    return "nodes: " + ", ".join(f"{count} of {total} on {name}" for name, count in nodes.items())
