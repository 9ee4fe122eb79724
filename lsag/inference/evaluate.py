"""Exact metrics of a classifier over a dataset, in which each image counts once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lsag.config import Precision
from lsag.data.loading import batches, choose_workers, eval_loader
from lsag.data.sources import Source, number_as
from lsag.data.splits import open_for
from lsag.distributed.world import SINGLE, World
from lsag.errors import InputError
from lsag.failpoints import failpoint
from lsag.inference.classifier import Classifier, open_model

if TYPE_CHECKING:
    from lsag.inference.session import Session

TOP_K = 5
MAX_DENSE = 1000
"""Classes up to which a confusion matrix is dense: it grows with their square, the images do not."""


@dataclass(frozen=True)
class Metrics:
    """Metrics over `count` images; `labels` and `predictions` are their classes.

    `confidences` are the probabilities of the predictions, `losses` the cross-entropies in nats, float32 (count,).
    """

    count: int
    loss: float
    top1: float
    top5: float
    num_classes: int
    labels: Tensor
    predictions: Tensor
    confidences: Tensor
    losses: Tensor

    @property
    def label_probabilities(self) -> Tensor:
        """The probability that the model gives to the label of each image, (count,)."""
        return (-self.losses).exp()

    @property
    def confusion(self) -> Tensor:
        """(num_classes, num_classes): how many images of class i were classified as j; sparse if there are many."""
        size = self.num_classes
        if size <= MAX_DENSE:
            return torch.bincount(self.labels * size + self.predictions, minlength=size**2).view(size, size)
        pairs, ones = torch.stack([self.labels, self.predictions]), torch.ones_like(self.labels)
        return torch.sparse_coo_tensor(pairs, ones, (size, size), check_invariants=True).coalesce()

    def images_per_class(self) -> list[int]:
        """How many images each class has."""
        return self.labels.bincount(minlength=self.num_classes).tolist()

    def per_class(self) -> list[float | None]:
        """The accuracy on each class, 0..1; None for a class without images."""
        hits = self.labels[self.labels == self.predictions].bincount(minlength=self.num_classes).tolist()
        return [hit / total if total else None for hit, total in zip(hits, self.images_per_class(), strict=True)]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of `model` on a dataset; `images` names each image in the order of `metrics.predictions`.

    `source` has the images themselves. `folder` is that of the split, of a dataset in folders; `notes` are for a person
    to read.
    """

    metrics: Metrics
    model: "Classifier | Session"
    dataset: str
    folder: Path | None
    images: list[str]
    source: Source
    notes: tuple[str, ...]


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
    """Run `classify`, uint8 images (B, C, image_size, image_size) -> logits (B, num_classes), over all `count` images.

    `loader` yields this rank's batches of `batch_size` images, as `eval_loader` divides them; every rank returns the
    metrics of all ranks. The loss is the mean cross-entropy in nats; top-1 and top-5 are in 0..1 (with fewer than five
    classes, top-5 is 1). `on_batch` is called with the number of images in each batch, equally often on every rank.
    """
    # For each image its label, its prediction and whether the label is in the top five, then the log-probabilities of
    # prediction and label; for each batch its loss. What other ranks compute stays zero here, so that the sum over the
    # ranks is exact, and the same for any number of them.
    num_batches = math.ceil(count / batch_size)
    labels, predictions, in_top5 = torch.zeros(3, count, dtype=torch.int64)
    log_probabilities, losses = torch.zeros(2, count), torch.zeros(num_batches, dtype=torch.float64)
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
            log_probabilities[:, here] = logits.log_softmax(dim=1).gather(1, torch.stack([ranked[:, 0], truth], 1)).T
        if on_batch:
            on_batch(len(truth) if index < num_batches else 0)
    of_predictions, of_labels = world.total_tensor(log_probabilities)
    labels, predictions, in_top5 = world.total_tensor(torch.stack([labels, predictions, in_top5]))
    return Metrics(
        count=count,
        loss=world.total_tensor(losses).sum().item() / count,
        top1=(labels == predictions).sum().item() / count,
        top5=in_top5.sum().item() / count,
        num_classes=num_classes,
        labels=labels,
        predictions=predictions,
        confidences=of_predictions.exp(),
        losses=-of_labels,
    )


def evaluate_file(
    path: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    split: str | None = None,
    device: str = "auto",
    provider: str | None = None,
    precision: Precision | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    download: bool = True,
    on_batch: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """Evaluate a checkpoint, or an exported .onnx graph, on the evaluation split of `dataset` (default: its own).

    `data_dir` is by default that of `default_data_dir`. `split` names another split to take.
    `device`, `provider` and `precision` are those of
    `open_model`. `on_batch` is called with the number of images in each batch and of all images, first with 0.
    InputError if the dataset has classes that the model does not know, or outputs are not finite.
    """
    model = open_model(path, device=device, provider=provider, precision=precision)
    preset, classes = model.preset, model.classes
    dataset = preset.data.dataset if dataset is None else dataset
    source = open_for(preset, dataset, None if data_dir is None else Path(data_dir), split=split, download=download)
    folder = getattr(source, "root", None)
    number_as(
        classes,
        source,
        whose=f"{path} (preset {preset.name})",
        where=str(folder or dataset),
        fix="choose images of the model's classes",
    )
    if workers is None:
        workers = choose_workers(len(source))
    pin = isinstance(model, Classifier) and model.device.type == "cuda"
    loader = eval_loader(source, preset, batch_size=batch_size, workers=workers, pin=pin)
    count, heed = len(source), on_batch or (lambda images, of: None)
    heed(0, count)
    metrics = evaluate(
        model,
        loader,
        count=count,
        batch_size=batch_size,
        num_classes=len(classes),
        on_batch=lambda images: heed(images, count),
    )
    if not math.isfinite(metrics.loss):
        raise InputError(f"{path} gives outputs that are not finite", "train or export it again")
    names = [source.name(index) for index in range(len(source))]
    return Evaluation(metrics, model, dataset, folder, names, source, source.notes)
