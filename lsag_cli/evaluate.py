"""lsag eval"""

import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lsag.errors import OutputError, UsageError
from lsag.files import replacing
from lsag_cli.options import (
    DataDir,
    Dataset,
    Device,
    Force,
    Json,
    NoDownload,
    Profile,
    Provider,
    Workers,
    check_provider,
    data_dir_or_default,
    nodes_line,
    note_fallback,
    refuse_existing,
)
from lsag_cli.output import is_terminal, note, percent, print_json, say, say_table, stderr, table

if TYPE_CHECKING:
    from lsag.inference.evaluate import Evaluation


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or an exported .onnx file.", show_default=False)],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    provider: Provider = None,
    profile: Profile = False,
    batch_size: Annotated[
        int, typer.Option(min=1, max=65_536, help="Images at a time; changes nothing but speed.")
    ] = 256,
    workers: Workers = None,
    no_download: NoDownload = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="The confusion matrix, a PNG.", show_default="beside CHECKPOINT, renewed each time"),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write image, label and prediction to this CSV file.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model: loss, top-1, top-5, accuracy of each class, confusion matrix."""
    for option, path, suffix in (("--plot", plot, ".png"), ("--predictions", predictions, ".csv")):
        if path and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path} does not end in {suffix}", "give a file of that kind")
        if path:
            refuse_existing(path, force, source=checkpoint, option=option)
    check_provider(checkpoint, provider, profile)

    from rich.progress import MofNCompleteColumn, Progress

    from lsag.inference.evaluate import evaluate_file
    from lsag.plots import draw_confusion

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not is_terminal(sys.stderr)) as bar:
        task = bar.add_task("images", total=None)
        result = evaluate_file(
            checkpoint,
            dataset=dataset,
            data_dir=data_dir_or_default(data_dir),
            device=device,
            provider=provider,
            batch_size=batch_size,
            workers=workers,
            download=not no_download,
            on_batch=lambda images: bar.advance(task, images),
        )
    note_fallback(result.session)
    metrics = result.metrics
    plot = plot or checkpoint.with_name(f"{checkpoint.name.replace('.', '-')}-{result.dataset}-confusion.png")
    failure = None
    try:
        if predictions:
            write_predictions(result, predictions)
        title = f"{result.preset.name} on {result.dataset}: {percent(metrics.top1)}"
        draw_confusion(metrics.confusion, result.classes, plot, title=title)
    except OutputError as error:  # the figures are shown all the same
        failure = error
    if as_json:
        per_class = dict(zip(result.classes, metrics.per_class(), strict=True))
        figures = {"images": metrics.count, "loss": metrics.loss, "top1": metrics.top1, "top5": metrics.top5}
        where: dict[str, Any] = {"checkpoint": str(checkpoint), "dataset": result.dataset, "device": result.device}
        counts = {"per_class": per_class, "confusion": metrics.confusion.tolist()}
        if result.session and profile:
            where["nodes"] = result.session.nodes_by_provider()
        files = {"error": {"code": failure.exit_code, "message": str(failure)}} if failure else {"plot": str(plot)}
        print_json("eval", **where, **figures, **counts, **files)
    else:
        show(result)
        if result.session and profile:
            say(nodes_line(result.session))
        if failure is None:
            note(f"confusion matrix: {plot}")
    if failure:
        raise failure


def show(result: "Evaluation") -> None:
    """The figures, and a table of the classes (the twenty worst where there are more than thirty)."""
    metrics = result.metrics
    rows = sorted(
        zip(result.classes, metrics.per_class(), metrics.confusion.sum(dim=1).tolist(), strict=True),
        key=lambda row: (row[1] is None, row[1]),
    )
    many = len(rows) > 30
    shown = table("class", "images", "correct", title=f"the 20 worst of {len(rows)} classes" if many else None)
    order = {name: index for index, name in enumerate(result.classes)}
    for name, share, images in rows[:20] if many else sorted(rows, key=lambda row: order[row[0]]):
        shown.add_row(name, f"{images:,}", percent(share))
    say_table(shown)
    say(f"{result.preset.name} on {result.dataset}, {metrics.count:,} images, {result.device}")
    say(f"top-1 {percent(metrics.top1)}   top-5 {percent(metrics.top5)}   loss {metrics.loss:.4f}")


def write_predictions(result: "Evaluation", path: Path) -> None:
    """One line for each image: its name, its class and the predicted class."""
    labels, predicted = result.metrics.labels.tolist(), result.metrics.predictions.tolist()
    with replacing(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(file)
        writer.writerow(["image", "label", "predicted"])
        for name, label, guess in zip(result.images, labels, predicted, strict=True):
            writer.writerow([name, result.classes[label], result.classes[guess]])
        file.detach()
