"""Datasets: decoded images with their labels, from memory, from folders, from CIFAR's files."""

import copy
import hashlib
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from lsag.config import DATASETS, check_dataset
from lsag.data.folders import because, image_files, is_folder, listed, walk
from lsag.data.images import REPAIR, open_image
from lsag.errors import InputError, UnavailableError, UsageError, first_line
from lsag.machine import available_cores

PACK_BYTES = 2**29
"""Every rank holds a split in memory if its decoded images take no more than this, or twice this while packing."""
EVAL_FOLDERS = {"imagenet": ("val",), "folder": ("val", "test")}


class Source(Protocol):
    """Decoded images with their labels; `classes[label]` is a label's name. `notes` are for a person to read.

    `shards` is the number of the tar shard that each image lies in, int32 (N,); None for images that lie in none.
    """

    classes: list[str]
    labels: list[int]
    notes: tuple[str, ...]
    shards: np.ndarray | None

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in messages and tables: its path or its index."""

    def fingerprint(self) -> str:
        """A digest of the images, their labels and their order; of files, only the names are read."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, in mode L or RGB, and its label. InputError for an image that cannot be read."""


class ArraySource:
    """Images held in memory as one uint8 array (N, height, width) or (N, height, width, 3)."""

    notes: tuple[str, ...] = ()
    shards: np.ndarray | None = None

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
    """Images in one folder per class, classes in alphabetical order.

    InputError for a folder that cannot be read, no images, and with `complete` for a class without images.
    """

    shards: np.ndarray | None = None

    def __init__(self, root: Path, mode: str, *, complete: bool = True) -> None:
        self.root, self.mode, self.fix = root, mode, REPAIR + (", or train with --skip-broken" if complete else "")
        unused: Counter[str] = Counter()
        _, self.classes, files = next(walk(root, unused))
        unused["in no class folder"] = len(files)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.classes):
            unused_here: Counter[str] = Counter()
            found = sorted(image_files(root / name, unused_here))
            if not found and complete:
                raise InputError(
                    f"{root / name} has no images{because(unused_here)}", "add images, or remove the class everywhere"
                )
            self.paths += found
            self.labels += [label] * len(found)
            unused += unused_here
        if not self.paths:
            raise InputError(
                f"{root} has no images in folders of classes{because(unused)}", "put images into a folder per class"
            )
        self.notes: tuple[str, ...] = (f"not used in {root}: {listed(unused)}",) if unused.total() else ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def fingerprint(self) -> str:
        samples = zip(self.paths, self.labels, strict=True)
        return _digest([(os.path.relpath(path, self.root), label) for path, label in samples])

    def load(self, index: int) -> tuple[Image.Image, int]:
        return open_image(Path(self.paths[index]), self.mode, fix=self.fix), self.labels[index]

    def part(self, held_out: float, *, seed: int, train: bool) -> "FolderSource":
        """This source with only the images to train on, or only the share of each class that is `held_out`.

        An image is held out by its name and the seed, so that few others change sides when images are added.
        InputError for a class of one image.
        """
        kept: list[int] = []
        for label, group in itertools.groupby(range(len(self)), key=self.labels.__getitem__):
            images = sorted(group, key=lambda index: _digest(seed, os.path.relpath(self.paths[index], self.root)))
            if len(images) < 2:
                raise InputError(
                    f"{self.root / self.classes[label]} has one image, which cannot be split", "add images"
                )
            count = min(max(1, round(held_out * len(images))), len(images) - 1)
            kept += sorted(images[count:] if train else images[:count])
        part = copy.copy(self)
        part.paths, part.labels = [self.paths[index] for index in kept], [self.labels[index] for index in kept]
        return part

    def packed(self) -> Source:
        """This source with its images decoded in memory, or itself if they would take more than PACK_BYTES.

        InputError for an image that cannot be read.
        """
        room = PACK_BYTES // 4
        for path in self.paths:
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
        self.source, self.classes, self.labels, self.notes = source, source.classes, source.labels, source.notes
        self.name, self.fingerprint, self.shards = source.name, source.fingerprint, source.shards
        self.shapes = np.array([(*image.shape, 1)[:3] for image in images])
        self.starts = np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))])
        self.pixels = np.concatenate([image.reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.pixels[self.starts[index] : self.starts[index + 1]].reshape(self.shapes[index])
        return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), self.labels[index]


def open_split(
    dataset: str,
    data_dir: Path,
    *,
    train: bool,
    mode: str,
    download: bool = True,
    split: str | None = None,
    val_split: float = 0.0,
    seed: int = 0,
) -> Source:
    """One split of `digits`, `cifar10`, `cifar100`, `imagenet` or `folder`, with images in `mode` L or RGB.

    `digits` needs no files. CIFAR is downloaded into `data_dir` if it is missing and `download` is true. `imagenet` and
    `folder` are `data_dir`/train and `data_dir`/val (or test for `folder`, or what `split` names), each with one folder
    per class; only in train must each of them hold images. With `val_split`, a `folder` has the class folders itself,
    and that share of each class, which `seed` chooses, is the evaluation split.
    UsageError for another dataset, or a `val_split` of what is split already; InputError for missing or wrong files,
    UnavailableError for a failed download.
    """
    check_dataset(dataset)
    if split and dataset not in EVAL_FOLDERS:
        raise UsageError(f"{dataset} has a single evaluation split", "remove --split")
    if dataset == "digits":
        return _digits(train, mode)
    if dataset in ("cifar10", "cifar100"):
        return _cifar(dataset, data_dir, mode, train=train, download=download)
    names = (split,) if split else ("train",) if train else EVAL_FOLDERS[dataset]
    if dataset == "folder" and val_split and not split:
        if not is_folder(data_dir):
            raise InputError(f"no folder {data_dir}/, expected {data_dir}/CLASS/", "set --data-dir or $LSAG_DATA")
        splits = [name for name in ("train", "val", "test") if any(map(Path.is_dir, (data_dir / name).glob("[!.]*")))]
        if not splits:
            return FolderSource(data_dir, mode, complete=train).part(val_split, seed=seed, train=train)
        if train:
            raise UsageError(
                f"--val-split splits a folder of class folders, and {data_dir} has {splits[0]}/CLASS/",
                "--val-split 0, or name the folder that has the class folders with --data-dir",
            )
    found = [data_dir / name for name in names if is_folder(data_dir / name)]
    if not found:
        kind = "image folder" if dataset == "folder" else dataset
        expected = " or ".join(f"{data_dir / name}/CLASS/" for name in names)
        fix = "set --data-dir or $LSAG_DATA"
        if train and dataset == "folder":
            fix += f", or hold out a share of each {data_dir}/CLASS/ with --val-split 0.2"
        raise InputError(f"no {kind} in {data_dir}/: expected {expected}", fix)
    root, *others = found
    source = FolderSource(root, mode, complete=train)
    if dataset in DATASETS and len(source.classes) != DATASETS[dataset].num_classes:
        raise InputError(
            f"{root} has {len(source.classes)} class folders, but {dataset} has {DATASETS[dataset].num_classes}",
            "use --dataset folder for other images",
        )
    source.notes += tuple(f"evaluated on {root}, not on {other}" for other in others)
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


def _digest(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def placeholder_classes(num_classes: int) -> tuple[str, ...]:
    """Class names for a model that came without any."""
    return tuple(f"unnamed class {index}" for index in range(num_classes))


def number_as(classes: Sequence[str], source: Source, *, whose: str, where: str, fix: str) -> None:
    """Number the labels of `source` as in `classes`, by their names; of placeholder names only the number must agree.

    A class without images is no error; InputError for one that is not in `classes`, which are those of `whose`, while
    `source` is called `where`.
    """
    if tuple(classes) == placeholder_classes(len(classes)):
        if len(classes) != len(source.classes):
            raise InputError(f"{whose} has {len(classes)} classes, {where} has {len(source.classes)}", fix)
    else:
        numbers = {name: number for number, name in enumerate(classes)}
        if extra := [name for name in source.classes if name not in numbers]:
            missing = [name for name in classes if name not in source.classes]
            what = f"{whose} does not know {_named(extra)} of {where}"
            what += f", which lacks {_named(missing)}" if missing else ""
            if {unicodedata.normalize("NFC", name) for name in extra}.intersection(
                unicodedata.normalize("NFC", name) for name in missing
            ):
                what += " (names that look alike differ in their Unicode form, NFC or NFD)"
            raise InputError(what, fix)
        source.labels = [numbers[source.classes[label]] for label in source.labels]
    source.classes = list(classes)


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
