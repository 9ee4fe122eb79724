"""One way to use a model: checkpoints and graphs, from Python and from the commands, refused before anything slow."""

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from lsag.checkpoint import save_checkpoint
from lsag.data.transforms import Normalize
from lsag.device import DTYPES, tf32
from lsag.errors import UsageError
from lsag.inference.classifier import Classifier, open_model
from lsag.inference.export import export_onnx, made_up_images
from lsag_cli import app
from tests.conftest import ROOT, assert_refused


@pytest.fixture(scope="module")
def files(checkpoint, made_once):
    def make(folder):
        save_checkpoint(folder / "a.pt", checkpoint)
        export_onnx(checkpoint, folder / "a.onnx", batch=2)

    return made_once("classifier", make)


def test_a_checkpoint_and_its_graph_are_used_alike(checkpoint, files):
    image = Image.effect_noise((20, 16), 80).convert("RGBA")
    expected = checkpoint.model(Normalize(checkpoint.preset.data)(made_up_images(3, checkpoint)))
    for model in (open_model(files / "a.pt", device="cpu"), open_model(files / "a.onnx", provider="cpu")):
        assert model.preset == checkpoint.preset and model.classes == checkpoint.classes
        assert model.device_name in ("cpu, fp32", "onnxruntime CPUExecutionProvider, fp32")
        pixels = model.transform(image)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (1, 8, 8))
        logits = model(made_up_images(3, checkpoint))
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-4)
        assert not logits.requires_grad


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_round_a_copy_of_the_weights_once(checkpoint, precision):
    images = made_up_images(4, checkpoint)
    exact, classifier = Classifier(checkpoint), Classifier(checkpoint, precision=precision)
    assert exact.model is checkpoint.model and exact.precision == "fp32"
    assert {weight.dtype for weight in classifier.model.parameters()} == {DTYPES[precision]}
    assert {weight.dtype for weight in checkpoint.model.parameters()} == {torch.float32}
    logits, rounded = exact(images), classifier(images)
    assert rounded.dtype == torch.float32 and not torch.equal(logits, rounded)
    torch.testing.assert_close(logits, rounded, rtol=0.1, atol=0.1 * logits.abs().max().item())


def test_tf32_is_refused_without_a_gpu_that_has_it(checkpoint):
    with pytest.raises(UsageError, match="tf32 is a precision of NVIDIA GPUs, and this is cpu"):
        Classifier(checkpoint, precision="tf32")


def test_tf32_is_on_only_where_it_is_wanted():
    def state():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = state()
    with tf32(False):
        assert state() == (False, False)
        with tf32(True):
            assert state() == (True, True)
    assert state() == before


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 1, dtype=torch.uint8),
        torch.zeros(1, 1, 8, 9, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        [[0]],
    ],
)
def test_other_images_are_refused_alike(files, images):
    for name in ("a.pt", "a.onnx"):
        with pytest.raises(UsageError, match=r"takes uint8 images \(B, 1, 8, 8\), not"):
            open_model(files / name)(images)


def test_an_unknown_precision_is_refused(files):
    with pytest.raises(UsageError, match="unknown precision 'fp8'"):
        open_model(files / "a.pt", precision="fp8")


def test_the_mode_of_the_model_is_left_alone(checkpoint):
    classifier = Classifier(checkpoint)
    for training in (True, False):
        checkpoint.model.train(training)
        classifier(made_up_images(1, checkpoint))
        assert checkpoint.model.training == training


@pytest.mark.parametrize(
    ("options", "words"), [({"device": "mps"}, "cuda:N"), ({"precision": "fp16"}, "fp32 graph in fp16")]
)
def test_options_of_checkpoints_are_refused_for_graphs(files, options, words):
    with pytest.raises(UsageError, match=words):
        open_model(files / "a.onnx", **options)
    assert open_model(files / "a.onnx", device="cpu").provider == "openvino"
    with pytest.raises(UsageError, match=r"--provider is for \.onnx graphs"):
        open_model(files / "a.pt", provider="cpu")


def test_the_commands_take_a_precision(lsag, files, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for command in (["predict", files / "a.pt", "a.png"], ["explain", files / "a.pt", "a.png"]):
        assert lsag(*command, "--precision", "bf16").returncode == 0
    assert_refused(
        lsag("predict", files / "a.onnx", "a.png", "--precision", "bf16", "--provider", "cpu"), 2, "--provider openvino"
    )


def test_old_names_of_options_work_and_say_the_new_ones(lsag, files):
    done = lsag("export", files / "a.pt", "--onnx", "--half", "--batch", 1, "--out", "old.onnx")
    assert done.returncode == 0 and "fp16" in done.stdout and "at batch 1:" in done.stdout
    assert done.stderr.splitlines()[:2] == ["--half is now --precision fp16", "--batch is now --batch-size"]


REFUSED_AT_ONCE = """
import sys
from pathlib import Path
from lsag_cli.app import run

Path("a.pt").touch(), Path("a.onnx").touch()
for line in sys.stdin:
    code, *words = line.split()
    sys.argv = ["lsag", *words]
    assert run() == int(code), line
    assert not {"torch", "timm", "onnx", "onnxruntime", "openvino"} & set(sys.modules), line
"""
COMMANDS = """
3 eval nothere.pt
3 predict nothere.pt x
3 explain nothere.pt x.png
3 explain nothere.onnx x.png
3 explain a.pt nothere.png
3 export nothere.pt --onnx
3 export --onnx
3 convert nothere.pth --preset cifar-tiny
3 push nothere.pt org/name
3 predict a.pt *.jpg
2 eval a.pt --dataset nope
2 eval a.pt --provider cuda
2 eval a.onnx --device cpu --precision tf32
2 predict a.pt x --profile
2 export a.pt --onnx --opset 17
2 export a.pt --onnx --out a.pt
"""


def test_a_file_without_permission_is_an_input(tmp_path, monkeypatch, capsys):
    """As for a user who is not root, whom typer would tell of a wrong use."""
    (tmp_path / "a.pt").touch()
    monkeypatch.setattr("os.access", lambda *given, **options: False)
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    for command in ("eval", "explain", "push"):
        monkeypatch.setattr("sys.argv", ["lsag", command, str(tmp_path / "a.pt"), "x/x"][: 3 + (command != "eval")])
        assert app.run() == 3
        assert "Permission denied" in capsys.readouterr().err


def test_what_cannot_work_is_refused_without_loading_pytorch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_AT_ONCE],
        input=COMMANDS.strip(),
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
