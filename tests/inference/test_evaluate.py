import pytest
import torch
import torch.nn.functional as F

from lsag.inference.evaluate import evaluate

SIZES = {"count": 23, "batch_size": 5, "num_classes": 7}


def test_metrics_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 7, generator=generator), torch.randint(0, 6, (23,), generator=generator)
    images = torch.arange(23).view(23, 1, 1, 1)
    loader = [(images[start : start + 5], labels[start : start + 5]) for start in range(0, 23, 5)]
    seen = []
    metrics = evaluate(lambda batch: logits[batch.flatten()], loader, **SIZES, on_batch=seen.append)
    assert metrics.count == 23 and seen == [5, 5, 5, 5, 3]
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    order = logits.argsort(dim=1, descending=True)
    assert metrics.top1 == (order[:, 0] == labels).sum().item() / 23
    assert metrics.top5 == sum(label in row[:5] for label, row in zip(labels, order, strict=True)) / 23
    assert torch.equal(metrics.predictions, order[:, 0]) and torch.equal(metrics.labels, labels)
    for i in range(7):
        for j in range(7):
            assert metrics.confusion[i, j] == ((labels == i) & (order[:, 0] == j)).sum()
    assert metrics.per_class()[6] is None
    assert metrics.per_class()[0] == pytest.approx(((labels == 0) & (order[:, 0] == 0)).sum() / (labels == 0).sum())


def test_top5_of_three_classes_is_everything():
    loader = [(torch.zeros(3, 1), torch.tensor([2, 0, 1]))]
    metrics = evaluate(lambda batch: torch.eye(3), loader, count=3, batch_size=3, num_classes=3)
    assert (metrics.top1, metrics.top5) == (0.0, 1.0)
