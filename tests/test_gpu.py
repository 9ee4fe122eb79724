"""What only a CUDA device can show: `pytest -m gpu`."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.gpu import SIMILAR, deviations
from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from lsag.device import tf32
from lsag.inference.classifier import Classifier
from lsag.inference.export import export_onnx
from lsag.inference.session import Session
from lsag.presets import preset_names
from lsag.training.begin import data_parallel
from lsag.training.events import Epoch, Step
from lsag.training.loop import train
from lsag.training.options import TrainOptions
from tests.conftest import TINY, assert_equal, assert_refused, randomise, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


@pytest.fixture
def checkpoint():
    checkpoint = random_checkpoint(load_preset("digits-nano"))
    randomise(checkpoint.model)
    return checkpoint


def run(preset, out, **options):
    """The epochs of a training on the GPU."""
    events = train(preset, TrainOptions(data_dir=out.parent, out=out, device="cuda", **options))
    return [event for event in events if isinstance(event, Epoch)]


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in SIMILAR])
def test_logits_and_gradients_are_those_of_the_cpu(name):
    assert deviations(name, CUDA, "fp32")["logits"] < 1e-4
    assert max(deviations(name, CUDA, "fp64").values()) < 1e-9


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("fp16", 0.01)])
def test_logits_are_close_to_fp32(checkpoint, precision, limit):
    pixels = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8)
    expected = Classifier(checkpoint)(pixels)
    found = Classifier(checkpoint, device="cuda", precision=precision)(pixels).float().cpu()
    assert (found - expected).abs().max() < limit * expected.abs().max()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_learns(tmp_path, precision):
    preset = load_preset("digits-nano", {"train.epochs": 8, "train.warmup_epochs": 1})
    assert run(preset, tmp_path / "run", precision=precision)[-1].top1 > 0.8


def test_compiled_training_learns_and_evaluates_an_incomplete_batch(tmp_path):
    preset = load_preset("digits-nano", {"train.epochs": 8, "train.warmup_epochs": 1})
    assert run(preset, tmp_path / "run", compile=True)[-1].top1 > 0.8


@pytest.mark.parametrize("recompute", ["none", "local"])
def test_deterministic_trainings_and_a_resumed_one_are_equal_to_the_bit(tmp_path, recompute):
    preset = load_preset("digits-nano", {"train.epochs": 2, "train.warmup_epochs": 0, "augment.mixup": 0.8})
    options = {"deterministic": True, "recompute": recompute}
    for name in ("a", "b"):
        run(preset, tmp_path / name, **options)
    going = train(preset, TrainOptions(data_dir=tmp_path, out=tmp_path / "c", device="cuda", save_minutes=0, **options))
    next(event for event in going if isinstance(event, Step) and event.step > 3)
    going.close()
    run(preset, tmp_path / "c", resume=True, **options)
    for name in ("b", "c"):
        assert_equal(weights(tmp_path / "a"), weights(tmp_path / name))


def test_onnxruntime_runs_on_cuda(tmp_path, checkpoint):
    done = export_onnx(checkpoint, tmp_path / "a.onnx")
    pixels = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    found = Session(done.path, provider="cuda")(pixels)
    assert (found - Session(done.path)(pixels)).abs().max() < 0.05


def test_gradients_through_nccl_are_those_without(checkpoint, tmp_path):
    model, shape = checkpoint.model.to(CUDA), (4, 1, 8, 8)
    inputs = torch.randn(shape, device=CUDA)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with tf32(False):
            ddp, found = data_parallel(model, torch.device("cuda:0"), torch.float32, shape=shape), []
            for net in (ddp, model):
                model.zero_grad()
                F.cross_entropy(net(inputs), torch.arange(4, device=CUDA)).backward()
                found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    finally:
        dist.destroy_process_group()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --standalone --nproc-per-node 1 -m lsag_cli train --device cuda",
        "lsag_cli train --gpus 1 --max-restarts 1",  # without restarts it would train in its own process
    ],
)
def test_one_process_is_launched_and_trains(tmp_path, launcher):
    command = [sys.executable, "-m", *launcher.split(), *TINY, "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(weights(tmp_path / "run")) > 10


def test_out_of_memory_is_one_line(lsag_afresh):
    options = "--mode training --device cuda --batch-size 16384 --rounds 1"
    done = lsag_afresh("bench", "cifar-base", *options.split())
    assert_refused(done, 4, "out of memory", "--batch-size")
