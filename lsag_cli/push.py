"""lsag push"""

from pathlib import Path
from typing import Annotated

import typer

from lsag.errors import UnavailableError, UsageError, first_line
from lsag.files import read_bytes
from lsag.weights import model_file
from lsag_cli.options import Json, loading
from lsag_cli.output import print_json, say, status


def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a model to Hugging Face's hub, for lsag.hub.Classifier.from_pretrained("ORG/NAME")."""
    with loading("loading huggingface_hub"):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(
            f"{repository[:80]!r} is not a name on the hub: {first_line(error)[:150]}", "use ORG/NAME"
        ) from error
    read_bytes(model_file(checkpoint), what="checkpoint", size=0)
    with loading():
        from lsag.checkpoint import load_checkpoint
        from lsag.hub import Classifier

    with status("opening the model"):
        model = Classifier.of(load_checkpoint(checkpoint))
    try:
        with status("uploading"):
            address = str(model.push_to_hub(repository, private=private or None))
    except Exception as error:  # no login, no network, no such place: types of the hub's and of its HTTP library
        what = f"{repository} could not be written on the hub: {first_line(error)}"
        raise UnavailableError(what, "check the network, and hf auth login") from error
    if as_json:
        return print_json("push", repository=repository, address=address)
    say(address)
    say(f"from lsag.hub import Classifier; Classifier.from_pretrained({repository!r})")
