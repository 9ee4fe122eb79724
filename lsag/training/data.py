"""What a training reads: the images of both splits, in the order and the slices of this rank."""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lsag.config import DATASETS, Preset
from lsag.data.loading import EpochBatches, batches, choose_workers, eval_loader, train_loader
from lsag.data.sources import EncodedSource, Source, number_as
from lsag.data.splits import open_split
from lsag.distributed.environment import world_size_here
from lsag.distributed.world import World
from lsag.errors import InputError, UsageError
from lsag.training.options import TrainOptions

EVAL_BATCH = 128
"""Images that a rank evaluates at a time, for any number of ranks, so that the figures do not depend on it."""


@dataclass(frozen=True)
class Data:
    """Both splits with their loaders. `fingerprint` changes with the images, their labels and their order.

    `class_weights` are what each class counts in the loss, (num_classes,), None if all count alike. `notes` on what is
    not used are for a person to read.
    """

    classes: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str
    num_train: int
    num_eval: int
    class_weights: Tensor | None
    order: EpochBatches
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    eval_batch: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return self.order.num_steps

    def epoch(self, epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's slices of an epoch from `first_step` on: images (B, C, size, size) and labels (B,).

        InputError for an image that cannot be read, WorkerError for a worker that died.
        """
        self.order.epoch, self.order.first_step = epoch, first_step
        return batches(self.train_loader)

    def broken(self, world: World) -> list[str]:
        """On rank 0, the training images that any rank has skipped since this start, and what is wrong with each.

        InputError on every rank for a class of which nothing else is left.
        """
        images: Any = self.train_loader.dataset
        found: list[str] = []
        if images.broken is not None:
            indices = world.total_tensor(images.broken).nonzero().flatten().tolist()
            labels = np.asarray(images.source.labels)
            had, gone = (np.bincount(some, minlength=len(self.classes)) for some in (labels, labels[indices]))
            lost = [self.classes[label] for label in np.flatnonzero((had > 0) & (had == gone))]
            if lost:
                what = f"no training image of {', '.join(lost[:5])} can be read"
                raise InputError(what, "repair the images, or remove the class everywhere")
            for index in indices if world.is_main else []:
                name = images.source.name(index)
                try:
                    images.source.load(index)
                except InputError as error:
                    where = Path(name).absolute() if Path(name).exists() else name
                    found.append(f"{where}: {error.what.removeprefix(f'cannot read image {name}: ')}")
        return found


def open_data(preset: Preset, options: TrainOptions, world: World) -> tuple[Preset, Data]:
    """The preset with the number of classes that its data has, and the data; small folders are held in memory."""
    # One process of each machine goes first: what it downloads, the others find.
    if world.local_rank == 0:
        train, evaluation = _open(preset, options, first=True)
    world.barrier()
    if world.local_rank != 0:
        train, evaluation = _open(preset, options, first=False)
    preset = _with_classes(preset, len(train.classes))
    fingerprint = f"{train.fingerprint()} {evaluation.fingerprint()}"
    world.check_equal("preset", preset.model_dump_json())
    world.check_equal("dataset", fingerprint)

    workers = options.workers
    if workers is None:
        workers = choose_workers(len(train), processes=world_size_here())
    order = EpochBatches(
        len(train),
        preset,
        labels=train.labels,
        shards=train.shards,
        rank=world.rank,
        size=world.size,
        accum=options.accum,
    )
    eval_batch, pin = min(preset.train.batch_size, EVAL_BATCH), world.device.type == "cuda"
    return preset, Data(
        classes=tuple(train.classes),
        notes=tuple(dict.fromkeys((*train.notes, *evaluation.notes))),
        fingerprint=fingerprint,
        num_train=len(train),
        num_eval=len(evaluation),
        class_weights=class_weights(train).to(world.device) if preset.train.class_weights == "inverse" else None,
        order=order,
        train_loader=train_loader(
            train,
            preset,
            order,
            workers=workers,
            pin=pin,
            skip_broken=options.skip_broken,
        ),
        eval_loader=eval_loader(
            evaluation,
            preset,
            batch_size=eval_batch,
            workers=workers,
            rank=world.rank,
            size=world.size,
            pin=pin,
        ),
        eval_batch=eval_batch,
    )


def class_weights(source: Source) -> Tensor:
    """What each class counts in the loss, float32 (num_classes,): N / (K n) for n of N images, if K classes have any.

    Their mean over the images is 1. A class without images counts 0.
    """
    count = torch.from_numpy(np.bincount(np.asarray(source.labels), minlength=len(source.classes)))
    return torch.where(count > 0, len(source) / (count.count_nonzero() * count), 0.0)


def _open(preset: Preset, options: TrainOptions, *, first: bool) -> tuple[Source, Source]:
    """The training and the evaluation split."""
    train, evaluation = (
        open_split(
            preset.data.dataset,
            Path(options.data_dir),
            train=train,
            mode=preset.image_mode,
            download=options.download and first,
            val_split=preset.data.val_split,
            seed=preset.train.seed,
        )
        for train in (True, False)
    )
    number_as(
        train.classes,
        evaluation,
        whose="the training split",
        where="the evaluation split",
        fix="give both splits images of the same classes",
    )
    return _in_memory(train, skip_broken=options.skip_broken), _in_memory(evaluation)


def _in_memory(source: Source, *, skip_broken: bool = False) -> Source:
    """Few images in memory; where broken ones are skipped, a source with broken images stays where it is."""
    with suppress(InputError) if skip_broken else nullcontext():
        return source.packed() if isinstance(source, EncodedSource) else source
    return source


def _with_classes(preset: Preset, found: int) -> Preset:
    """Images of one's own set the number of classes; any other dataset must have that of the preset."""
    if preset.data.dataset not in DATASETS:
        return preset.with_classes(found)
    if found != preset.model.num_classes:
        raise UsageError(
            f"{preset.data.dataset} has {found} classes, model.num_classes is {preset.model.num_classes}",
            f"--set model.num_classes={found}, or choose the data with --dataset, which sets it",
        )
    return preset
