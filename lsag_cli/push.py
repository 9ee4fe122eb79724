"""lsag push"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import UnavailableError, first_line
from lsag_cli.options import Json, leaving_at_once
from lsag_cli.output import print_json, say


def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="If it is made: for its owners only.")] = False,
    as_json: Json = False,
) -> None:
    """Put a model on Hugging Face's hub, for lsag.hub.Classifier.from_pretrained("ORG/NAME")."""
    with leaving_at_once():
        from lsag.checkpoint import load_checkpoint
        from lsag.hub import Classifier

    model = Classifier.of(load_checkpoint(checkpoint))
    try:
        address = str(model.push_to_hub(repository, private=private or None))
    except Exception as error:  # no login, no network, no such place: of the hub's own types and its HTTP library's
        what = f"{repository} could not be written on the hub: {first_line(error)}"
        raise UnavailableError(what, "hf auth login, and see its name") from error
    if as_json:
        return print_json("push", repository=repository, address=address)
    say(f"{address}")
    say(f"from lsag.hub import Classifier; Classifier.from_pretrained({repository!r})")
