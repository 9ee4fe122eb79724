"""Exact metrics of a classifier over a dataset: each image counts once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lsag.config import Preset
from lsag.data.loading import batches, choose_workers, eval_loader
from lsag.data.sources import check_classes, open_split
from lsag.distributed.world import SINGLE, World
from lsag.errors import InputError
from lsag.failpoints import failpoint
from lsag.inference.classifier import open_model
from lsag.inference.session import Session

TOP_K = 5


@dataclass(frozen=True)
class Metrics:
    """Counts over `count` images; `confusion[i, j]` images of class i were taken for class j."""

    count: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor
    labels: Tensor
    predictions: Tensor

    def per_class(self) -> list[float | None]:
        """Share of each class's images that were recognised, 0..1; None for a class without images."""
        hits, totals = self.confusion.diag().tolist(), self.confusion.sum(dim=1).tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a file on a dataset; `images` names each image in the order of `metrics.predictions`.

    `session` is the graph that was evaluated, None for a checkpoint.
    """

    metrics: Metrics
    preset: Preset
    classes: tuple[str, ...]
    dataset: str
    device: str
    images: list[str]
    session: Session | None = None


def evaluate(
    classify: Callable[[Tensor], Tensor],
    loader: DataLoader[Any],
    *,
    count: int,
    batch_size: int,
    num_classes: int,
    world: World = SINGLE,
    on_batch: Callable[[int], object] | None = None,
) -> Metrics:
    """Run `classify`, uint8 images (B, C, height, width) -> logits (B, num_classes), over all `count` images.

    `loader` gives this rank's batches of `batch_size`, as `eval_loader` cuts them; every rank gets the metrics of all.
    Loss is the mean cross-entropy in nats, top-1 and top-5 shares in 0..1 (top-5 of fewer than five classes is 1).
    `on_batch` hears the number of images in each batch, equally often on every rank.
    """
    # Label, prediction and rank of the label of each image, and the loss of each batch. Other ranks' places stay zero,
    # so that the sum over the ranks is exact, and the same for any number of them.
    num_batches = math.ceil(count / batch_size)
    labels, predictions, in_top5 = torch.zeros(3, count, dtype=torch.int64)
    losses = torch.zeros(num_batches, dtype=torch.float64)
    loading = batches(loader)
    for index in range(world.rank, math.ceil(num_batches / world.size) * world.size, world.size):
        if index < num_batches:
            failpoint("in_eval")
            images, truth = next(loading)
            logits = classify(images).float().cpu()
            losses[index] = F.cross_entropy(logits, truth, reduction="sum")
            ranked = logits.topk(min(TOP_K, num_classes)).indices
            here = slice(index * batch_size, index * batch_size + len(truth))
            labels[here], predictions[here] = truth, ranked[:, 0]
            in_top5[here] = (ranked == truth[:, None]).any(dim=1).long()
        if on_batch:
            on_batch(len(truth) if index < num_batches else 0)
    labels, predictions, in_top5 = world.total_tensor(torch.stack([labels, predictions, in_top5]))
    confusion = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return Metrics(
        count=count,
        loss=world.total_tensor(losses).sum().item() / count,
        top1=(labels == predictions).sum().item() / count,
        top5=in_top5.sum().item() / count,
        confusion=confusion.view(num_classes, num_classes),
        labels=labels,
        predictions=predictions,
    )


def evaluate_file(
    path: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | Path,
    device: str = "auto",
    provider: str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    download: bool = True,
    on_batch: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate a checkpoint, or an exported .onnx graph, on the evaluation split of `dataset` (default: its own).

    The file alone says model, classes and preprocessing. A checkpoint runs on `device`, a graph in onnxruntime on
    `provider` (see `lsag.inference.session.Session`). InputError if the dataset's classes are not the model's.
    """
    opened = open_model(path, device=device, provider=provider)
    preset, classes = opened.preset, opened.classes
    dataset = preset.data.dataset if dataset is None else dataset
    source = open_split(dataset, Path(data_dir), train=False, mode=preset.image_mode, download=download)
    check_classes(classes, source.classes, what=f"{path} (preset {preset.name})", where=dataset)
    if workers is None:
        workers = choose_workers(len(source))
    loader = eval_loader(source, preset, batch_size=batch_size, workers=workers)
    metrics = evaluate(
        opened.classify, loader, count=len(source), batch_size=batch_size, num_classes=len(classes), on_batch=on_batch
    )
    if not math.isfinite(metrics.loss):
        raise InputError(f"{path} gives outputs that are not finite", "train or export it again")
    names = [source.name(index) for index in range(len(source))]
    return Evaluation(metrics, preset, classes, dataset, opened.where, names, opened.session)
