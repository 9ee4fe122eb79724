"""Options that several commands share."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lsag.config import Preset, parse_overrides
from lsag.distributed.launch import launched
from lsag.errors import OutputError, UsageError
from lsag.presets import load_preset, preset_names
from lsag_cli.output import note

if TYPE_CHECKING:
    from lsag.inference.session import Session


def complete_preset(incomplete: str) -> list[str]:
    return [name for name in preset_names() if name.startswith(incomplete)]


PresetName = Annotated[
    str,
    typer.Option(
        "--preset", help="A preset's name (lsag presets) or a .toml or .json file.", autocompletion=complete_preset
    ),
]
OptionalPreset = Annotated[
    str | None,
    typer.Option("--preset", help="A preset's name or a .toml or .json file.", autocompletion=complete_preset),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the preset; repeatable.")
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="timm:NAME[,KEY=VALUE...]",
        help="Instead of the preset's network one of timm's, under its recipe (docs/baselines.md).",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, imagenet or folder (train/CLASS/*.jpg and val/ or test/).",
        show_default="the preset's",
    ),
]
DataDir = Annotated[Path | None, typer.Option(help="Where the data is.", show_default="$LSAG_DATA, or ./data")]
Device = Annotated[str, typer.Option(help="auto, cuda, mps or cpu.")]
Provider = Annotated[
    Literal["auto", "cpu", "cuda", "tensorrt"] | None,
    typer.Option(
        help="For .onnx graphs: where they run, there or not at all; auto may take the CPU, and says so.",
        show_default="auto",
    ),
]
Profile = Annotated[bool, typer.Option("--profile", help="For .onnx graphs: how many nodes ran on which provider.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that prepare images.", show_default="by the machine")
]
Recompute = Annotated[
    Literal["none", "local", "all"],
    typer.Option(help="Less memory: compute the local block, or all blocks, once more in the backward."),
]
NoDownload = Annotated[bool, typer.Option("--no-download", help="Never fetch a dataset.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While this lasts, SIGINT and SIGTERM end the process with a line and no more: for imports, which take seconds.

    An exception that is raised in the middle of them may end up anywhere.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if not launched():  # the launcher says it
            os.write(2, f"lsag: error: stopped by {signal.Signals(number).name} before it began\n".encode())
        os._exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def data_dir_or_default(data_dir: Path | None) -> Path:
    """The option, else $LSAG_DATA, else ./data."""
    return data_dir or Path(os.environ.get("LSAG_DATA") or "data")


def read_preset(name: str, overrides: list[str] | None, dataset: str | None = None, model: str | None = None) -> Preset:
    """The preset on `dataset` and with `model` for its network, with the `--set` options applied last."""
    if model is not None and not model.startswith("timm:"):
        raise UsageError(f"--model {model} is not timm:NAME", "one of ours is chosen with --preset")
    changes = parse_overrides(overrides or ())
    if model and "model.timm" in changes:
        raise UsageError("--model and --set model.timm name two networks", "give one of them")
    return load_preset(name, changes, dataset=dataset, timm=model.removeprefix("timm:") if model else None)


def refuse_existing(out: Path, force: bool, *, source: Path | None = None, option: str = "--out") -> None:
    """OutputError for a file that must not or cannot be written; also with `force` if it is the `source` itself.

    `option` is the one that names it.
    """
    if source and out.exists() and source.exists() and out.samefile(source):
        raise OutputError(f"{out} is the file that is read", f"choose another {option}")
    if out.exists() and not out.is_file():
        raise OutputError(f"cannot write {out}: it is not a regular file", "choose another name")
    if not force and (out.exists() or out.is_symlink()):
        raise OutputError(f"{out} exists", f"add --force, or choose another {option}")
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: there is no folder {out.parent}", "create the folder first")


def check_provider(model: Path, provider: str | None, profile: bool) -> None:
    """Refuse what the machine or the kind of `model` rules out, before anything slow is imported."""
    if model.suffix != ".onnx" and (provider or profile):
        raise UsageError(f"--{'provider' if provider else 'profile'} is for .onnx graphs", "lsag export CKPT --onnx")
    if model.suffix == ".onnx" and provider in ("cuda", "tensorrt"):
        from lsag.inference.providers import check_driver

        check_driver(provider)


def note_fallback(session: "Session | None") -> None:
    """A line on stderr for a graph that runs on the CPU because CUDA did not load."""
    if session and session.fallback_reason:
        note(f"on the CPU: {session.fallback_reason}")


def nodes_line(session: "Session") -> str:
    """How many nodes of a graph ran on which provider."""
    nodes = session.nodes_by_provider()
    total = sum(nodes.values())
    return "nodes: " + ", ".join(f"{count} of {total} on {name}" for name, count in nodes.items())
