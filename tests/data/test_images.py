import contextlib
import errno
import io
import os
import random
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from lsag import load_preset
from lsag.data import images
from lsag.data.images import open_image
from lsag.data.transforms import eval_transform, upright
from lsag.errors import InputError

MODES = {
    "L": np.full((4, 4), 200, np.uint8),
    "RGB": np.full((4, 4, 3), 200, np.uint8),
    "RGBA": np.full((4, 4, 4), 200, np.uint8),
    "LA": np.full((4, 4, 2), 200, np.uint8),
    "1": np.full((4, 4), True),
    "I;16": np.full((4, 4), 200 * 257, np.uint16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_kind_of_pixel_becomes_8_bit(tmp_path, mode, wanted):
    Image.fromarray(MODES[mode]).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png", wanted)
    assert image.mode == wanted
    assert np.unique(np.asarray(image)).tolist() == [255 if mode == "1" else 200]


def test_sixteen_bit_ramps_are_scaled_not_clipped(tmp_path):
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.asarray(open_image(tmp_path / "ramp.png", "L")).ravel().tolist() == list(range(256))
    transform = eval_transform(load_preset("digits-nano", {"model.image_size": 16, "data.eval_resize": 16}))
    with Image.open(tmp_path / "ramp.png") as image:  # as Pillow opens it
        assert transform(image).flatten().tolist() == list(range(256))


def test_greys_of_other_depths(tmp_path):
    """12 bits, 16 bits with white as zero, and what has no agreed range."""
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    pairs = levels.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    write_tiff(tmp_path / "12.tif", packed.astype(np.uint8).tobytes(), bits=12, white=1)
    assert np.array_equal(open_image(tmp_path / "12.tif", "L"), levels.astype(int) * 255 // 4095)
    write_tiff(tmp_path / "white.tif", (levels * 16).astype("<u2").tobytes(), bits=16, white=0)
    assert np.array_equal(open_image(tmp_path / "white.tif", "L"), (65535 - levels.astype(int) * 16) // 257)
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 4095\n" + levels.astype(">u2").tobytes())
    found = np.asarray(open_image(tmp_path / "a.pgm", "L")).astype(int)
    assert np.abs(found - levels.astype(int) * 255 // 4095).max() <= 1 and found[-1, -1] == 255
    for kind in (np.int32, np.float32):
        image = Image.fromarray(np.full((16, 16), 200, kind))
        image.save(tmp_path / "deep.tif")
        with pytest.raises(InputError, match="pixels of 32 bits have no agreed range; save it with 8 or 16"):
            open_image(tmp_path / "deep.tif", "L")
        with pytest.raises(ValueError, match="no agreed range"):
            eval_transform(load_preset("digits-nano"))(image)


def write_tiff(path, pixels, *, bits, white):
    """A grey TIFF file of 64 x 64 in one strip."""
    tags = [
        (256, 64),
        (257, 64),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 122),
        (277, 1),
        (278, 64),
        (279, len(pixels)),
    ]
    table = b"".join(struct.pack("<HHLL", tag, 4 if tag == 279 else 3, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<LH", 8, len(tags)) + table + bytes(4) + pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_photographs_are_turned_upright(tmp_path, orientation, suffix):
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (1, 2), dtype=np.uint8), np.ones((8, 8), np.uint8))
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    found = open_image(tmp_path / f"a.{suffix}", "L")
    assert found.size == expected.shape[::-1] and np.abs(np.asarray(found) - expected).max() < 8
    assert upright(found, mode="L").size == found.size, "turned twice"
    with (tmp_path / f"a.{suffix}").open("rb") as file:
        assert np.array_equal(upright(Image.open(file), mode="L"), found)


ODD_TAGS = {
    "a text for a number": (0x0100, 2, b"wide"),
    "a rational of zero": (0x011A, 5, bytes(8)),
    "bytes for a text": (0x010F, 7, b"\xff\xfe\x00"),
    "a type that is unknown": (0x0110, 99, b"abcd"),
    "an offset beyond the end": (0x8769, 4, b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize(("tag", "kind", "value"), ODD_TAGS.values(), ids=ODD_TAGS)
def test_odd_metadata_end_nothing(tmp_path, tag, kind, value):
    count = {2: len(value), 5: 1, 7: len(value), 99: 1, 4: 1}[kind]
    entries = sorted([(0x0112, 3, 1, b"\x06\0\0\0"), (tag, kind, count, value)])
    table, extra = b"", b""
    for number, code, length, content in entries:
        if len(content) > 4:
            content, extra = struct.pack("<L", 8 + 2 + 24 + 4 + len(extra)), extra + content
        table += struct.pack("<HHL", number, code, length) + content.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + table + bytes(4) + extra
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg", "RGB").size == (8, 16)


def test_metadata_that_pillow_cannot_read_are_as_good_as_none(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0xx")
    with Image.open(tmp_path / "a.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    assert open_image(tmp_path / "a.png", "RGB").size == (16, 8)


def test_damaged_files_never_crash_the_decoder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "good.jpg", exif=exif)
    good, generator = (tmp_path / "good.jpg").read_bytes(), random.Random(0)
    for _ in range(500):
        changed = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        (tmp_path / "bad.jpg").write_bytes(changed)
        with contextlib.suppress(InputError):
            assert open_image(tmp_path / "bad.jpg", "RGB").mode == "RGB"


def test_what_is_no_image_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    Image.new("1", (300, 1)).save(tmp_path / "line.png")
    bad = {"zero.png": b"", "text.png": b"<html>", "cut.png": good[: len(good) // 2 + 10]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in [*bad, "bomb.png", "line.png", "absent.png"]:
        with pytest.raises(InputError, match=name):
            open_image(tmp_path / name, "RGB")


def test_large_photographs_are_scaled_down_while_they_are_decoded(tmp_path, monkeypatch):
    """Up to a limit that is named. Of other formats and of smaller photographs nothing changes."""
    monkeypatch.setattr(images, "MAX_PIXELS", 5_000)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 20_000)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 199, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg", progressive=True)
    assert open_image(tmp_path / "a.jpg", "RGB").size == (100, 50)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # by which Pillow refuses what is larger
        assert open_image(tmp_path / "a.jpg", "RGB").size == (100, 50)
    image.save(tmp_path / "a.png")
    image.resize((202, 100)).save(tmp_path / "b.jpg")
    for name, size in (("a.png", "199 x 100"), ("b.jpg", "202 x 100")):
        with pytest.raises(InputError, match=f"{name}: {size} is more than 50,000,000 pixels .JPEG: 200,000,000."):
            open_image(tmp_path / name, "RGB")
    image.crop((0, 0, 100, 50)).save(tmp_path / "a.jpg")
    assert np.array_equal(open_image(tmp_path / "a.jpg", "RGB"), Image.open(tmp_path / "a.jpg"))


@pytest.mark.parametrize("kind", ["ico", "icns"])
def test_an_icon_that_holds_a_bomb_is_refused_before_it_is_decoded(tmp_path, kind):
    inner = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(inner, "PNG")
    data = inner.getvalue()
    if kind == "ico":
        header = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHLL", 16, 16, 0, 0, 1, 32, len(data), 22)
    else:
        header = b"icns" + struct.pack(">L", len(data) + 16) + b"ic07" + struct.pack(">L", len(data) + 8)
    (tmp_path / f"a.{kind}").write_bytes(header + data)
    decoding = mock.patch("PIL.PngImagePlugin.PngImageFile.load", side_effect=AssertionError("decoded"))
    with decoding, pytest.raises(InputError, match="more than 50,000,000 pixels"):
        open_image(tmp_path / f"a.{kind}", "RGB")


def test_an_image_is_not_to_blame_for_open_files(tmp_path, monkeypatch):
    def no_more_files(path, mode):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", no_more_files)
    with pytest.raises(OSError, match="Too many open files"):
        open_image(tmp_path / "a.png", "L")
