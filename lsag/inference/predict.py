"""What a model takes images for."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lsag.data.sources import open_image
from lsag.data.transforms import eval_transform
from lsag.device import available_cores
from lsag.errors import InputError
from lsag.inference.classifier import Opened


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities in 0..1, best first; or why it could not be read."""

    image: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def predict(model: Opened, images: Iterable[Path], *, top_k: int = 5, batch_size: int = 64) -> Iterator[Prediction]:
    """The `top_k` likeliest classes of each image, in order, as they are computed; a few batches are held at a time.

    An image that cannot be read gives a Prediction with its `error`. InputError for outputs that are not finite.
    """
    transform, remaining = eval_transform(model.preset), iter(images)

    def load(path: Path) -> Tensor | InputError:
        try:
            return transform(open_image(path, model.preset.image_mode))
        except InputError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as threads:

        def begin() -> list[tuple[Path, Future[Tensor | InputError]]]:
            return [(path, threads.submit(load, path)) for path in islice(remaining, batch_size)]

        following = begin()
        while batch := following:
            following = begin()  # is decoded while this one is classified
            loaded = [(path, future.result()) for path, future in batch]
            pixels = [image for _, image in loaded if isinstance(image, Tensor)]
            scores = iter(model.classify(torch.stack(pixels)).float().softmax(dim=1).cpu() if pixels else ())
            for path, image in loaded:
                if isinstance(image, InputError):
                    yield Prediction(path, error=image.what.removeprefix(f"cannot read image {path}: "))
                    continue
                best = next(scores).topk(min(top_k, len(model.classes)))
                if not best.values.isfinite().all():
                    raise InputError(f"the model's outputs for {path} are not finite", "train or export it again")
                names = tuple(model.classes[index] for index in best.indices)
                yield Prediction(path, names, tuple(best.values.tolist()))
