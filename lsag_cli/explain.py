"""lsag explain"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import InputError, UsageError
from lsag_cli.options import Force, Json, leaving_at_once, refuse_existing
from lsag_cli.output import percent, print_json, say, visible


def explain(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    image: Annotated[Path, typer.Argument(help="An image file.", show_default=False)],
    at: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="The token whose attention is shown, in pixels of the cropped image.",
            show_default="the middle",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The picture, a PNG.", show_default="IMAGE-explained.png")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw what a model does with an image: the shifts it chose, how surely, and where it looks in each stage."""
    if checkpoint.suffix == ".onnx":
        raise InputError(f"{checkpoint} is a graph, which shows no attention", "give the checkpoint it was made of")
    out = out or Path(f"{image.stem}-explained.png")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} does not end in .png", "give a file of that kind")
    point = None
    if at is not None:
        numbers = at.split(",")
        if len(numbers) != 2 or not all(number.strip().isdecimal() and len(number) < 7 for number in numbers):
            raise UsageError(f"--at {at} is no point", "for example --at 10,20")
        point = int(numbers[0]), int(numbers[1])
    refuse_existing(out, force, source=image)
    with leaving_at_once():
        from lsag.checkpoint import load_checkpoint
        from lsag.data.sources import open_image
        from lsag.inference.explain import explain as run
        from lsag.plots import draw_explanation

    loaded = load_checkpoint(checkpoint)
    found = run(loaded, open_image(image, loaded.preset.image_mode), point=point)
    draw_explanation(found, out, title=f"{loaded.preset.name}: {image.name}")
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
    say(", ".join(f"{visible(name)} {percent(share)}" for name, share in found.classes))
    say(f"drawn: {visible(str(out))}")
