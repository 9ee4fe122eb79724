"""Trained weights that come with the package: what their cards say is true, and their names are models everywhere."""

import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lsag
import lsag.timm_models
import lsag.weights
from lsag.checkpoint import load_checkpoint
from lsag.errors import DamagedError, InputError
from lsag.weights import FILES, cards, model_file
from tests.conftest import assert_equal, assert_refused, shared

NAMES = list(cards())


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("name", NAMES)
def test_a_card_describes_its_file(name):
    checkpoint, card = load_checkpoint(name), cards()[name]
    assert (FILES / f"{name}.safetensors").stat().st_size < 4e6
    assert checkpoint.preset.name == name and checkpoint.preset.model == lsag.load_preset(name).model
    assert all(word in " ".join(card.recipe) for word in ("lsag train", f"--preset {name}"))


def test_every_file_has_a_card():
    assert {path.stem for path in FILES.glob("*.safetensors")} == set(NAMES) == {"cifar-nano", "digits-nano"}


def test_digits_nano_is_as_accurate_as_its_card_says(lsag):
    done = lsag("eval", "digits-nano", "--json")
    assert json.loads(done.stdout)["top1"] == cards()["digits-nano"].top1, done.stderr


@pytest.mark.slow
def test_cifar_nano_is_as_accurate_as_its_card_says(lsag, tmp_path):
    with tarfile.open(shared("data/cifar10-jpeg.tar.xz")) as archive:
        members = (member for member in archive if "/test" in member.name)
        archive.extractall(tmp_path, members, filter="data")
    done = lsag(
        "eval", "cifar-nano", "--dataset", "folder", "--data-dir", next(tmp_path.glob("*/test")).parent, "--json"
    )
    assert json.loads(done.stdout)["top1"] == pytest.approx(cards()["cifar-nano"].top1, abs=2e-4), done.stderr


def test_a_name_is_a_model_in_every_command(lsag, photo):
    found = json.loads(lsag("predict", "cifar-nano", photo.name, "--json").stdout)
    assert (
        found["model"] == "cifar-nano"
        and found["predictions"][0]["classes"][0] in load_checkpoint("cifar-nano").classes
    )
    assert lsag("explain", "cifar-nano", photo.name).returncode == 0
    for option, ending in (("--onnx", "onnx"), ("--safetensors", "safetensors")):
        done = lsag("export", "cifar-nano", option)
        assert f"cifar-nano.{ending}: cifar-nano" in done.stdout, done.stderr
        again = json.loads(lsag("predict", f"cifar-nano.{ending}", photo.name, "--json").stdout)
        assert again["predictions"][0]["classes"] == found["predictions"][0]["classes"]
    assert {path.name for path in photo.parent.iterdir()} == {
        *("photo.png", "photo-explained.png", "cifar-nano.onnx", "cifar-nano.safetensors")
    }


def test_a_training_starts_from_a_name(lsag, tmp_path):
    done = lsag("train", "--init-from", "digits-nano", "--epochs", 1, "--out", "run")
    assert "weights from digits-nano" in done.stderr and done.returncode == 0
    assert load_checkpoint(tmp_path / "run/best.pt").metrics["top1"] > 0.9


def test_a_photograph_is_classified_in_python(photo):
    model = lsag.load("cifar-nano")
    found = model.predict(photo, top_k=2)
    assert len(found.classes) == 2 and found.probabilities == tuple(sorted(found.probabilities, reverse=True))
    opened = model.predict(Image.open(photo), top_k=2)
    assert (opened.classes, opened.probabilities) == (found.classes, found.probabilities)
    logits = model(model.transform(Image.open(photo))[None])
    assert model.classes[logits.argmax()] == found.classes[0]
    with pytest.raises(InputError, match="cannot read image"):
        model.predict(photo.parent / "missing.png")


def test_timm_creates_trained_models(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model("lsag_cifar_nano", pretrained=True).eval()
    assert torch.equal(model(images), load_checkpoint("cifar-nano").model(images))
    assert "state_dict" not in model.pretrained_cfg
    other = timm.create_model("lsag_cifar_nano", pretrained=True, num_classes=3, in_chans=1, img_size=64).eval()
    assert other(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    assert torch.equal(other.stages[0].blocks[1].mlp[0].weight, model.stages[0].blocks[1].mlp[0].weight)
    torch.save(other.state_dict(), tmp_path / "own.pt")  # as timm's --pretrained-path gives it, of another image size
    own = {"file": str(tmp_path / "own.pt"), "num_classes": 3, "input_size": (1, 64, 64)}
    arguments = {"num_classes": 3, "in_chans": 1, "img_size": 64, "pretrained_cfg_overlay": own}
    again = timm.create_model("lsag_cifar_nano", pretrained=True, **arguments)
    assert_equal(again.state_dict(), other.state_dict())
    with pytest.raises(InputError, match=r"no trained weights of cifar-tiny .* lsag train --preset cifar-tiny"):
        timm.create_model("lsag_cifar_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("in1k-tiny", ("no trained weights of in1k-tiny", "lsag train --preset in1k-tiny", "lsag convert FILE")),
        ("cifar-nanno", ("no file 'cifar-nanno'", "did you mean 'cifar-nano'?")),
        ("elsewhere", ("no file 'elsewhere'", "cifar-nano, digits-nano")),
    ],
)
@pytest.mark.parametrize("command", ["eval", "explain", "export --onnx", "predict", "train --init-from"])
def test_a_name_without_weights_is_refused_in_one_line(lsag, photo, command, name, words):
    images = [photo.name] if command in ("explain", "predict") else []
    assert_refused(lsag(*command.split(), name, *images), 3, *words)


def test_a_file_or_folder_of_that_name_is_meant(lsag, tmp_path):
    (tmp_path / "cifar-nano").mkdir()
    assert_refused(lsag("eval", "cifar-nano"), 3, "cannot read checkpoint cifar-nano", "folder")
    assert model_file("runs/cifar-nano").parent.name == "runs" and model_file("cifar-nano.pt").suffix == ".pt"


def test_weights_that_are_not_those_of_the_card_are_refused(monkeypatch, tmp_path):
    for name in ("digits-nano.safetensors", "digits-nano.toml"):
        (tmp_path / name).write_bytes((FILES / name).read_bytes())
    monkeypatch.setattr(lsag.weights, "FILES", tmp_path)
    assert load_checkpoint("digits-nano").classes == tuple("0123456789")
    other = load_checkpoint("digits-nano")
    next(other.model.parameters()).data.mul_(2)
    lsag.checkpoint.save_safetensors(tmp_path / "digits-nano.safetensors", other)
    with pytest.raises(DamagedError, match="install lsag again"):
        load_checkpoint("digits-nano")
