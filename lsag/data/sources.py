"""Datasets: decoded images with their labels, from memory, from folders, from CIFAR's files."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision import datasets

from lsag.config import DATASETS, check_dataset
from lsag.data.transforms import upright
from lsag.errors import InputError, UnavailableError, first_line
from lsag.machine import available_cores

MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
PACK_BYTES = 2**29
"""Every rank holds a split in memory if its decoded images take no more than this, or twice this while packing."""
EVAL_FOLDERS = {"imagenet": ("val",), "folder": ("val", "test")}


class Source(Protocol):
    """Decoded images with their labels; `classes[label]` is a label's name."""

    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in messages and tables: its path or its index."""

    def fingerprint(self) -> str:
        """A digest of the images, their labels and their order; of files, only the names are read."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, in mode L or RGB, and its label. InputError for an image that cannot be read."""


class ArraySource:
    """Images held in memory as one uint8 array (N, height, width) or (N, height, width, 3)."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], classes: Sequence[str], mode: str) -> None:
        self.images, self.labels, self.classes = images, list(map(int, labels)), list(classes)
        self.mode = mode

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return _digest(self.images.shape, self.images.tobytes(), self.labels, self.classes)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), self.labels[index]


class FolderSource:
    """Images in one folder per class, classes in alphabetical order; regular image files only."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root, self.mode = root, mode
        try:
            self.classes, _ = datasets.folder.find_classes(root)
        except OSError as error:
            raise InputError(
                f"{root}: {first_line(error)}", "give a folder with one folder of images per class"
            ) from error
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            # Links to folders are not followed: they may form a circle, or count images twice.
            paths = [Path(folder, file) for folder, _, files in os.walk(root / name) for file in files]
            images = sorted(str(path) for path in paths if self._is_image(path))
            if not images:
                raise InputError(f"{root / name} has no images", "remove it, or add images")
            self.samples += [(path, label) for path in images]

    @staticmethod
    def _is_image(path: Path) -> bool:
        return path.suffix.lower() in datasets.folder.IMG_EXTENSIONS and not path.name.startswith(".")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def fingerprint(self) -> str:
        return _digest([(os.path.relpath(path, self.root), label) for path, label in self.samples])

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_image(Path(path), self.mode), label

    def packed(self) -> Source:
        """This source with its images decoded in memory, or itself if they would take more than PACK_BYTES.

        InputError for an image that cannot be read.
        """
        room = PACK_BYTES // 4
        for path, _ in self.samples:
            with suppress(OSError):  # an unreadable image is reported when it is loaded
                room -= Path(path).stat().st_size
            if room < 0:
                return self
        images, used = [], 0
        with ThreadPoolExecutor(available_cores()) as threads:
            for image, _ in threads.map(self.load, range(len(self))):
                images.append(np.asarray(image))
                used += images[-1].nbytes
                if used > PACK_BYTES:
                    threads.shutdown(cancel_futures=True)
                    return self
        return _PackedSource(self, images)


class _PackedSource:
    """The decoded images of a folder in one array, which forked workers share, with the start and shape of each."""

    def __init__(self, source: FolderSource, images: Sequence[np.ndarray]) -> None:
        self.source, self.classes = source, source.classes
        self.labels = [label for _, label in source.samples]
        self.name, self.fingerprint = source.name, source.fingerprint
        self.shapes = np.array([(*image.shape, 1)[:3] for image in images])
        self.starts = np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))])
        self.pixels = np.concatenate([image.reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.pixels[self.starts[index] : self.starts[index + 1]].reshape(self.shapes[index])
        return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), self.labels[index]


def open_image(path: Path, mode: str) -> Image.Image:
    """Decode an image file upright into `mode` ("L" or "RGB"); 16-bit greys are scaled, not clipped.

    InputError for anything that is not a regular file, not an image, damaged, or larger than 50 megapixels.
    """
    try:
        if not path.is_file():
            raise OSError("not a regular file" if path.exists() else "no such file")
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            shorter, longer = sorted(image.size)
            if shorter * longer > MAX_PIXELS or longer > MAX_ASPECT * shorter:
                limits = f"more than {MAX_PIXELS:,} pixels or {MAX_ASPECT} times as long as wide"
                raise OSError(f"{image.width} x {image.height} is {limits}")
            image.load()
            return upright(image, mode=mode)
    except Exception as error:  # decoders raise anything on damaged files
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise InputError(f"cannot read image {path}: {reason}", "repair or remove the file") from error


def open_split(dataset: str, data_dir: Path, *, train: bool, mode: str, download: bool = True) -> Source:
    """One split of `digits`, `cifar10`, `cifar100`, `imagenet` or `folder`, with images in `mode` L or RGB.

    `digits` needs no files. CIFAR is downloaded into `data_dir` if it is missing and `download` is true. `imagenet` and
    `folder` are `data_dir`/train and `data_dir`/val (or test for `folder`), each with one folder per class.
    UsageError for another dataset, InputError for missing or wrong files, UnavailableError for a failed download.
    """
    check_dataset(dataset)
    if dataset == "digits":
        return _digits(train, mode)
    if dataset in ("cifar10", "cifar100"):
        return _cifar(dataset, data_dir, mode, train=train, download=download)
    names = ("train",) if train else EVAL_FOLDERS[dataset]
    root = next((data_dir / name for name in names if (data_dir / name).is_dir()), None)
    if root is None:
        kind = "image folder" if dataset == "folder" else dataset
        expected = " or ".join(f"{data_dir / name}/CLASS/" for name in names)
        raise InputError(f"no {kind} in {data_dir}/: expected {expected}", "set --data-dir or $LSAG_DATA")
    source = FolderSource(root, mode)
    if dataset in DATASETS and len(source.classes) != DATASETS[dataset].num_classes:
        raise InputError(
            f"{root} has {len(source.classes)} class folders, but {dataset} has {DATASETS[dataset].num_classes}",
            "use --dataset folder for other images",
        )
    return source


def _digits(train: bool, mode: str) -> Source:
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


def _cifar(dataset: str, data_dir: Path, mode: str, *, train: bool, download: bool) -> Source:
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


def _digest(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def placeholder_classes(num_classes: int) -> tuple[str, ...]:
    """Class names for a model that came without any."""
    return tuple(f"unnamed class {index}" for index in range(num_classes))


def check_classes(expected: Sequence[str], found: Sequence[str], *, what: str, where: str) -> None:
    """InputError with the first differences unless both have the same classes in the same order.

    For placeholder names only the number of classes is compared.
    """
    if len(expected) != len(found):
        raise InputError(
            f"{what} has {len(expected)} classes, {where} has {len(found)}", "choose data with the same classes"
        )
    if tuple(expected) == placeholder_classes(len(expected)):
        return
    different = [f"{i}: {a!r} against {b!r}" for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if different:
        raise InputError(
            f"the classes of {what} and {where} differ: {', '.join(different[:5])}", "choose data with the same classes"
        )
