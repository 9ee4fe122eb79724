"""The likeliest classes of image files."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsag.data.images import open_image
from lsag.errors import InputError
from lsag.inference.classifier import Classifier
from lsag.machine import available_cores

if TYPE_CHECKING:
    from lsag.inference.session import Session


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities, best first, or the reason why it is unreadable."""

    image: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def predict(
    model: "Classifier | Session", images: Iterable[Path], *, top_k: int = 5, batch_size: int = 64
) -> Iterator[Prediction]:
    """Yield the `top_k` likeliest classes of each image, in order; only a few batches are held in memory.

    An image that cannot be read yields a Prediction with its `error`. InputError for outputs that are not finite.
    """
    remaining = iter(images)

    def load(path: Path) -> Tensor | InputError:
        try:
            return model.transform(open_image(path, model.preset.image_mode))
        except InputError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as threads:

        def start() -> list[tuple[Path, Future[Tensor | InputError]]]:
            return [(path, threads.submit(load, path)) for path in islice(remaining, batch_size)]

        following = start()
        while batch := following:
            following = start()  # decoded while this batch is classified
            loaded = [(path, future.result()) for path, future in batch]
            pixels = [image for _, image in loaded if isinstance(image, Tensor)]
            probabilities = iter(model(torch.stack(pixels)).float().softmax(dim=1).cpu() if pixels else ())
            for path, image in loaded:
                if isinstance(image, InputError):
                    yield Prediction(path, error=image.what.removeprefix(f"cannot read image {path}: "))
                    continue
                best = next(probabilities).topk(min(top_k, len(model.classes)))
                if not best.values.isfinite().all():
                    raise InputError(f"the model's outputs for {path} are not finite", "train or export it again")
                names = tuple(model.classes[index] for index in best.indices)
                yield Prediction(path, names, tuple(best.values.tolist()))
