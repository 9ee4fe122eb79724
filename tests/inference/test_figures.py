import math

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from lsag.inference.figures import by_class, calibration, calibration_error, confused, mean_interval, wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 1), (81, 263), (5946, 10_000)])
def test_wilson_bounds_solve_its_equation(hits, count):
    """The bounds are the shares p from which hits / count is just 1.96 standard deviations away."""
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:
        deviation = math.sqrt(bound * (1 - bound) / count)
        assert abs(hits / count - bound) == pytest.approx(1.959964 * deviation, rel=1e-6)
    if (hits, count) == (81, 263):  # Newcombe, Statistics in Medicine 17 (1998), Table I
        assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_the_interval_of_a_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    half = 1.959964 * math.sqrt(14 / 3 / 4)
    assert mean_interval(values) == pytest.approx((3 - half, 3 + half))
    assert mean_interval(values[:1]) == (1.0, 1.0)


def test_precision_recall_and_f1_are_those_of_scikit_learn():
    labels, predictions = torch.randint(0, 6, (2, 60), generator=torch.Generator().manual_seed(0))
    labels[labels == 1], predictions[predictions == 2] = 0, 0  # a class without images, and one never predicted
    rows = by_class(labels, predictions, 8)
    columns = precision_recall_fscore_support(labels, predictions, labels=range(8), zero_division=math.nan)
    for index, row in enumerate(rows):
        for name, column in zip(("precision", "recall", "f1", "images"), columns, strict=True):
            expected = column[index]
            assert row[name] == (None if math.isnan(expected) else pytest.approx(expected)), (index, name)
    assert rows[1]["recall"] is None and rows[2]["precision"] is None and rows[7]["f1"] is None
    matrix = torch.from_numpy(confusion_matrix(labels, predictions, labels=range(8)))
    pairs = confused(matrix)
    assert [count for *_, count in pairs] == sorted((matrix - matrix.diag().diag()).flatten().tolist())[::-1][:12]
    assert all(matrix[true, predicted] == count and true != predicted for true, predicted, count in pairs)


def test_calibration_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    confidences, correct = torch.rand(500, generator=generator), torch.rand(500, generator=generator) < 0.5
    confidences[:3] = torch.tensor([0.0, 1.0, 0.2])
    bins, error = calibration(confidences, correct), 0.0
    for index, one in enumerate(bins):
        inside = [
            (value, hit)
            for value, hit in zip(confidences.double().tolist(), correct.tolist(), strict=True)
            if index / 15 < value <= (index + 1) / 15 or (index == 0 and value == 0)
        ]
        confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert one["images"] == len(inside)
        assert (one["accuracy"], one["confidence"]) == pytest.approx((accuracy, confidence))
        error += len(inside) / 500 * abs(accuracy - confidence)
    assert calibration_error(bins) == pytest.approx(error)
    certain = calibration(torch.ones(4), torch.tensor([True, True, True, False]))
    assert certain[0] == {"images": 0, "confidence": None, "accuracy": None} and certain[14]["images"] == 4
    assert calibration_error(certain) == 0.25
