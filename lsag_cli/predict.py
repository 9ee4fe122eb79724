"""lsag predict"""

import csv
import glob
import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from lsag.data.folders import because, image_files, is_folder, listed, matching
from lsag.errors import InputError, UsageError
from lsag.files import replacing
from lsag_cli.display import counted
from lsag_cli.options import (
    BatchSize,
    DataDir,
    Device,
    Force,
    Json,
    ModelPrecision,
    Profile,
    Provider,
    Split,
    check_options,
    check_source,
    loading,
    nodes_line,
    note_fallback,
    refuse_existing,
)
from lsag_cli.output import is_terminal, note, percent, print_json, say, say_table, status, stderr

if TYPE_CHECKING:
    from lsag.inference.predict import Prediction
    from lsag.inference.session import Session


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, an exported .onnx graph, or a preset with trained weights.", show_default=False
        ),
    ],
    images: Annotated[
        list[str] | None, typer.Argument(help="Image files, folders or glob patterns.", show_default=False)
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="In place of files: a dataset, as for lsag eval.")] = None,
    data_dir: DataDir = None,
    split: Split = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to show per image.")] = 5,
    device: Device = "auto",
    provider: Provider = None,
    precision: ModelPrecision = None,
    profile: Profile = False,
    batch_size: BatchSize = 64,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write a CSV file instead of a table.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Classify images. Unreadable images are listed with the reason."""
    if csv_file and csv_file.suffix.lower() != ".csv":
        raise UsageError(f"--csv {csv_file} does not end in .csv", "choose a .csv file")
    if csv_file:
        refuse_existing(csv_file, force, source=model, option="--csv")
    check_source(images, dataset, data_dir, split)
    check_options(model, device=device, provider=provider, precision=precision, profile=profile)
    with loading():
        unused: Counter[str] = Counter()
        paths = list(find_images(images or (), unused))
        from rich.progress import MofNCompleteColumn, Progress

        from lsag.data.splits import open_for
        from lsag.inference.classifier import open_model
        from lsag.inference.predict import predict as run

    with status("opening the model"):
        classifier = open_model(model, device=device, provider=provider, precision=precision)
    note_fallback(classifier)
    source = open_for(classifier.preset, dataset, data_dir, split=split) if dataset else paths
    for line in getattr(source, "notes", ()):
        note(line)
    found: list[Prediction] = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not is_terminal(sys.stderr)) as bar:
        for prediction in bar.track(
            run(classifier, source, top_k=top_k, batch_size=batch_size), total=len(source), description="images"
        ):
            found.append(prediction)
    broken = sum(bool(prediction.error) for prediction in found)
    if broken == len(found):
        raise InputError(f"no image could be read; the first: {found[0].image}: {found[0].error}", "check the files")
    if csv_file:
        write_csv(found, csv_file, columns=min(top_k, len(classifier.classes)))
    nodes = cast("Session", classifier).nodes_by_provider() if profile else None
    if unused.total():
        note(f"not used: {listed(unused)}")
    if as_json:
        rows = [
            {"image": str(one.image), "error": one.error}
            if one.error
            else {"image": str(one.image), "classes": one.classes, "probabilities": one.probabilities}
            for one in found
        ]
        profiled = {"nodes": nodes} if nodes else {}
        return print_json("predict", model=str(model), device=classifier.device_name, predictions=rows, **profiled)
    if not csv_file:
        show(found)
    say(f"{counted(len(found) - broken, 'image')}, {classifier.device_name}{f'; {csv_file}' if csv_file else ''}")
    if nodes:
        say(nodes_line(nodes))
    if broken:
        note(f"{broken:,} of {len(found):,} images could not be read")


def find_images(given: Sequence[str], unused: Counter[str]) -> Iterator[Path]:
    """The named files, the images below folders in order, and the matches of patterns. InputError if there are none.

    What is passed over is counted in `unused`.
    """
    names: Iterator[str]
    for name in given:
        if is_folder(Path(name)):
            names = image_files(name, unused)
        elif glob.has_magic(name) and not Path(name).exists():
            names = matching(name, unused)
        else:
            names = iter([name])
        first = next(names, None)
        if first is None:
            raise InputError(f"there are no images in {name}{because(unused)}", "give image files, folders or patterns")
        yield Path(first)
        yield from map(Path, names)


def show(found: "Sequence[Prediction]") -> None:
    """Print a row for each image: its likeliest class, then the runners-up."""
    most = max(len(one.classes) for one in found)
    runners_up = [f"runner-up {rank}" if most > 2 else "runner-up" for rank in range(1, most)]
    rows = []
    for one in found:
        pairs = [(name, percent(share)) for name, share in zip(one.classes, one.probabilities, strict=True)]
        best = pairs[0] if pairs else (f"({one.error})", "-")
        others = [" ".join(pair) for pair in pairs[1:]]
        rows.append((str(one.image), *best, *others, *[""] * (most - 1 - len(others if pairs else []))))
    say_table(("image", "class", "probability", *runners_up), rows, drop=runners_up[::-1])


def write_csv(found: "Sequence[Prediction]", path: Path, *, columns: int) -> None:
    """Write a line for each image: its name, why it is unreadable if it is, and class and probability by rank."""
    with replacing(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(file)
        ranks = [f"{name}_{rank}" for rank in range(1, columns + 1) for name in ("class", "probability")]
        writer.writerow(["image", "error", *ranks])
        for one in found:
            pairs = zip(one.classes, one.probabilities, strict=True)
            values = [value for pair in pairs for value in pair] or [""] * len(ranks)
            writer.writerow([one.image, one.error, *values])
        file.detach()
