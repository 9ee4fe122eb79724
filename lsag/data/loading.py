"""Loaders. Augmentation is timm's; what is random depends on (seed, epoch, image) and on nothing else."""

import hashlib
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lsag.config import Preset
from lsag.data.sources import Source
from lsag.data.transforms import eval_transform, train_transform
from lsag.device import available_cores
from lsag.errors import InputError, UsageError, WorkerError, first_line

WORKER_TIMEOUT = 120
"""Seconds that workers may take for a batch."""
WORKER_GRACE = 15
"""Seconds that a worker lives on after SIGTERM."""
Item = tuple[Tensor, int] | InputError


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
    loading = None
    while True:
        try:
            with _worker_deaths_raised():
                loading = loading or iter(loader)  # workers of an epoch before are awaited in here too
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
            # Not itself: its traceback holds this frame, which would hold it. torch cannot end the workers of a loader
            # that is part of such a circle: by the time it is asked to, its queues are closed.
            raise InputError(batch.what, batch.fix)
        yield batch


_awaiting_workers = False


@contextmanager
def _worker_deaths_raised() -> Iterator[None]:
    """Has torch raise the death of a worker in here only, also one that happened before.

    torch does it from its handler of SIGCHLD wherever the program is: in the middle of an optimizer step, say.
    """
    global _awaiting_workers
    _awaiting_workers = True
    try:
        signal.raise_signal(signal.SIGCHLD)
        yield
    finally:
        _awaiting_workers = False
        handler: Any = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch."):
            with suppress(ValueError):  # outside the main thread
                signal.signal(signal.SIGCHLD, lambda *signalled: handler(*signalled) if _awaiting_workers else None)


def _leave_signals_to_parent(worker: int) -> None:
    """Signals may reach every process of a terminal, a job or a group; the main one ends the workers.

    That needs them no longer than WORKER_GRACE after SIGTERM, with which torch and Python also end a worker that does
    not answer, and then wait for it: to ignore it altogether could make them wait for ever.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *signalled: signal.alarm(WORKER_GRACE))


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, InputError)), None)
    if broken is not None:
        return broken
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)
