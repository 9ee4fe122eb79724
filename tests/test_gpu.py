"""What only a CUDA device can show: `pytest -m gpu`."""

import pytest
import torch

from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from lsag.inference.classifier import Classifier
from lsag.inference.export import export_onnx
from lsag.inference.session import Session
from lsag.training.events import Epoch
from lsag.training.loop import train
from lsag.training.options import TrainOptions
from tests.conftest import randomise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def checkpoint():
    checkpoint = random_checkpoint(load_preset("digits-nano"))
    randomise(checkpoint.model)
    return checkpoint


def test_bf16_logits_are_close_to_fp32(checkpoint):
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    expected = Classifier(checkpoint)(images)
    found = Classifier(checkpoint, device="cuda")(images).float().cpu()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_training_learns(tmp_path):
    preset = load_preset("digits-nano", {"train.epochs": 8, "train.warmup_epochs": 1})
    events = train(preset, TrainOptions(data_dir=tmp_path, out=tmp_path / "run", device="cuda"))
    epochs = [event for event in events if isinstance(event, Epoch)]
    assert epochs[-1].top1 > 0.8


def test_onnxruntime_runs_on_cuda(tmp_path, checkpoint):
    done = export_onnx(checkpoint, tmp_path / "a.onnx")
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    found = Session(done.path, provider="cuda")(images)
    assert (found - Session(done.path)(images)).abs().max() < 0.05
