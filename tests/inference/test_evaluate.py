import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import lsag.inference.evaluate as module
from lsag.errors import InputError
from lsag.inference.evaluate import Metrics, evaluate
from lsag.inference.figures import counts
from lsag_cli.evaluate import evaluate as command
from tests.conftest import TINY, assert_refused
from tests.layouts import as_table, as_webdataset

SIZES = {"count": 23, "batch_size": 5, "num_classes": 7}


def test_metrics_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(23, 7, generator=generator), torch.randint(0, 6, (23,), generator=generator)
    images = torch.arange(23).view(23, 1, 1, 1)
    parts = [(images[start : start + 5], labels[start : start + 5]) for start in range(0, 23, 5)]
    loader = DataLoader(parts, batch_size=None)
    seen = []
    metrics = evaluate(lambda batch: logits[batch.flatten()], loader, **SIZES, on_batch=seen.append)
    assert metrics.count == 23 and seen == [5, 5, 5, 5, 3]
    assert metrics.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    order = logits.argsort(dim=1, descending=True)
    assert metrics.top1 == (order[:, 0] == labels).sum().item() / 23
    assert metrics.top5 == sum(label in row[:5] for label, row in zip(labels, order, strict=True)) / 23
    assert torch.equal(metrics.predictions, order[:, 0]) and torch.equal(metrics.labels, labels)
    probabilities = logits.softmax(dim=1)
    torch.testing.assert_close(metrics.confidences, probabilities.max(dim=1).values)
    torch.testing.assert_close(metrics.label_probabilities, probabilities[torch.arange(23), labels])
    torch.testing.assert_close(metrics.losses, F.cross_entropy(logits, labels, reduction="none"))
    for i in range(7):
        for j in range(7):
            assert metrics.confusion[i, j] == ((labels == i) & (order[:, 0] == j)).sum()
    assert metrics.per_class()[6] is None
    assert metrics.per_class()[0] == pytest.approx(((labels == 0) & (order[:, 0] == 0)).sum() / (labels == 0).sum())


def test_top5_of_three_classes_is_everything():
    loader = DataLoader([(torch.zeros(3, 1), torch.tensor([2, 0, 1]))], batch_size=None)
    metrics = evaluate(lambda batch: torch.eye(3), loader, count=3, batch_size=3, num_classes=3)
    assert (metrics.top1, metrics.top5) == (0.0, 1.0)


def test_the_confusion_of_many_classes_grows_with_the_images():
    """That of ImageNet's 21,841 classes would take 3.8 GB."""
    classes, labels = 21_841, torch.tensor([0, 21_840, 7, 7, 7])
    predictions = torch.tensor([0, 3, 7, 8, 8])
    metrics = Metrics(5, 0.0, 0.4, 0.4, classes, labels, predictions, torch.ones(5), torch.zeros(5))
    assert metrics.confusion.is_sparse and metrics.confusion.shape == (classes, classes)
    assert counts(metrics.confusion) == [(0, 0, 1), (7, 7, 1), (7, 8, 2), (21_840, 3, 1)]
    assert metrics.images_per_class()[7] == 3 and metrics.per_class()[7] == pytest.approx(1 / 3)


def test_sparse_and_dense_confusion_agree(monkeypatch):
    labels, predictions = torch.randint(0, 7, (2, 50), generator=torch.Generator().manual_seed(0))
    metrics = Metrics(50, 0.0, 0.0, 0.0, 7, labels, predictions, torch.ones(50), torch.zeros(50))
    dense = metrics.confusion
    monkeypatch.setattr(module, "MAX_DENSE", 6)
    assert torch.equal(metrics.confusion.to_dense(), dense) and not dense.is_sparse


@pytest.fixture
def split_data(lsag, folder):
    """A model of three classes, and val/ and test/ that each lack one of them."""
    shutil.copytree(folder / "train/dog", folder / "train/emu")
    (folder / "val/emu").mkdir()
    shutil.copytree(folder / "val/dog", folder / "test/emu")
    options = ["--preset", "cifar-nano", "--dataset", "folder", "--data-dir", ".", "--set", "train.batch_size=4"]
    done = lsag("train", *options, "--out", "run", *TINY)
    assert done.returncode == 0, done.stderr
    assert "evaluated on val, not on test" in done.stderr
    return folder


def test_eval_says_which_split_it_took(lsag, split_data):
    done = lsag("eval", "run/best.pt", "--data-dir", ".")
    assert done.returncode == 0, done.stderr
    assert "on folder (val), 4 images" in done.stdout and "evaluated on val, not on test" in done.stderr
    assert [line.split() for line in done.stdout.splitlines() if line.startswith("emu")] == [["emu", "0", "-"]]
    result = json.loads(lsag("eval", "run/best.pt", "--data-dir", ".", "--split", "test", "--json").stdout)
    assert (result["folder"], result["images"]) == ("test", 2)
    assert [sum(row) for row in result["confusion"]] == [0, 0, 2]
    assert result["per_class"]["cat"] is None
    assert_refused(lsag("eval", "run/best.pt", "--dataset", "digits", "--split", "test"), 2, "single evaluation split")
    (split_data / "test/fox").mkdir()
    done = lsag("eval", "run/best.pt", "--data-dir", ".", "--split", "test")
    assert_refused(done, 3, "does not know 'fox' of test, which lacks 'cat', 'dog' — ")


def test_a_picture_that_nobody_asked_for_is_no_error(lsag, split_data):
    """Root writes into any folder; a name that is a folder it cannot write either."""
    (split_data / "run/best-pt-folder-confusion.png").mkdir()
    done = lsag("eval", "run/best.pt", "--data-dir", ".")
    assert done.returncode == 0 and "top-1" in done.stdout
    assert "no picture of the confusion matrix: cannot write run/best-pt-folder-confusion.png" in done.stderr
    result = json.loads(lsag("eval", "run/best.pt", "--data-dir", ".", "--json").stdout)
    assert result["ok"] and result["plot"] is None


def test_the_picture_is_named_after_any_dataset(lsag, split_data):
    as_webdataset(split_data, split_data)
    as_table(split_data, split_data)
    for dataset, name in (("tar:./val/*.tar", "tar-.-val-.tar"), (f"list:{split_data}/images.csv", "-images.csv")):
        done = lsag("eval", "run/best.pt", "--dataset", dataset)
        assert done.returncode == 0, done.stderr
        assert f"{name}-confusion.png" in done.stderr and Path(split_data, done.stderr.split()[-1]).is_file()


def test_the_number_of_images_is_known_from_the_start(split_data):
    heard = []
    module.evaluate_file(
        split_data / "run/best.pt", data_dir=split_data, batch_size=3, on_batch=lambda *images: heard.append(images)
    )
    assert heard == [(0, 4), (3, 4), (1, 4)]


def test_the_bar_shows_the_number_of_images(monkeypatch, tmp_path, capsys):
    def part(path, *, on_batch, **options):
        on_batch(0, 360)
        on_batch(100, 360)
        raise InputError("enough")

    monkeypatch.setattr(module, "evaluate_file", part)
    for name in ("output", "evaluate"):
        monkeypatch.setattr(f"lsag_cli.{name}.is_terminal", lambda stream: True)
    (tmp_path / "a.pt").touch()
    with pytest.raises(InputError, match="enough"):
        command(tmp_path / "a.pt")
    assert "100/360" in capsys.readouterr().err
