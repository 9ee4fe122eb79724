"""Datasets and loaders. Augmentation is timm's; what is random depends on (seed, epoch, image) and on nothing else."""

import hashlib
import os
import random
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets, transforms

from lsag.config import DATASETS, DataConfig, Preset, did_you_mean
from lsag.device import available_cores
from lsag.errors import InputError, UnavailableError, UsageError, WorkerError, first_line

MAX_PIXELS = 50_000_000
MAX_ASPECT = 200
PACK_BYTES = 2**29
"""A split whose decoded images take at most so much is held in memory by each rank, and twice while it is packed."""
WORKER_TIMEOUT = 120
"""Seconds that workers may take for a batch."""
EVAL_FOLDERS = {"imagenet": ("val",), "folder": ("val", "test")}
Item = tuple[Tensor, int] | InputError


class Source(Protocol):
    """Decoded images with their labels; `classes[label]` is a label's name."""

    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message or a table: its path, or its position."""

    def fingerprint(self) -> str:
        """A digest that other images, labels or another order would change; of files, their names count."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, in mode L or RGB, and its label. InputError for one that cannot be read."""


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
    """Images in one folder for each class, classes in alphabetical order; regular image files only."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root, self.mode = root, mode
        try:
            self.classes, _ = datasets.folder.find_classes(root)
        except OSError as error:
            raise InputError(
                f"{root}: {first_line(error)}", "give a folder with a folder of images for each class"
            ) from error
        self.samples: list[tuple[str, int]] = []
        for label, name in enumerate(self.classes):
            # Links to folders are not followed: they may lead in circles, or count images twice.
            paths = [Path(folder, file) for folder, _, files in os.walk(root / name) for file in files]
            images = sorted(str(path) for path in paths if self._is_image(path))
            if not images:
                raise InputError(f"{root / name} holds no images", "remove it, or put images into it")
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
        """The same source with its images decoded in memory, or itself where they would take more than PACK_BYTES.

        InputError for an image that cannot be read.
        """
        room = PACK_BYTES // 4
        for path, _ in self.samples:
            with suppress(OSError):  # what cannot be read is told when it is
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
    """The decoded images of a folder in one array, which forked workers share, each with its place and shape in it."""

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

    InputError for what is no regular file, no image, damaged, or larger than 50 megapixels.
    """
    try:
        if not path.is_file():
            raise OSError("not a regular file")
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            shorter, longer = sorted(image.size)
            if shorter * longer > MAX_PIXELS or longer > MAX_ASPECT * shorter:
                limits = f"more than {MAX_PIXELS:,} pixels or {MAX_ASPECT} times as long as wide"
                raise OSError(f"{image.width} x {image.height} is {limits}")
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F":
                raise OSError("floating-point pixels have no agreed range")
            if upright.mode.startswith("I"):
                upright = Image.fromarray((np.asarray(upright).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
            return upright.convert(mode)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise InputError(f"cannot read image {path}: {reason}", "repair or remove the file") from error


def open_split(dataset: str, data_dir: Path, *, train: bool, in_channels: int, download: bool = True) -> Source:
    """One split of a dataset: `digits`, `cifar10`, `cifar100`, `imagenet` or `folder`.

    `digits` needs no files; CIFAR is downloaded into `data_dir` where it is absent and `download` allows;
    `imagenet` and `folder` are `data_dir`/train and `data_dir`/val (or test), each with one folder per class.
    """
    mode = "L" if in_channels == 1 else "RGB"
    if dataset == "digits":
        return _digits(train, mode)
    if dataset in ("cifar10", "cifar100"):
        return _cifar(dataset, data_dir, mode, train=train, download=download)
    if dataset not in EVAL_FOLDERS:
        known = [*DATASETS, "folder"]
        raise UsageError(
            f"unknown dataset '{dataset}'{did_you_mean(dataset, known)}", f"use one of: {', '.join(known)}"
        )
    names = ("train",) if train else EVAL_FOLDERS[dataset]
    root = next((data_dir / name for name in names if (data_dir / name).is_dir()), None)
    if root is None:
        wanted = " or ".join(f"{data_dir / name}" for name in names)
        raise InputError(
            f"{dataset} is not at {data_dir}: there is no {wanted}", "point --data-dir or $LSAG_DATA at it"
        )
    source = FolderSource(root, mode)
    if dataset in DATASETS and len(source.classes) != DATASETS[dataset].num_classes:
        raise InputError(
            f"{root} has {len(source.classes)} class folders, {dataset} has {DATASETS[dataset].num_classes}",
            "use --dataset folder for other images",
        )
    return source


def _digits(train: bool, mode: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, 16 greys; a fixed, stratified fifth is held out."""
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
        found = data_dir / kind.base_folder
        state = "is damaged at" if found.exists() else "is not at"
        if not download:
            raise InputError(
                f"{dataset} {state} {found}", "allow the download, or put the extracted archive there"
            ) from error
        existed = data_dir.exists()
        try:
            files = kind(str(data_dir), train=train, download=True)
        except Exception as failure:  # urllib, tarfile and torchvision each raise their own
            if not existed and data_dir.is_dir() and not any(data_dir.iterdir()):
                data_dir.rmdir()
            raise UnavailableError(
                f"{dataset} {state} {found} and could not be downloaded: {first_line(failure)}",
                f"fetch {kind.url} by hand and extract it into {data_dir}",
            ) from failure
    return ArraySource(files.data, files.targets, files.classes, mode)


def _digest(*parts: object) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def unnamed_classes(count: int) -> tuple[str, ...]:
    """Names for the classes of a model that came without any."""
    return tuple(f"unnamed class {index}" for index in range(count))


def check_classes(expected: Sequence[str], found: Sequence[str], *, what: str, where: str) -> None:
    """InputError with the first differences unless both name the same classes in the same order.

    Of unnamed classes only the number counts.
    """
    if len(expected) != len(found):
        raise InputError(
            f"{what} has {len(expected)} classes, {where} has {len(found)}", "choose data of the same classes"
        )
    if tuple(expected) == unnamed_classes(len(expected)):
        return
    different = [f"{i}: {a!r} against {b!r}" for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    if different:
        raise InputError(
            f"classes of {what} and of {where} differ: {', '.join(different[:5])}", "choose data of the same classes"
        )


def random_key(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, such as (seed, "augment", epoch, image)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class TrainSet(Dataset[Item]):
    """Augmented images; an index is (epoch, image), and gives the same pixels in any worker, in any order."""

    def __init__(self, source: Source, preset: Preset) -> None:
        self.source, self.seed = source, preset.train.seed
        self.transform = train_transform(preset)

    def __getitem__(self, position: tuple[int, int]) -> Item:
        key = random_key(self.seed, "augment", *position)
        # The generators that timm's and torchvision's transforms draw from.
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key)
        try:
            image, label = self.source.load(position[1])
        except InputError as error:
            return error  # raised in a worker it would arrive as a traceback
        return self.transform(image), label


class EvalSet(Dataset[Item]):
    """Images as uint8 tensors (C, image_size, image_size), resized and centre-cropped."""

    def __init__(self, source: Source, preset: Preset) -> None:
        self.source, self.transform = source, eval_transform(preset)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        try:
            image, label = self.source.load(index)
        except InputError as error:
            return error
        return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The slices of an epoch's batches that one rank takes, as (epoch, image) pairs in random order.

    Each batch is cut into size x accum slices, of which rank r takes those from r x accum on. So 8 ranks, and one rank
    that accumulates 8 slices, see the same slices. What does not fill a batch is dropped. `epoch` and `first_step`
    are set before an epoch is read.
    """

    def __init__(self, num_images: int, preset: Preset, *, rank: int = 0, size: int = 1, accum: int = 1) -> None:
        self.num_images, self.batch_size, self.seed = num_images, preset.train.batch_size, preset.train.seed
        self.slice_size = preset.slice_size(size * accum)
        self.slices = range(rank * accum, (rank + 1) * accum)
        self.num_steps = num_images // self.batch_size
        self.epoch = self.first_step = 0
        if self.num_steps == 0:
            raise UsageError(
                f"{num_images} training images do not fill one batch of {self.batch_size}", "--set train.batch_size=..."
            )

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(random_key(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for step in range(self.first_step, self.num_steps):
            for index in self.slices:
                start = step * self.batch_size + index * self.slice_size
                yield [(self.epoch, image) for image in order[start : start + self.slice_size]]


def train_transform(preset: Preset) -> Any:
    """timm's training transform with the preset's augmentation: PIL image -> normalised float (C, size, size)."""
    data, augment, size = preset.data, preset.augment, preset.model.image_size
    transform = create_transform(
        size,
        is_training=True,
        hflip=augment.hflip,
        color_jitter=None,  # type: ignore[arg-type]  # as in DeiT, where RandAugment switches it off
        auto_augment=augment.rand_augment,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=augment.random_erasing,
        re_mode="pixel",
    )
    if data.train_crop == "padded":
        transform.transforms[0] = transforms.Compose(
            [_resize(size, data), transforms.RandomCrop(size, padding=data.crop_padding)]
        )
    return transform


def eval_transform(preset: Preset) -> Any:
    """PIL image -> uint8 tensor (C, size, size): shorter side to `eval_resize`, centre crop."""
    size = preset.model.image_size
    return transforms.Compose(
        [_resize(preset.data.eval_resize or size, preset.data), transforms.CenterCrop(size), transforms.PILToTensor()]
    )


def _resize(size: int, data: DataConfig) -> transforms.Resize:
    return transforms.Resize(size, transforms.InterpolationMode(data.interpolation))


class Normalize(nn.Module):
    """uint8 pixels (B, C, height, width) -> floats, scaled to 0..1 and normalised per channel."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.scale: Tensor
        self.offset: Tensor
        mean, std = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.scale.dtype) * self.scale + self.offset


def choose_workers(num_images: int, *, processes: int = 1) -> int:
    """Workers that prepare images for each of `processes` that train on this machine.

    None where starting them costs more than they save, else one per core, up to 8.
    """
    return 0 if num_images < 5_000 else min(8, max(1, available_cores() // processes))


def train_loader(
    source: Source, preset: Preset, order: EpochBatches, *, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Batches of (images, labels) as `order` has them; to be read through `batches`."""
    return DataLoader(
        TrainSet(source, preset),
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        persistent_workers=workers > 0,
        pin_memory=pin,
        timeout=WORKER_TIMEOUT if workers else 0,
    )


def eval_loader(
    source: Source, preset: Preset, *, batch_size: int, workers: int, rank: int = 0, size: int = 1
) -> DataLoader[Any]:
    """Batches of (uint8 images, labels), each image once and in order, to be read through `batches`.

    Of the batches, which are the same for any number of ranks, rank r takes the r-th and every `size`-th after it.
    """
    starts = range(0, len(source), batch_size)[rank::size]
    return DataLoader(
        EvalSet(source, preset),
        batch_sampler=[list(range(start, min(start + batch_size, len(source)))) for start in starts],
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        persistent_workers=workers > 0,
        timeout=WORKER_TIMEOUT if workers else 0,
    )


def batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; an image that could not be read is raised here as its InputError."""
    loading = iter(loader)
    deaths = _WorkerDeaths()
    while True:
        try:
            with deaths.raised():
                batch = next(loading)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            # A worker may also die between announcing a batch and handing it over.
            cut_off = not isinstance(error, RuntimeError) and loader.num_workers
            if not cut_off and "DataLoader" not in str(error):
                raise
            raise WorkerError(
                f"a process that prepares images died or stands still: {first_line(error)}",
                "see its memory; --workers 0",
            ) from error
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _WorkerDeaths:
    """Has torch raise the death of a worker while a batch is awaited only.

    torch does it from its handler of SIGCHLD wherever the program is: in the middle of an optimizer step, say.
    """

    _torch_handler: Any = None
    _waiting = False

    def __init__(self) -> None:
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):
            with suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGCHLD, _WorkerDeaths._handle)
                _WorkerDeaths._torch_handler = handler

    @staticmethod
    def _handle(number: int, frame: FrameType | None) -> None:
        if _WorkerDeaths._waiting:
            _WorkerDeaths._torch_handler(number, frame)

    @contextmanager
    def raised(self) -> Iterator[None]:
        _WorkerDeaths._waiting = True
        try:
            if _WorkerDeaths._torch_handler:
                _WorkerDeaths._torch_handler(signal.SIGCHLD, None)  # for what happened meanwhile
            yield
        finally:
            _WorkerDeaths._waiting = False


def _leave_signals_to_parent(worker: int) -> None:
    """Signals may reach every process of a terminal, a job or a group; the main one ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, InputError)), None)
    if broken is not None:
        return broken
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)
