"""Images in memory: scikit-learn's digits and CIFAR."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lsag.data.sources import Source, digest
from lsag.errors import InputError, UnavailableError, first_line


class ArraySource:
    """Images held in memory as one uint8 array (N, height, width) or (N, height, width, 3)."""

    notes: tuple[str, ...] = ()
    shards: np.ndarray | None = None

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: Sequence[str], mode: str) -> None:
        self.images, self.labels, self.classes = images, np.asarray(labels, np.int32), list(classes)
        self.mode = mode

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        described = repr(self.images.shape), self.images.tobytes(), repr(self.labels.tolist()), repr(self.classes)
        return digest(described)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.labels[index])


def digits(train: bool, mode: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 in 16 greys; a fixed, stratified fifth is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train_images, eval_images, train_labels, eval_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    classes = [str(name) for name in digits.target_names]
    if train:
        return ArraySource(train_images, train_labels, classes, mode)
    return ArraySource(eval_images, eval_labels, classes, mode)


def cifar(dataset: str, data_dir: Path, mode: str, *, train: bool, download: bool) -> Source:
    from torchvision import datasets

    kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100
    try:
        files = kind(str(data_dir), train=train)
    except RuntimeError as error:
        folder = data_dir / kind.base_folder
        problem = f"{dataset} is damaged in {folder}" if folder.exists() else f"no {dataset} in {folder}"
        if not download:
            raise InputError(problem, "allow the download, or put the extracted archive there") from error
        existed = data_dir.exists()
        try:
            files = kind(str(data_dir), train=train, download=True)
        except Exception as failure:  # urllib, tarfile and torchvision raise their own errors
            if not existed and data_dir.is_dir() and not any(data_dir.iterdir()):
                data_dir.rmdir()
            raise UnavailableError(
                f"{problem}, and it could not be downloaded: {first_line(failure)}",
                f"fetch {kind.url} by hand and extract it into {data_dir}",
            ) from failure
    return ArraySource(files.data, files.targets, files.classes, mode)
