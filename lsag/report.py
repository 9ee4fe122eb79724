"""Results as pages to look at: one HTML file each, which needs no network.

The pages are in `lsag/report_files`: a frame with the style and what both share, and a body with its script for each.
All that varies, names of classes and files among it, goes in as JSON and is shown as text.
"""

import base64
import html
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lsag.errors import UsageError
from lsag.files import replacing
from lsag.inference.explain import Explanation, explain
from lsag.inference.figures import counts
from lsag.plots import ATTENTION_MAP, shift_colors, strongest_shifts

if TYPE_CHECKING:
    from lsag.inference.evaluate import Evaluation

FILES = Path(__file__).with_name("report_files")
MAX_SHOWN = 100
"""Classes in the confusion matrix of a page; of more, those that are confused most often."""
MISTAKES = 50
THUMBNAIL = 128
"""Pixels of the longer side of an image on a page with many."""
MANY_TIMES = 4.0
"""Multiple of uniform attention that has the strongest colour, at least."""


def write_report(evaluation: "Evaluation", figures: Mapping[str, Any], path: Path) -> None:
    """Write the page of an evaluation, with its `figures` as `lsag eval --json` has them. OutputError if that fails."""
    metrics, classes = evaluation.metrics, evaluation.model.classes
    wrong = (metrics.labels != metrics.predictions).nonzero().flatten()
    errors = torch.cat([metrics.labels[wrong], metrics.predictions[wrong]]).bincount(minlength=len(classes))
    shown = errors.topk(min(MAX_SHOWN, len(classes))).indices.sort().values.tolist()
    place = {index: position for position, index in enumerate(shown)}
    cells = [
        (place[true], place[predicted], count)
        for true, predicted, count in counts(metrics.confusion)
        if true in place and predicted in place
    ]
    mistakes, unexplained = _mistakes(evaluation, wrong)
    data = {
        **{key: value for key, value in figures.items() if not key.startswith("confusion") and key != "per_class"},
        "shown": [classes[index] for index in shown],
        "cells": cells,
        "mistakes": mistakes,
        "unexplained": unexplained,
    }
    title = f"{evaluation.model.preset.name} on {evaluation.dataset}"
    _write("evaluation", data, path, title=title)


def write_explanation(explanation: Explanation, path: Path, *, title: str) -> None:
    """Write the page on which to touch the patches of an image. OutputError if that fails."""
    top = max([MANY_TIMES, *(float(looks.max()) for looks in explanation.looks if looks is not None)])
    data = {
        "title": title,
        "classes": explanation.classes,
        "picture": _image(explanation.pixels),
        "size": len(explanation.pixels),
        "point": explanation.point,
        "shifts": explanation.shifts,
        "colors": _bright(shift_colors(explanation.shifts)).tolist(),
        "heads": len(explanation.local),
        "side": explanation.local.shape[2],
        "local": _bytes(_bright(explanation.local)),
        "map": _attention_colors(),
        "top": top,
        "stages": [
            None
            if attention is None or looks is None
            else {"side": attention.shape[1], "cells": looks.shape[1], "looks": _bytes(_logarithmic(looks, top))}
            for attention, looks in zip(explanation.stages, explanation.looks, strict=True)
        ],
    }
    _write("explanation", data, path, title=title)


def _mistakes(evaluation: "Evaluation", wrong: Tensor) -> tuple[list[dict[str, Any]], str]:
    """The most confident of the `wrong` predictions with pictures, and why nothing more is shown of them, if so."""
    metrics, model, unexplained = evaluation.metrics, evaluation.model, ""
    classes = model.classes
    order = metrics.confidences[wrong].argsort(descending=True, stable=True)
    rows: list[dict[str, Any]] = []
    for index in wrong[order[:MISTAKES]].tolist():
        image = evaluation.source.load(index)[0]
        row = {
            "image": evaluation.images[index],
            "label": classes[metrics.labels[index]],
            "predicted": classes[metrics.predictions[index]],
            "probability": metrics.confidences[index].item(),
            "probability_of_label": metrics.label_probabilities[index].item(),
            "picture": _image(model.transform(image).permute(1, 2, 0).numpy(), THUMBNAIL),
        }
        if not unexplained:
            try:
                row |= _seen(explain(model, image))
            except UsageError as error:
                unexplained = error.what
        rows.append(row)
    return rows, unexplained


def _seen(found: Explanation) -> dict[str, Any]:
    """What is shown of a mistake: the favourite shifts, the strongest of each patch, the attention of all tokens."""
    mean, colors = found.local.mean(dim=0), shift_colors(found.shifts)
    shares = mean.mean(dim=(1, 2))
    return {
        "shifts": [
            (found.shifts[index], shares[index].item(), _bright(colors[index]).tolist())
            for index in shares.argsort(descending=True)[:3]
        ],
        "strongest": _image(_bright(strongest_shifts(mean, colors)).numpy()),
        "looks": [None if looks is None else _image(_colored(looks.mean(dim=0))) for looks in found.looks],
    }


def _bright(shares: Tensor) -> Tensor:
    """Shares from 0 to 1 as bytes."""
    return (255 * shares).round().byte()


def _colored(multiples: Tensor) -> np.ndarray:
    """Multiples of uniform attention (side, side) as colours (side, side, 3)."""
    palette = np.array(_attention_colors(), dtype=np.uint8)
    return palette[_logarithmic(multiples, MANY_TIMES).numpy()]


def _logarithmic(multiples: Tensor, top: float) -> Tensor:
    """Multiples of uniform attention as bytes, from 0 for 1 / `top` to 255 for `top`, on a logarithmic scale."""
    share = multiples.clamp(1 / top, top).log() / math.log(top)
    return ((share + 1) * 127.5).round().byte()


def _attention_colors() -> list[list[int]]:
    """The colours of 256 steps of attention."""
    from matplotlib import colormaps

    return (255 * colormaps[ATTENTION_MAP](np.arange(256))[:, :3]).round().astype(int).tolist()


def _image(pixels: np.ndarray, largest: int | None = None) -> str:
    """Pixels (height, width, 1 or 3) as the address of an image, scaled to at most `largest` pixels."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    if largest:
        image.thumbnail((largest, largest))
    # Photographs take a fifth of a PNG as JPEG, icons and maps are better off exact.
    form = "PNG" if max(image.size) <= 64 else "JPEG"
    file = io.BytesIO()
    image.save(file, format=form, quality=85, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def _write(name: str, data: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Put the body `name` and its data into the frame. Inside a script only "<" could end the JSON."""
    frame, body = ((FILES / f"{part}.html").read_text(encoding="utf-8") for part in ("frame", name))
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    visible = html.escape(title.encode("utf-8", "replace").decode())
    before, after = frame.split("{{body}}")
    opening, closing = body.split("{{data}}")
    with replacing(path) as file:
        file.write("".join([before.replace("{{title}}", visible), opening, text, closing, after]).encode())
