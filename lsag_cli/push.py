"""lsag push"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import UnavailableError, UsageError, first_line
from lsag_cli.options import Json, leaving_at_once
from lsag_cli.output import print_json, say


def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private repository.")] = False,
    as_json: Json = False,
) -> None:
    """Put a model on Hugging Face's hub, for lsag.hub.Classifier.from_pretrained("ORG/NAME")."""
    with leaving_at_once():
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        from lsag.checkpoint import load_checkpoint
        from lsag.hub import Classifier

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository[:80]!r} is no name on the hub: {first_line(error)[:150]}", "ORG/NAME") from error
    model = Classifier.of(load_checkpoint(checkpoint))
    try:
        address = str(model.push_to_hub(repository, private=private or None))
    except Exception as error:  # no login, no network, no such place: of the hub's own types and its HTTP library's
        what = f"{repository} could not be written on the hub: {first_line(error)}"
        raise UnavailableError(what, "see the network, and hf auth login") from error
    if as_json:
        return print_json("push", repository=repository, address=address)
    say(f"{address}")
    say(f"from lsag.hub import Classifier; Classifier.from_pretrained({repository!r})")
