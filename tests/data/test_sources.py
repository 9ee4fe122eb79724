import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from lsag.data.folders import decodable
from lsag.data.images import open_image
from lsag.data.sources import number_as, placeholder_classes
from lsag.data.splits import open_split
from lsag.errors import InputError, UnavailableError, UsageError
from lsag_cli.predict import find_images


def names_of(source):
    return [source.name(index) for index in range(len(source))]


def test_digits_are_split_once_and_for_all():
    train, held_out = (open_split("digits", None, train=flag, mode="L") for flag in (True, False))
    assert (len(train), len(held_out), train.classes) == (1437, 360, list("0123456789"))
    assert np.bincount(held_out.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    both = np.concatenate([train.images, held_out.images])
    assert len({image.tobytes() for image in both}) == 1797, "an image is in both"
    # Pinned: another split would make reported accuracies incomparable.
    assert held_out.labels[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8]


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
    everything = names_of(open_split("folder", folder, train=True, mode="L"))
    assert sorted(names_of(train) + names_of(held_out)) == everything and held_out.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and held_out.labels.tolist() == [0, 1]
    assert (
        names_of(held_out) == names_of(parts()[1]) != names_of(other) and train.fingerprint() != held_out.fingerprint()
    )
    assert train.name(5).endswith("png") and train.load(5)[1] == 1
    shutil.copy(folder / "train/dog/0.png", folder / "train/dog/new.png")
    assert parts()[1].name(0) == held_out.name(0)
    for index in range(1, 4):
        (folder / f"train/cat/{index}.png").unlink()
    with pytest.raises(InputError, match=r"class cat of .*train has one image, which cannot be split — add images"):
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

    assert numbered(["cat", "dog"]).labels.tolist() == [0, 0, 1, 1]
    source = numbered(["dog", "emu", "cat"])
    assert source.labels.tolist() == [2, 2, 0, 0] and source.classes == ["dog", "emu", "cat"]
    assert numbered(placeholder_classes(2)).labels.tolist() == [0, 0, 1, 1]
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
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [1, 1]
    for image in (folder / "train/cat").iterdir():
        image.rename(image.with_suffix(".heic"))
    unused = r"\(not used: 4 \.heic \(not decodable here\)\)"
    with pytest.raises(InputError, match=rf"train/cat has no images {unused} — add images, or remove the class every"):
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


def test_digits_serve_colour_models_too():
    assert open_split("digits", None, train=False, mode="RGB").load(0)[0].mode == "RGB"
