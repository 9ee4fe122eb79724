"""Exact metrics of a classifier over a dataset: each image counts once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lsag.data import batches

TOP_K = 5


@dataclass(frozen=True)
class Metrics:
    """Counts over `count` images; `confusion[i, j]` images of class i were taken for class j."""

    count: int
    loss: float
    top1: float
    top5: float
    confusion: Tensor
    predictions: Tensor

    def per_class(self) -> list[float | None]:
        """Share of each class's images that were recognised, 0..1; None for a class without images."""
        hits, totals = self.confusion.diag().tolist(), self.confusion.sum(dim=1).tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals, strict=True)]


def evaluate(
    classify: Callable[[Tensor], Tensor],
    loader: DataLoader[Any],
    *,
    num_classes: int,
    on_batch: Callable[[int], object] | None = None,
) -> Metrics:
    """Run `classify`, uint8 images (B, C, height, width) -> logits (B, num_classes), over every image of `loader`.

    Loss is the mean cross-entropy in nats, top-1 and top-5 shares in 0..1 (top-5 of fewer than five classes is 1).
    `on_batch` hears the number of images in each batch.
    """
    loss = torch.zeros((), dtype=torch.float64)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64)
    top5, predictions = 0, []
    for images, labels in batches(loader):
        logits = classify(images).float().cpu()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        ranked = logits.topk(min(TOP_K, num_classes)).indices
        top5 += int((ranked == labels[:, None]).any(dim=1).sum())
        confusion += torch.bincount(labels * num_classes + ranked[:, 0], minlength=num_classes * num_classes)
        predictions.append(ranked[:, 0])
        if on_batch:
            on_batch(len(labels))
    table = confusion.view(num_classes, num_classes)
    count = int(table.sum())
    return Metrics(
        count, loss.item() / count, table.diag().sum().item() / count, top5 / count, table, torch.cat(predictions)
    )
