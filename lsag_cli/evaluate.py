"""lsag eval"""

import csv
import io
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lsag.config import parse_dataset
from lsag.errors import OutputError, UsageError
from lsag.files import replacing
from lsag_cli.options import (
    BatchSize,
    DataDir,
    Dataset,
    Device,
    Json,
    ModelPrecision,
    NoDownload,
    Profile,
    Provider,
    Split,
    Workers,
    check_options,
    loading,
    nodes_line,
    note_fallback,
    refuse_existing,
)
from lsag_cli.output import is_terminal, note, percent, print_json, say, say_table, status, stderr

if TYPE_CHECKING:
    from lsag.inference.evaluate import Evaluation
    from lsag.inference.session import Session


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, an exported .onnx graph, or a preset with trained weights.", show_default=False
        ),
    ],
    dataset: Dataset = None,
    data_dir: DataDir = None,
    split: Split = None,
    device: Device = "auto",
    provider: Provider = None,
    precision: ModelPrecision = None,
    profile: Profile = False,
    batch_size: BatchSize = 256,
    workers: Workers = None,
    no_download: NoDownload = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG file of the confusion matrix.", show_default="beside CHECKPOINT, overwritten"),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="CSV file of each image's label and prediction, with their probabilities.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="HTML file to look at: classes, confusions, calibration, the most confident mistakes."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the files of --plot, --predictions and --report.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model: loss, top-1, top-5, per-class accuracy, confusion matrix."""
    asked = (("--plot", plot, ".png"), ("--predictions", predictions, ".csv"), ("--report", report, ".html"))
    for option, path, suffix in asked:
        if path and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path} does not end in {suffix}", f"choose a {suffix} file")
        if path:
            refuse_existing(path, force, source=checkpoint, option=option)
    check_options(checkpoint, device=device, provider=provider, precision=precision, profile=profile)
    if dataset is not None:
        parse_dataset(dataset)
    with loading():
        from rich.progress import MofNCompleteColumn, Progress

        from lsag.inference.evaluate import evaluate_file
        from lsag.inference.figures import figures
        from lsag.report import write_report

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not is_terminal(sys.stderr)) as bar:
        task = bar.add_task("images", total=None, visible=False)
        result = evaluate_file(
            checkpoint,
            dataset=dataset,
            data_dir=data_dir,
            split=split,
            device=device,
            provider=provider,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            download=not no_download,
            on_batch=lambda images, of: bar.update(task, advance=images, total=of, visible=True),
        )
    model = result.model
    note_fallback(model)
    for line in result.notes:
        note(line)
    nodes = cast("Session", model).nodes_by_provider() if profile else None
    answer: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "preset": model.preset.name,
        "dataset": result.dataset,
        **({"folder": str(result.folder)} if result.folder else {}),
        "device": model.device_name,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **figures(result),
    }
    files: dict[str, str | None] = {"plot": None, "predictions": None, "report": None}
    failure = None
    try:
        if predictions:
            write_predictions(result, predictions)
            files["predictions"] = str(predictions)
        if report:
            with status("writing the report"):
                write_report(result, answer, report)
            files["report"] = str(report)
        files["plot"] = draw(result, plot, checkpoint)
    except OutputError as error:  # raised after the figures are shown
        failure = error
    if as_json:
        profiled: dict[str, Any] = {"nodes": nodes} if nodes else {}
        failed = {"error": {"code": failure.exit_code, "message": str(failure)}} if failure else {}
        print_json("eval", **answer, **profiled, **files, **failed)
    else:
        show(result)
        if nodes:
            say(nodes_line(nodes))
        for name, written in files.items():
            if written:
                note(f"{'confusion matrix' if name == 'plot' else name}: {written}")
    if failure:
        raise failure


def draw(result: "Evaluation", plot: Path | None, checkpoint: Path) -> str | None:
    """Draw the confusion matrix into `plot`, else beside the checkpoint; where that cannot be written, None and a note.

    OutputError if `plot` cannot be written.
    """
    from lsag.plots import draw_confusion

    dataset = re.sub(r"[^\w.=-]+", "-", result.dataset)[-60:].strip("-")  # may name a path or a URL
    path = plot or checkpoint.with_name(f"{checkpoint.name.replace('.', '-')}-{dataset}-confusion.png")
    title = f"{result.model.preset.name} on {result.dataset}: {percent(result.metrics.top1)}"
    try:
        draw_confusion(result.metrics.confusion, result.model.classes, path, title=title)
    except OutputError as error:
        if plot:
            raise
        note(f"no picture of the confusion matrix: {error.what}")
        return None
    return str(path)


def show(result: "Evaluation") -> None:
    """Print the figures, and a table of the classes (of more than thirty only the twenty worst)."""
    metrics, classes = result.metrics, result.model.classes
    rows = sorted(
        zip(classes, metrics.per_class(), metrics.images_per_class(), strict=True),
        key=lambda row: (row[1] is None, row[1]),
    )
    many = len(rows) > 30
    order = {name: index for index, name in enumerate(classes)}
    shown = rows[:20] if many else sorted(rows, key=lambda row: order[row[0]])
    say_table(
        ("class", "images", "correct"),
        [(name, f"{images:,}", percent(share)) for name, share, images in shown],
        title=f"the 20 worst of {len(rows)} classes" if many else None,
    )
    where = f"{result.dataset} ({result.folder})" if result.folder else result.dataset
    say(f"{result.model.preset.name} on {where}, {metrics.count:,} images, {result.model.device_name}")
    say(f"top-1 {percent(metrics.top1)}   top-5 {percent(metrics.top5)}   loss {metrics.loss:.4f}")


def write_predictions(result: "Evaluation", path: Path) -> None:
    """Write a line for each image: its name, its label, the predicted class, and the probabilities of both."""
    classes, metrics = result.model.classes, result.metrics
    columns = (metrics.labels, metrics.predictions, metrics.confidences, metrics.label_probabilities)
    rows = zip(result.images, *(column.tolist() for column in columns), strict=True)
    with replacing(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(file)
        writer.writerow(["image", "label", "predicted", "probability", "probability_of_label"])
        for name, label, prediction, *probabilities in rows:
            writer.writerow([name, classes[label], classes[prediction], *probabilities])
        file.detach()
