"""Figures that are derived from an evaluation, each by its definition."""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lsag.inference.evaluate import Evaluation

Z = 1.959964
"""The 97.5 % quantile of the normal distribution: intervals are of 95 %."""
BINS = 15
MOST_CONFUSED = 12


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `hits` in `count`, after Wilson."""
    share, weight = hits / count, Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    low, high = (((share + weight / 2) + sign * half) / (1 + weight) for sign in (-1, 1))
    return low if hits else 0.0, high if hits < count else 1.0  # rounding would miss them


def mean_interval(values: Tensor) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of many independent values (N,); of a single one, the value itself."""
    mean, half = values.double().mean().item(), 0.0
    if len(values) > 1:
        half = Z * values.double().std().item() / math.sqrt(len(values))
    return mean - half, mean + half


def by_class(labels: Tensor, predictions: Tensor, num_classes: int) -> list[dict[str, Any]]:
    """Images, precision, recall and F1 of each class; None where a figure would divide by zero."""
    parts = (labels[labels == predictions], predictions, labels)
    hits, predicted, images = (part.bincount(minlength=num_classes).tolist() for part in parts)
    return [
        {
            "images": true,
            "precision": hit / guessed if guessed else None,
            "recall": hit / true if true else None,
            "f1": 2 * hit / (guessed + true) if guessed + true else None,
        }
        for hit, guessed, true in zip(hits, predicted, images, strict=True)
    ]


def calibration(confidences: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """Images, mean confidence and accuracy in each of `BINS` bins of confidence, equally wide; None in an empty one."""
    bins = (confidences.double() * BINS).ceil().long().clamp(1, BINS) - 1
    images = bins.bincount(minlength=BINS).tolist()
    sums = [bins.bincount(values.double(), minlength=BINS).tolist() for values in (confidences, correct)]
    return [
        {
            "images": count,
            "confidence": confidence / count if count else None,
            "accuracy": hits / count if count else None,
        }
        for count, confidence, hits in zip(images, *sums, strict=True)
    ]


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """The expected calibration error, 0..1: the mean distance of confidence and accuracy, weighted by images."""
    full = [one for one in bins if one["images"]]
    gaps = [one["images"] * abs(one["confidence"] - one["accuracy"]) for one in full]
    return math.fsum(gaps) / sum(one["images"] for one in full)


def counts(confusion: Tensor) -> list[tuple[int, int, int]]:
    """The cells of a confusion matrix that are not empty: true class, predicted class, images."""
    cells = confusion if confusion.is_sparse else confusion.to_sparse()
    return list(zip(*cells.indices().tolist(), cells.values().tolist(), strict=True))


def confused(confusion: Tensor) -> list[tuple[int, int, int]]:
    """The pairs of a true and a predicted class that are confused most often, with the number of images."""
    wrong = [cell for cell in counts(confusion) if cell[0] != cell[1]]
    return sorted(wrong, key=lambda cell: (-cell[2], cell))[:MOST_CONFUSED]


def figures(evaluation: "Evaluation") -> dict[str, Any]:
    """All figures of an evaluation, as JSON has them; a sparse confusion matrix as (true, predicted, images)."""
    metrics, classes = evaluation.metrics, evaluation.model.classes
    intervals = {
        name: wilson(round(getattr(metrics, name) * metrics.count), metrics.count) for name in ("top1", "top5")
    }
    bins = calibration(metrics.confidences, metrics.labels == metrics.predictions)
    confusion = metrics.confusion
    return {
        "images": metrics.count,
        "loss": metrics.loss,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "intervals": intervals | {"loss": mean_interval(metrics.losses)},
        "ece": calibration_error(bins),
        "calibration": bins,
        "per_class": dict(zip(classes, metrics.per_class(), strict=True)),
        "by_class": dict(zip(classes, by_class(metrics.labels, metrics.predictions, len(classes)), strict=True)),
        "most_confused": [(classes[true], classes[guess], count) for true, guess, count in confused(confusion)],
        **({"confusion_pairs": counts(confusion)} if confusion.is_sparse else {"confusion": confusion.tolist()}),
    }
