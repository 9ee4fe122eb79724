"""lsag explain"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import InputError, UsageError
from lsag.files import read_bytes
from lsag_cli.options import Force, Json, ModelPrecision, check_options, loading, refuse_existing
from lsag_cli.output import percent, print_json, say, status


def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    at: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Show the attention of the token at this pixel of the cropped image.",
            show_default="the centre",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file to write.", show_default="IMAGE-explained.png")] = None,
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
    out = out or Path(f"{image.stem}-explained.png")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} does not end in .png", "choose a .png file")
    point = None
    if at is not None:
        numbers = at.split(",")
        if len(numbers) != 2 or not all(number.strip().isdecimal() and len(number) < 7 for number in numbers):
            raise UsageError(f"--at {at} is not a point", "for example --at 10,20")
        point = int(numbers[0]), int(numbers[1])
    refuse_existing(out, force, source=image)
    check_options(checkpoint, device="auto", provider=None, precision=precision, profile=False)
    read_bytes(image, what="image", size=0)
    with loading():
        from lsag.checkpoint import load_checkpoint
        from lsag.data.images import open_image
        from lsag.inference.classifier import Classifier
        from lsag.inference.explain import explain as run
        from lsag.plots import draw_explanation

    with status("opening the model"):
        classifier = Classifier(load_checkpoint(checkpoint), precision=precision or "fp32")
    with status("explaining the image"):
        found = run(classifier, open_image(image, classifier.preset.image_mode), point=point)
        draw_explanation(found, out, title=f"{classifier.preset.name}: {image.name}")
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
