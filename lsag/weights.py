"""Trained weights that come with the package, by the name of their preset. No torch here."""

import os
import tomllib
from datetime import date
from pathlib import Path

from lsag.config import Frozen, did_you_mean
from lsag.errors import InputError
from lsag.presets import preset_names

FILES = Path(__file__).parent / "weight_files"


class Card(Frozen):
    """What is known of trained weights: the TOML file beside them."""

    data: str
    """The training images."""
    recipe: tuple[str, ...]
    """The commands, one after the other."""
    top1: float
    """The share of `evaluated_on` that is classified correctly."""
    evaluated_on: str
    selection: str
    """How these weights were chosen among those of the training."""
    trained_on: str
    """The machine."""
    date: date
    licence: str
    digest: str
    """`weights_digest` of the weights and their description."""


def cards() -> dict[str, Card]:
    """The cards of all trained weights, by the names of their presets."""
    return {path.stem: Card(**tomllib.loads(path.read_text("utf-8"))) for path in sorted(FILES.glob("*.toml"))}


def card_of(file: Path) -> Card | None:
    """The card of a file that comes with the package; None for any other file."""
    return cards().get(file.stem) if file.parent == FILES else None


def model_file(model: str | Path) -> Path:
    """The file of a model: its path, or that of the weights of this name if there is nothing at the path.

    InputError for the name of a preset that has no weights, and for a name that is no preset's either.
    """
    path = Path(model)
    if path.suffix or path.parent != Path() or os.path.lexists(path):
        return path
    file = FILES / f"{path}.safetensors"
    if file.is_file():
        return file
    trained = [path.stem for path in sorted(FILES.glob("*.safetensors"))]
    if str(path) in preset_names():
        raise InputError(
            f"no trained weights of {path} come with lsag, because its training takes a GPU",
            f"train it: lsag train --preset {path}, or convert the authors' file: lsag convert FILE --preset {path}",
        )
    raise InputError(
        f"there is no file '{path}', and no trained weights of that name{did_you_mean(str(path), trained)}",
        f"give a file, or one of: {', '.join(trained)}",
    )
