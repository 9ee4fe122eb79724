import contextlib
import errno
import io
import os
import random
import shutil
import struct
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision import datasets

from lsag import load_preset
from lsag.data import sources
from lsag.data.sources import decodable, number_as, open_image, open_split, placeholder_classes
from lsag.data.transforms import eval_transform, upright
from lsag.errors import InputError, UnavailableError, UsageError
from lsag_cli.predict import find_images


def test_digits_are_split_once_and_for_all():
    train, held_out = (open_split("digits", None, train=flag, mode="L") for flag in (True, False))
    assert (len(train), len(held_out), train.classes) == (1437, 360, list("0123456789"))
    assert np.bincount(held_out.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    both = np.concatenate([train.images, held_out.images])
    assert len({image.tobytes() for image in both}) == 1797, "an image is in both"
    # Pinned: another split would make reported accuracies incomparable.
    assert held_out.labels[:8] == [7, 6, 3, 7, 7, 3, 2, 8]


def test_folders_are_read_in_order(folder):
    source = open_split("folder", folder, train=True, mode="RGB")
    assert source.classes == ["cat", "dog"] and len(source) == 8
    assert source.fingerprint() == "6665a19e812a2970faf4db213053c13e", "runs could no longer be resumed"
    image, label = source.load(5)
    assert (image.mode, image.size, label) == ("RGB", (10, 12), 1)
    assert source.name(5).endswith("dog/1.png")
    assert open_split("folder", folder, train=False, mode="L").load(0)[0].mode == "L"


def test_test_folders_serve_where_there_is_no_val(folder):
    (folder / "val").rename(folder / "test")
    assert len(open_split("folder", folder, train=False, mode="RGB")) == 4
    with pytest.raises(InputError, match=r"no imagenet in .*: expected .*val/CLASS/"):
        open_split("imagenet", folder, train=False, mode="RGB")


def test_what_is_not_used_is_counted_by_the_reason(folder):
    plain = open_split("folder", folder, train=True, mode="RGB")
    assert plain.notes == ()
    cat = folder / "train/cat"
    (cat / "._0.png").write_text("resource fork")
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (cat / name).write_text("no image here")
    os.mkfifo(cat / "pipe")
    for hidden in ("train/cat/.ipynb_checkpoints", "train/.cache", "train/@eaDir", "train/dog/__MACOSX"):
        shutil.copytree(folder / "train/dog", folder / hidden)
    shutil.copy(cat / "0.png", folder / "train/0.png")
    (cat / "linked").symlink_to(folder / "train/dog")
    source = open_split("folder", folder, train=True, mode="RGB")
    assert source.classes == ["cat", "dog"] and source.fingerprint() == plain.fingerprint()
    (line,) = source.notes
    assert line.startswith(f"not used in {folder}/train: 5 hidden, 2 .heic (not decodable here), ")
    for reason in ("1 .txt (not dec", "1 without an extension (", "1 linked folder,", "1 in no class folder"):
        assert reason in line


def test_every_kind_of_file_that_pillow_decodes_is_an_image(folder):
    """Ten of fifty images were left out for being called .jfif."""
    image = Image.open(folder / "train/cat/0.png")
    for suffix in (".jfif", ".gif", ".tga", ".JPE", ".jp2"):
        image.save(folder / f"train/cat/more{suffix}")
    source = open_split("folder", folder, train=True, mode="RGB")
    assert len(source) == 13 and not source.notes
    for index in range(len(source)):
        assert source.load(index)[0].size == (10, 12)
    assert decodable() >= {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert not decodable() & {".pdf", ".eps", ".mpg", ".h5", ".wmf", ".txt", ".heic"}


@pytest.fixture
def unreadable(folder):
    """A folder of a split that this user may not read. Root reads all, so the test becomes somebody else."""
    moved = Path(tempfile.mkdtemp(prefix="lsag-test-"))
    shutil.copytree(folder, moved, dirs_exist_ok=True)
    moved.chmod(0o755)
    (moved / "train/cat/more").mkdir()
    (moved / "train/cat/more").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield moved
    os.seteuid(user)
    shutil.rmtree(moved)


def test_folders_that_cannot_be_read_are_refused(unreadable):
    """Their images would be missing from the training without a word."""
    with pytest.raises(InputError, match=r"cannot read .*/train/cat/more: Permission denied"):
        open_split("folder", unreadable, train=True, mode="RGB")
    with pytest.raises(InputError, match=r"cannot read .*/more/train: Permission denied"):
        open_split("folder", unreadable / "train/cat/more", train=True, mode="RGB")
    with pytest.raises(InputError, match=r"cannot read .*/a.png: Permission denied"):
        next(find_images([f"{unreadable}/train/cat/more/a.png"], Counter()))
    with pytest.raises(InputError, match=r"cannot read image .*: Permission denied"):
        open_image(unreadable / "train/cat/more/a.png", "RGB")


def test_a_share_of_each_class_is_held_out(folder):
    def parts(seed=0):
        return [
            open_split("folder", folder / "train", train=train, mode="L", val_split=0.3, seed=seed)
            for train in (True, False)
        ]

    (train, held_out), (_, other) = parts(), parts(seed=2)
    everything = open_split("folder", folder, train=True, mode="L").paths
    assert sorted(train.paths + held_out.paths) == everything and held_out.classes == ["cat", "dog"]
    assert train.labels == [0, 0, 0, 1, 1, 1] and held_out.labels == [0, 1]
    assert held_out.paths == parts()[1].paths != other.paths and train.fingerprint() != held_out.fingerprint()
    assert train.name(5).endswith("png") and train.load(5)[1] == 1
    shutil.copy(folder / "train/dog/0.png", folder / "train/dog/new.png")
    assert parts()[1].paths[0] == held_out.paths[0]
    for index in range(1, 4):
        (folder / f"train/cat/{index}.png").unlink()
    with pytest.raises(InputError, match=r"cat has one image, which cannot be split — add images"):
        parts()


def test_what_is_split_already_is_not_split_again(folder):
    with pytest.raises(UsageError, match=r"has train/CLASS/ — --val-split 0, or name the folder"):
        open_split("folder", folder, train=True, mode="L", val_split=0.3)
    assert len(open_split("folder", folder, train=False, mode="L", val_split=0.3)) == 4
    with pytest.raises(InputError, match=r"no image folder in .* or hold out a share of each .* with --val-split 0.2"):
        open_split("folder", folder / "train", train=True, mode="L")


def test_links_to_folders_are_not_followed(folder):
    (folder / "val/cat/loop").symlink_to(folder)
    (folder / "val/cow").symlink_to(folder / "val/dog")
    source = open_split("folder", folder, train=False, mode="RGB")
    assert source.classes == ["cat", "cow", "dog"] and len(source) == 6


def test_missing_and_wrong_data_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="1000"):
        (folder / "imagenet").mkdir()
        open_split("imagenet", folder, train=True, mode="RGB")
    (folder / "train/empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        open_split("folder", folder, train=True, mode="RGB")
    with pytest.raises(InputError, match="no cifar10 in"):
        open_split("cifar10", tmp_path / "nowhere", train=True, mode="RGB", download=False)
    with pytest.raises(UsageError, match="did you mean 'cifar10'"):
        open_split("cifar", tmp_path, train=False, mode="RGB")


def test_labels_are_numbered_by_the_names_of_the_classes(folder):
    def numbered(classes):
        source = open_split("folder", folder, train=False, mode="RGB")
        number_as(classes, source, whose="the model", where="val", fix="rename it")
        return source

    assert numbered(["cat", "dog"]).labels == [0, 0, 1, 1]
    source = numbered(["dog", "emu", "cat"])
    assert source.labels == [2, 2, 0, 0] and source.classes == ["dog", "emu", "cat"]
    assert numbered(placeholder_classes(2)).labels == [0, 0, 1, 1]
    with pytest.raises(InputError, match="the model has 3 classes, val has 2"):
        numbered(placeholder_classes(3))
    with pytest.raises(
        InputError, match=r"^the model does not know 'cat' of val, which lacks 'cow', 'emu' — rename it$"
    ):
        numbered(["cow", "dog", "emu"])
    with pytest.raises(InputError, match=r"^the model does not know 'dog' of val — rename it$"):
        numbered(["cat"])
    for name in ("val", "train"):
        (folder / name / "cat").rename(folder / name / "e\u0301")
    with pytest.raises(InputError, match="look alike differ in their Unicode form, NFC or NFD"):
        numbered(["\xe9", "dog"])


def test_a_class_may_lack_images_in_the_evaluation_split_alone(folder):
    for image in (folder / "val/cat").iterdir():
        image.unlink()
    source = open_split("folder", folder, train=False, mode="RGB")
    assert source.classes == ["cat", "dog"] and source.labels == [1, 1]
    for image in (folder / "train/cat").iterdir():
        image.rename(image.with_suffix(".heic"))
    with pytest.raises(InputError, match=r"train/cat has no images \(not used: 4 \.heic \(not decodable here\)\)"):
        open_split("folder", folder, train=True, mode="RGB")
    for image in (folder / "val/dog").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="val has no images in folders of classes"):
        open_split("folder", folder, train=False, mode="RGB")


def test_a_failed_download_is_one_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable\nwith details")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    with pytest.raises(
        UnavailableError, match=r"could not be downloaded: Network is unreachable — fetch http\S+cifar-10"
    ):
        open_split("cifar10", tmp_path / "data", train=True, mode="RGB")
    assert not (tmp_path / "data").exists()


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


def test_digits_serve_colour_models_too():
    assert open_split("digits", None, train=False, mode="RGB").load(0)[0].mode == "RGB"


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
    monkeypatch.setattr(sources, "MAX_PIXELS", 5_000)
    monkeypatch.setattr(sources, "MAX_JPEG_PIXELS", 20_000)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 199, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg", progressive=True)
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
