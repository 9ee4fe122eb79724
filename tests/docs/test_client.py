"""The client of the documentation, which shares no code with lsag, sees what lsag sees."""

import importlib.util
import io
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lsag import load_checkpoint, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from lsag.data.transforms import eval_transform
from lsag.inference.evaluate import evaluate_file
from lsag.inference.export import describe, export_onnx
from tests.conftest import ROOT, randomise, shared

spec = importlib.util.spec_from_file_location("client", ROOT / "docs/client.py")
client = importlib.util.module_from_spec(spec)
spec.loader.exec_module(client)


def described(preset):
    """What the metadata of an export says of its input."""
    return describe(Checkpoint(torch.nn.Identity(), preset, ()), half=False, batch=None, raw_input=False)["input"]


@pytest.mark.parametrize("size", [(300, 400), (401, 257), (256, 256), (90, 57), (224, 1001)])
@pytest.mark.parametrize("name", ["in1k-tiny", "cifar-nano", "digits-nano"])
def test_images_are_prepared_alike(name, size):
    preset = load_preset(name)
    rule = described(preset)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours = eval_transform(preset)(image.convert(rule["mode"])).permute(1, 2, 0).numpy()
    assert np.array_equal(client.prepare(image, rule), ours)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_alike(tmp_path, orientation):
    """Beside a tag that cannot be written again: a text for a number."""
    tags = struct.pack("<HHL4s", 0x0100, 2, 4, b"wide") + struct.pack("<HHLL", 0x0112, 3, 1, orientation)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + tags + bytes(4)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    preset = load_preset("cifar-nano")
    rule = described(preset)
    ours = eval_transform(preset)(Image.open(tmp_path / "a.png")).permute(1, 2, 0).numpy()
    assert np.array_equal(client.prepare(Image.open(tmp_path / "a.png"), rule), ours)


def test_a_photograph_with_damaged_metadata_is_left_as_it_is(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0xx")
    assert client.upright(Image.open(tmp_path / "a.png")).size == (16, 8)


@pytest.mark.slow
def test_the_client_predicts_what_eval_predicts_on_a_thousand_photographs(tmp_path):
    """Of CIFAR-10 (JPEG). The weights are random: what is shown is that the two agree, not how good they are."""
    archive, counts = shared("data/cifar10-jpeg.tar.xz"), {}
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        for member in files:
            parts = member.name.split("/")
            if member.isfile() and "test" in parts and counts.setdefault(parts[-2], 0) < 100:
                counts[parts[-2]] += 1
                place = tmp_path / "data/val" / parts[-2]
                place.mkdir(parents=True, exist_ok=True)
                (place / parts[-1]).write_bytes(files.extractfile(member).read())
    assert sorted(counts.values()) == [100] * 10
    checkpoint = random_checkpoint(load_preset("cifar-nano", dataset="folder").with_classes(10))
    randomise(checkpoint.model)
    save_checkpoint(tmp_path / "a.pt", Checkpoint(checkpoint.model, checkpoint.preset, tuple(sorted(counts))))
    export_onnx(load_checkpoint(tmp_path / "a.pt"), tmp_path / "a.onnx")
    expected = evaluate_file(tmp_path / "a.pt", data_dir=tmp_path / "data", device="cpu")
    assert expected.metrics.count == 1000 and len(set(expected.metrics.predictions.tolist())) > 1
    done = subprocess.run(
        [sys.executable, ROOT / "docs/client.py", "a.onnx", *expected.images],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert [path for _, path in found] == expected.images
    names = [expected.model.classes[index] for index in expected.metrics.predictions]
    assert [name for name, _ in found] == names
