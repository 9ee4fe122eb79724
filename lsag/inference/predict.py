"""The likeliest classes of images."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lsag.config import Preset
from lsag.data.images import open_image
from lsag.data.sources import Source
from lsag.data.transforms import upright
from lsag.errors import InputError, UnreachableError
from lsag.machine import available_cores


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image with their probabilities, best first, or the reason why it is unreadable."""

    image: Path | str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


class Predictor:
    """What takes uint8 images and gives logits: a `Classifier` or a `Session`."""

    preset: Preset
    classes: tuple[str, ...]
    transform: Any
    __call__: Callable[..., Any]

    def predict(self, image: str | Path | Image.Image, *, top_k: int = 5) -> Prediction:
        """The `top_k` likeliest classes of an image file or of a PIL image, of any size and mode.

        InputError if it cannot be read, or if the outputs are not finite. For many images at once, see
        `lsag.inference.predict.predict`.
        """
        mode = self.preset.image_mode
        if isinstance(image, Image.Image):
            name, opened = "image", upright(image, mode=mode)
        else:
            name, opened = str(image), open_image(Path(image), mode)
        logits = self(self.transform(opened)[None])
        return _best(self, name, logits.float().softmax(dim=1).cpu()[0], top_k)


def predict(
    model: Predictor, images: Iterable[Path] | Source, *, top_k: int = 5, batch_size: int = 64
) -> Iterator[Prediction]:
    """Yield the `top_k` likeliest classes of each image, in order; only a few batches are held in memory.

    An image that cannot be read yields a Prediction with its `error`. InputError for outputs that are not finite,
    UnreachableError for a lost connection.
    """
    remaining = _named(images, model.preset.image_mode)

    def load(opened: Callable[[], Image.Image]) -> Tensor | InputError:
        try:
            return model.transform(opened())
        except UnreachableError:
            raise
        except InputError as error:
            return error

    with ThreadPoolExecutor(available_cores()) as threads:

        def start() -> list[tuple[Path | str, Future[Tensor | InputError]]]:
            return [(name, threads.submit(load, opened)) for name, opened in islice(remaining, batch_size)]

        following = start()
        while batch := following:
            following = start()  # decoded while this batch is classified
            loaded = [(name, future.result()) for name, future in batch]
            pixels = [image for _, image in loaded if isinstance(image, Tensor)]
            probabilities = iter(model(torch.stack(pixels)).float().softmax(dim=1).cpu() if pixels else ())
            for name, image in loaded:
                if isinstance(image, InputError):
                    yield Prediction(name, error=image.what.removeprefix(f"cannot read image {name}: "))
                    continue
                yield _best(model, name, next(probabilities), top_k)


def _best(model: Predictor, name: Path | str, probabilities: Tensor, top_k: int) -> Prediction:
    best = probabilities.topk(min(top_k, len(model.classes)))
    if not best.values.isfinite().all():
        raise InputError(f"the model's outputs for {name} are not finite", "train or export it again")
    classes = tuple(model.classes[index] for index in best.indices)
    return Prediction(name, classes, tuple(best.values.tolist()))


def _named(images: Iterable[Path] | Source, mode: str) -> Iterator[tuple[Path | str, Callable[[], Image.Image]]]:
    """The name of each image, and what opens it."""
    if isinstance(images, Iterable):
        return ((path, partial(open_image, path, mode)) for path in images)
    return ((images.name(index), partial(_loaded, images, index)) for index in range(len(images)))


def _loaded(source: Source, index: int) -> Image.Image:
    return source.load(index)[0]
