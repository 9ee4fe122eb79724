"""lsag explain"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import InputError, UsageError
from lsag.files import read_bytes
from lsag_cli.options import (
    DataDir,
    Force,
    Json,
    ModelPrecision,
    Split,
    check_options,
    check_source,
    loading,
    refuse_existing,
)
from lsag_cli.output import percent, print_json, say, status


def explain(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a preset with trained weights.", show_default=False)
    ],
    image: Annotated[Path | None, typer.Argument(help="An image file.", show_default=False)] = None,
    dataset: Annotated[str | None, typer.Option(help="In place of a file: a dataset, as for lsag eval.")] = None,
    index: Annotated[
        int | None,
        typer.Option(min=0, help="With --dataset: the number of the image in its split.", show_default="0, the first"),
    ] = None,
    data_dir: DataDir = None,
    split: Split = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Show the attention of the token at this pixel of the cropped image.",
            show_default="the centre",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG or HTML file to write.", show_default="IMAGE-explained.png, or .html")
    ] = None,
    as_html: Annotated[
        bool, typer.Option("--html", help="Write a page to touch: what each patch chose, and where it looks.")
    ] = False,
    precision: ModelPrecision = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw what a model sees in an image: the shifts it chose, how certainly, and where it looks in each stage."""
    if checkpoint.suffix == ".onnx":
        read_bytes(checkpoint, what="graph", size=0)
        raise InputError(
            f"{checkpoint} is a graph, which shows no attention", "use the checkpoint it was exported from"
        )
    check_source(image, dataset, data_dir, split, index)
    index = index or 0
    name = image.stem if image else f"{(dataset or '').partition(':')[0]}-{index}"
    suffix = ".html" if as_html else ".png"
    out = out or Path(f"{name}-explained{suffix}")
    if out.suffix.lower() != suffix:
        other = "" if as_html else ", or add --html for a page"
        raise UsageError(f"--out {out} does not end in {suffix}", f"choose a {suffix} file{other}")
    point = None
    if at is not None:
        numbers = at.split(",")
        if len(numbers) != 2 or not all(number.strip().isdecimal() and len(number) < 7 for number in numbers):
            raise UsageError(f"--at {at} is not a point", "for example --at 10,20")
        point = int(numbers[0]), int(numbers[1])
    refuse_existing(out, force, source=image)
    check_options(checkpoint, device="auto", provider=None, precision=precision, profile=False)
    if image:
        read_bytes(image, what="image", size=0)
    with loading():
        from lsag.checkpoint import load_checkpoint
        from lsag.data.images import open_image
        from lsag.data.splits import open_for
        from lsag.inference.classifier import Classifier
        from lsag.inference.explain import explain as run
        from lsag.plots import draw_explanation
        from lsag.report import write_explanation

    with status("opening the model"):
        classifier = Classifier(load_checkpoint(checkpoint), precision=precision or "fp32")
    with status("explaining the image"):
        if image:
            shown, pixels = image.name, open_image(image, classifier.preset.image_mode)
        else:
            source = open_for(classifier.preset, dataset, data_dir, split=split)
            if index >= len(source):
                raise UsageError(f"--index {index} is beyond the {len(source):,} images", "the first is --index 0")
            shown, pixels = source.name(index), source.load(index)[0]
        found = run(classifier, pixels, point=point)
        write = write_explanation if as_html else draw_explanation
        write(found, out, title=f"{classifier.preset.name}: {shown}")
    if as_json:
        shares = [
            [*shift, share] for shift, share in zip(found.shifts, found.local.mean(dim=(0, 2, 3)).tolist(), strict=True)
        ]
        print_json(
            "explain",
            picture=str(out),
            classes=found.classes,
            shifts=shares,
            entropy_bits=found.entropy.mean().item(),
        )
        return
    say(", ".join(f"{name} {percent(share)}" for name, share in found.classes))
    say(f"wrote {out}")
