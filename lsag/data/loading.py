"""Order and loaders. What is random depends on (seed, epoch, image) and on nothing else."""

import hashlib
import os
import random
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lsag.config import Preset
from lsag.data.sources import Source
from lsag.data.transforms import eval_transform, train_transform
from lsag.errors import InputError, LsagError, UnreachableError, UsageError, WorkerError, first_line
from lsag.machine import available_cores

WORKER_TIMEOUT = 120
"""Seconds that workers may take to prepare a batch."""
WORKER_GRACE = 15
"""Seconds that a worker lives after SIGTERM."""
MAX_REPLACED = 100
"""Images that are tried in the place of one."""
LIMITS = {
    "Too many open files|items of ancdata": "raise the limit on open files with ulimit -n",
    "shared memory|No space left": "enlarge shared memory, /dev/shm (docker run --shm-size=1g)",
    "AF_UNIX path too long": "set TMPDIR to a folder with a shorter name",
}
"""What helps workers to pass on a batch, by words of the error that they fail with."""
Item = tuple[Tensor, int] | LsagError


def random_key(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, such as (seed, "augment", epoch, image)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class TrainSet(Dataset[Item]):
    """Augmented images. An index is a position of EpochBatches, and gives the same pixels in any worker and any order.

    With `skip_broken`, an image that cannot be read gives another one, and its `broken`, which the workers share, is 1.
    """

    def __init__(self, source: Source, preset: Preset, *, skip_broken: bool = False) -> None:
        self.source, self.seed = source, preset.train.seed
        self.transform = train_transform(preset)
        self.broken = torch.zeros(len(source), dtype=torch.int32).share_memory_() if skip_broken else None

    def __getitem__(self, position: tuple[int, ...]) -> Item:
        key = random_key(self.seed, "augment", *position)
        # The generators that the transforms of timm and torchvision draw from.
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.default_generator.manual_seed(key)
        try:
            image, label = self._load(*position)
        except LsagError as error:
            return error  # raised in a worker, it would arrive as a traceback
        return self.transform(image), label

    def _load(self, epoch: int, image: int, *repeat: int) -> tuple[Image.Image, int]:
        """The image, or one that the seed and the position choose in its place."""
        for attempt in range(MAX_REPLACED):
            try:
                return self.source.load(image)
            except InputError as error:
                if self.broken is None or isinstance(error, UnreachableError):
                    raise
                self.broken[image] = 1
                image = random_key(self.seed, "replace", epoch, image, *repeat, attempt) % len(self.source)
        raise InputError(f"no training image could be read in {MAX_REPLACED} attempts", "check the data folder")


class EvalSet(Dataset[Item]):
    """Images as uint8 tensors (C, image_size, image_size), resized and centre-cropped."""

    def __init__(self, source: Source, preset: Preset) -> None:
        self.source, self.transform = source, eval_transform(preset)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        try:
            image, label = self.source.load(index)
        except LsagError as error:
            return error
        return self.transform(image), label


class EpochBatches(Sampler[list[tuple[int, ...]]]):
    """The slices of an epoch's batches that one rank takes, as positions (epoch, image) in random order.

    With data.balance, which needs the `labels`, an epoch may have an image again, at (epoch, image, repeat), where the
    repeats are counted from 1, so that each is augmented in its own way. data.shuffle = "shards:N" needs the `shards`:
    UsageError if they are None.

    Each batch is cut into size x accum slices, of which rank r takes `accum`, from r x accum on. 8 ranks see the same
    slices as one rank that accumulates 8. Images that do not fill a batch are dropped. Set `epoch` and `first_step`
    before an epoch is read.
    """

    def __init__(
        self,
        num_images: int,
        preset: Preset,
        *,
        labels: ArrayLike = (),
        shards: np.ndarray | None = None,
        rank: int = 0,
        size: int = 1,
        accum: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, preset.train.batch_size, preset.train.seed
        self.data, self.labels, self.shards = preset.data, labels, shards
        self.slice_size = preset.slice_size(size * accum)
        self.slices = range(rank * accum, (rank + 1) * accum)
        self.num_steps = num_images // self.batch_size
        self.epoch = self.first_step = 0
        if self.num_steps == 0:
            raise UsageError(
                f"{num_images:,} training images do not fill one batch of {self.batch_size}",
                "choose a smaller one with --set train.batch_size=N",
            )
        self.data.check_shards(shards is not None)

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * len(self.slices)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        order = self.order()
        for step in range(self.first_step, self.num_steps):
            for index in self.slices:
                start = step * self.batch_size + index * self.slice_size
                drawn = order[start : start + self.slice_size].tolist()
                repeats = (divmod(number, self.num_images) for number in drawn)
                yield [(self.epoch, image, repeat) if repeat else (self.epoch, image) for repeat, image in repeats]

    def order(self) -> Tensor:
        """The images of the epoch, int64 (num_images,); num_images is added to one at each of its repeats."""
        generator = torch.Generator().manual_seed(random_key(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        if self.data.shards_at_once:
            shards, shard = np.unique(np.asarray(self.shards), return_inverse=True)
            group = torch.randperm(len(shards), generator=generator) // self.data.shards_at_once
            order = order[group[torch.from_numpy(shard)[order]].argsort(stable=True)]
        if self.data.balance:
            order = _balanced(order, self.labels, self.data.balance, generator)
        return order


def _balanced(order: Tensor, labels: ArrayLike, balance: float, generator: torch.Generator) -> Tensor:
    """An epoch as long as the random `order` of all images, in which each class that has images gets its share.

    A class's images are drawn in turn, as they come in `order`, again and again. Shares are rounded up or down by
    chance, so that they are exact over many epochs. Repeats are numbered as in EpochBatches.order.
    """
    size = len(order)
    _, label, count = (torch.from_numpy(a) for a in np.unique(labels, return_inverse=True, return_counts=True))
    share = (count.double() ** (1 - balance)).cumsum(0)
    ends = (share * (size / share[-1]) + torch.rand((), generator=generator, dtype=torch.float64)).long()
    ends[-1] = size
    quota = ends.diff(prepend=ends.new_zeros(1))
    images = order[label[order].argsort(stable=True)]  # class by class
    drawn = torch.arange(len(count)).repeat_interleave(quota)  # the class of each draw
    turn = torch.arange(size) - (ends - quota)[drawn]  # and its number within that class
    image = images[(count.cumsum(0) - count)[drawn] + turn % count[drawn]]
    return (image + turn // count[drawn] * size)[torch.randperm(size, generator=generator)]


def choose_workers(num_images: int, *, processes: int = 1) -> int:
    """Number of workers that prepare images for each of `processes` that train on this machine.

    Zero where starting them costs more than they save, else one per core, up to 8.
    """
    return 0 if num_images < 5_000 else min(8, max(1, available_cores() // processes))


def train_loader(
    source: Source,
    preset: Preset,
    order: EpochBatches,
    *,
    workers: int,
    pin: bool = False,
    skip_broken: bool = False,
) -> DataLoader[Any]:
    """Batches of (images, labels) of a TrainSet in the given `order`; read them through `batches`."""
    return DataLoader(
        TrainSet(source, preset, skip_broken=skip_broken),
        batch_sampler=order,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        persistent_workers=workers > 0,
        pin_memory=pin,
        timeout=WORKER_TIMEOUT if workers else 0,
    )


def eval_loader(
    source: Source,
    preset: Preset,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    size: int = 1,
    pin: bool = False,
) -> DataLoader[Any]:
    """Batches of (uint8 images, labels), each image once and in order; read them through `batches`.

    The batches are the same for any number of ranks; rank r takes batch r and every `size`-th after it.
    """
    starts = range(0, len(source), batch_size)[rank::size]
    return DataLoader(
        EvalSet(source, preset),
        batch_sampler=[list(range(start, min(start + batch_size, len(source)))) for start in starts],
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        persistent_workers=workers > 0,
        pin_memory=pin,
        timeout=WORKER_TIMEOUT if workers else 0,
    )


def batches(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches. InputError for an image that cannot be read, WorkerError for a worker that has died."""
    loading = None
    while True:
        try:
            with _worker_deaths_raised():
                if loading is None and loader.num_workers:
                    _try_sharing(loader.num_workers)
                loading = loading or iter(loader)  # this also waits for workers of the epoch before
                batch = next(loading)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if loader.num_workers and (limited := _limited(error)):
                raise WorkerError(*limited) from error
            # A worker may also die between announcing a batch and delivering it.
            cut_off = not isinstance(error, RuntimeError) and loader.num_workers
            if not cut_off and "DataLoader" not in str(error):
                raise
            raise WorkerError(
                f"a process that prepares images has died or hangs: {first_line(error)}",
                "check its memory, or use --workers 0",
            ) from error
        if isinstance(batch, LsagError):
            # A new one: the traceback of the old one holds this frame, which would hold the error. torch cannot end the
            # workers of a loader in such a circle: by the time it is asked to, their queues are closed.
            raise type(batch)(batch.what, batch.fix)
        yield batch


def _try_sharing(workers: int) -> None:
    """Share a tensor and open a socket and files, as workers do to pass on a batch: OSError or RuntimeError.

    What fails there, in a thread of a worker, torch shows as a traceback; and the batch never comes.
    """
    torch.zeros(1).share_memory_()
    Listener(family="AF_UNIX").close()
    with ExitStack() as files:
        for _ in range(16 + 6 * workers):  # about as many as they need at a time
            files.enter_context(Path(os.devnull).open())


def _limited(error: Exception) -> tuple[str, str] | None:
    """What keeps workers from passing on a batch on this machine, and what helps; None for another cause."""
    for words, fix in LIMITS.items():
        if re.search(words, str(error)):
            what = f"the processes that prepare images cannot pass them on: {first_line(error)}"
            return what, f"{fix}, or use --workers 0"
    return None


_awaiting_workers = False


@contextmanager
def _worker_deaths_raised() -> Iterator[None]:
    """Let torch raise the death of a worker only in here, including one that happened before.

    Its handler of SIGCHLD would raise it wherever the program is, for instance in the middle of an optimizer step.
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
    """A signal may reach every process of a terminal, job or group; the workers leave it to the main one.

    A worker still ends WORKER_GRACE seconds after SIGTERM: torch and Python end a worker that does not answer with it,
    and would wait for ever for one that ignored it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *signalled: signal.alarm(WORKER_GRACE))


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, LsagError)), None)
    if broken is not None:
        return broken
    images, labels = zip(*items, strict=True)
    batch = torch.stack(images), torch.tensor(labels)
    if get_worker_info():
        try:
            for tensor in batch:
                tensor.share_memory_()
        except RuntimeError as error:
            if limited := _limited(error):
                return WorkerError(*limited)
            raise
    return batch
