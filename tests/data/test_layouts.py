"""The same images in every layout, and what is wrong with files of each."""

import bz2
import gzip
import json
import logging
import lzma
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import fsspec
import pytest

import lsag.data.storage
from lsag.config import parse_dataset
from lsag.data.sources import Names
from lsag.data.splits import open_split
from lsag.errors import InputError, UnavailableError, UnreachableError, UsageError
from tests.conftest import TINY
from tests.layouts import (
    LAYOUTS,
    as_one_tar,
    as_parquet,
    as_table,
    as_tar_of_tars,
    as_webdataset,
    images_of,
    sample,
    write_tar,
)


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Caches that are empty, and no network."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if datasets := pytest.importorskip("datasets"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "hf"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def opened(dataset, data_dir=Path(), *, train=True, **options):
    return open_split(dataset, Path(data_dir), train=train, mode="RGB", **options)


def contents(source):
    """The pixels of each image with the name of its class, in any order."""
    return sorted((source.classes[label], image.tobytes()) for image, label in map(source.load, range(len(source))))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same(folder, layout):
    dataset = LAYOUTS[layout](folder, folder)
    for train in (True, False):
        plain, source = opened("folder", folder, train=train), opened(dataset, train=train)
        assert source.classes == ["cat", "dog"] and contents(source) == contents(plain)
        assert [label for _, label in map(source.load, range(len(source)))] == source.labels.tolist()
        assert source.fingerprint() == opened(dataset, train=train).fingerprint()
        assert not source.notes
        packed = source.packed()
        assert contents(packed) == contents(plain) and packed.fingerprint() == source.fingerprint()
        again = pickle.loads(pickle.dumps(source))  # as workers get it where they are not forked
        assert contents(again) == contents(plain)
    train, held_out = (opened(dataset, train=train, val_split=0.3) for train in (True, False))
    assert (len(train), len(held_out)) == (6, 2)
    assert sorted(contents(train) + contents(held_out)) == contents(opened(dataset))
    assert contents(opened(dataset, train=False, val_split=0.3, seed=5)) != contents(held_out)


def test_other_images_have_another_fingerprint(folder):
    datasets = {layout: make(folder, folder) for layout, make in LAYOUTS.items() if "tar of" not in layout}
    before = {layout: opened(dataset).fingerprint() for layout, dataset in datasets.items()}
    (folder / "train/dog/3.png").unlink()
    for layout, make in LAYOUTS.items():
        if layout in before:
            assert opened(make(folder, folder)).fingerprint() != before[layout], layout


def test_names_are_packed():
    given = ["a", "", "\udcff", "é" * 1000, "b/c"]
    names = Names(given)
    assert list(names) == given and len(names) == 5 and names[3] == given[3]


# tar


def test_shards_are_named_by_patterns(folder, monkeypatch):
    as_webdataset(folder, folder, per_shard=2)
    whole = contents(opened("folder", folder))
    monkeypatch.chdir(folder)
    for pattern in ("train/{000..003}.tar", "train/{000,001,002,003}.tar", "train/*.tar", "train/00[0-3].tar"):
        source = opened(f"tar:{pattern}")
        assert contents(source) == whole and source.shards.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(opened("tar:train/{001..002}.tar")) == 4
    assert len(opened("tar:train/{001..002}.tar,val=val/*.tar", train=False)) == 4
    with pytest.raises(InputError, match=r"does not say which images are for evaluation — name their files with ,val="):
        opened("tar:train/*.tar", train=False)
    assert len(opened("tar:val/*.tar", train=False, only=True)) == 4
    assert len(opened("tar:train/*.tar,val=val/*.tar", train=False, only=True)) == 4
    assert len(opened("tar:train/*.tar,val=val/*.tar", train=False, only=True, split="train")) == 8
    with pytest.raises(InputError, match=r"cannot read train/004.tar: no such file"):
        opened("tar:train/{000..004}.tar")
    with pytest.raises(InputError, match=r"there are no files none\*.tar"):
        opened("tar:none*.tar")
    with pytest.raises(InputError, match=r"no tar files in .*: expected train/train/\*.tar — name them"):
        opened("tar:train")
    with pytest.raises(UsageError, match=r"is a folder of train/\*.tar and val/\*.tar — remove ,val="):
        opened(f"tar:{folder},val=other")
    with pytest.raises(InputError, match="names more than 100,000 files"):
        opened("tar:{0..9999999}.tar")


def test_an_index_is_kept_until_a_file_changes(folder, caches, monkeypatch, caplog):
    dataset = as_webdataset(folder, folder)
    monkeypatch.setattr("lsag.data.tar.REPORT_SECONDS", 0)
    before = contents(opened(dataset))
    assert "indexing tar files, once: 2 of 3 done" in caplog.text
    monkeypatch.setattr("lsag.data.tar._scan", None)
    assert contents(opened(dataset)) == before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    source = opened(dataset)
    cat = images_of(folder, "train")[0]
    write_tar(folder / "train/000.tar", sample(cat, "cow"))
    assert opened(dataset).classes == ["cat", "cow", "dog"]
    with pytest.raises(InputError, match=r"cannot read image .*: .*000.tar has changed since it was opened"):
        source.load(0)
    for index in (caches / "lsag").iterdir():
        index.write_bytes(index.read_bytes()[:-100])
    assert opened(dataset).classes == ["cat", "cow", "dog"]
    for index in (caches / "lsag").iterdir():
        index.unlink()
    (caches / "lsag").rmdir()
    (caches / "lsag").write_text("not a folder")
    assert len(opened(dataset)) == 6


def test_labels_are_numbers_or_names(folder):
    images = images_of(folder, "train")
    labels = ["10", "2", "2", "10", "0", "2", "0", "10"]
    shard = folder / "numbers/a.tar"
    write_tar(shard, [file for image, label in zip(images, labels, strict=True) for file in sample(image, label)])
    source = opened(f"tar:{shard}")
    assert source.classes == ["0", "2", "10"]
    assert [source.classes[label] for label in source.labels] == labels
    names = shard.with_name("classes.txt")
    names.write_text("\n".join(f"name {number}" for number in range(11)))
    source = opened(f"tar:{shard}")
    assert len(source.classes) == 11 and source.labels.tolist() == [int(label) for label in labels]
    names.rename(folder / "classnames.txt")
    assert opened(f"tar:{shard}").classes == source.classes
    (folder / "classnames.txt").rename(folder / "train/classes.txt")
    assert opened(f"tar:{shard}").classes == source.classes, "those of the training shards"
    assert opened(as_webdataset(folder, folder)).classes == ["cat", "dog"], "which are no numbers"
    (folder / "few.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"has the label '10', '2', which is no class"):
        opened(f"tar:{shard},classes={folder}/few.txt")
    (folder / "few.txt").write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(InputError, match=r"cannot read .*few.txt: .* — save it in UTF-8"):
        opened(f"tar:{shard},classes={folder}/few.txt")
    (folder / "few.txt").write_text("a\na\n")
    with pytest.raises(InputError, match=r"few.txt names a twice"):
        opened(f"tar:{shard},classes={folder}/few.txt")


def test_labels_in_json_are_found(folder):
    dataset = as_webdataset(folder, folder, kind="json")
    assert contents(opened(dataset)) == contents(opened("folder", folder))
    assert contents(opened(f"{dataset},label=label")) == contents(opened("folder", folder))
    with pytest.raises(InputError, match=r"cat-0 in .*000.tar has no label — say which counts: ,label=cls or"):
        opened(f"{dataset},label=other")
    image = images_of(folder, "train")[0]
    pixels, number = sample(image, "3")
    other = ("cat-0.json", json.dumps({"label": 4, "name": "cat"}).encode())
    shard = write_tar(folder / "both.tar", [pixels, number, other])
    with pytest.raises(InputError, match=r"cat-0 in .*both.tar has two labels, 3 and 4 — say which counts: ,label=cls"):
        opened(f"tar:{shard}")
    assert opened(f"tar:{shard},label=cls").classes == ["3"]
    assert opened(f"tar:{shard},label=name").classes == ["cat"]
    for content, reason in (
        (b"{", "Expecting"),
        (b'{"label": [1]}', "neither a number"),
        (b'{"label": " "}', "empty"),
        (b"[]", "no object with fields"),
        (b'"label"', "no object with fields"),
    ):
        shard = write_tar(folder / "bad.tar", [pixels, ("cat-0.json", content)])
        with pytest.raises(InputError, match=rf"cat-0.json in .*bad.tar holds no label: {reason}"):
            opened(f"tar:{shard}")


def test_what_is_wrong_with_a_sample_is_said_with_its_key(folder):
    cat, dog = images_of(folder, "train")[0], images_of(folder, "train")[-1]
    (pixels, number), (other, other_number) = sample(cat, "0"), sample(dog, "1")
    for files, message in (
        ([pixels, number, other], "dog-3 in .* has no label — add dog-3.cls"),
        ([pixels, number, number], "cat-0 in .* has two files .cls"),
        ([pixels, number, ("cat-0.jpg", pixels[1])], "cat-0 in .* has two images, cat-0.png and cat-0.jpg"),
        ([pixels, ("cat-0.cls", b"")], "cat-0.cls in .* holds no label: empty"),
        ([pixels, ("cat-0.cls", b"\xff\xfe")], "cat-0.cls in .* holds no label: .*utf-8"),
        ([pixels, ("cat-0.cls", b"-1")], "negative label"),
        ([pixels, ("cat-0.cls", b"1\n2")], "has the label '1.n2', which has several lines"),
        (
            [pixels, ("cat-0.cls", "\xe9".encode()), other, ("dog-3.cls", "e\u0301".encode())],
            "which differ in their Unicode form, NFC or NFD — write it in one way",
        ),
        ([pixels, number, other, ("dog-3.cls", b"00")], "has the labels '0', '00', which are one number"),
        (
            [("cat/0.png", pixels[1]), ("cat/0.png", pixels[1])],
            "has cat/0.png twice — make it anew: tar -r and -u keep",
        ),
        ([("cat.png", pixels[1])], "cat.png in .* has no label — add cat.cls, or a folder for each class"),
        ([("train/cat/0.png", pixels[1]), ("val/cat/0.png", pixels[1])], "two folders of the class cat, train/cat and"),
        ([("notes.txt", b"")], "there are no images in .*not used: 1 .txt"),
        ([], "there are no images in"),
    ):
        shard = write_tar(folder / "bad.tar", files)
        with pytest.raises(InputError, match=message):
            opened(f"tar:{shard}")
    hidden = [("._cat-0.png", b"resource fork"), ("text.txt", b""), ("__MACOSX/cat-0.png", b"")]
    source = opened(f"tar:{write_tar(folder / 'good.tar', [pixels, number, *hidden, other_number])}")
    assert len(source) == 1 and source.notes[0].endswith("2 hidden, 1 .txt, 1 unmatched label")
    write_tar(folder / "mixed/1.tar", [("cat/0.png", pixels[1])])
    write_tar(folder / "mixed/0.tar", [pixels, number])
    with pytest.raises(InputError, match=r"0.tar has labels in files of their own, .*1.tar has none"):
        opened(f"tar:{folder}/mixed/*.tar")


@pytest.mark.parametrize("make", [as_webdataset, as_tar_of_tars])
def test_a_tar_file_that_is_not_whole_is_refused_at_any_length(folder, make):
    """tarfile takes whatever is no header for the end, so that the images behind it would be missing."""
    make(folder, folder)
    whole = next(path for path in (folder / "train.tar", folder / "train/000.tar") if path.exists())
    content = whole.read_bytes()
    with tarfile.open(whole) as archive:
        archive.getmembers()
        end = archive.offset
    cut = folder / "cut.tar"
    for length in {0, 1, 511, 512, 700, end // 1024 * 512, end - 512, end - 1, end, end + 511}:
        cut.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"cut.tar.* is not a whole tar file.* — copy it again"):
            opened(f"tar:{cut}")
    damaged = bytearray(content)
    damaged[end - 1024 * 2 : end] = b"\x01" * (1024 * 2)
    cut.write_bytes(damaged)
    with pytest.raises(InputError, match=r"is not a whole tar file|goes on after its end mark"):
        opened(f"tar:{cut}")
    cut.write_bytes(content + content)
    with pytest.raises(InputError, match="goes on after its end mark, as joined tar files do"):
        opened(f"tar:{cut}")
    cut.write_bytes(b"no tar file" * 1000)
    with pytest.raises(InputError, match="is not a whole tar file"):
        opened(f"tar:{cut}")
    for compressed in (gzip, bz2, lzma):
        cut.write_bytes(compressed.compress(content))  # whatever its name
        with pytest.raises(InputError, match=r"cut.tar is compressed, so that no image can be read on its own"):
            opened(f"tar:{cut}")


def test_folders_may_be_called_like_patterns(folder, monkeypatch):
    odd = folder / "a [b] *"
    odd.mkdir()
    as_webdataset(folder, odd)
    as_one_tar(folder, odd)
    whole = contents(opened("folder", folder))
    for dataset in (f"tar:{odd}", f"tar:{odd}/train.tar"):
        assert contents(opened(dataset)) == whole
    for dataset in ("tar:", "tar:train/*.tar", "tar:train/{000..002}.tar"):
        assert contents(opened(dataset, odd)) == whole
    with pytest.raises(InputError, match=r"cannot read .*train/003.tar: no such file"):
        opened("tar:train/{000..003}.tar", odd)
    with pytest.raises(InputError, match=r"there are no files .*/a \[b\] \*/none"):
        opened("tar:none*.tar", odd)


def test_other_files_in_a_tar_file_may_be_large(folder):
    image = images_of(folder, "train")[0].read_bytes()
    with (folder / "a.tar").open("wb") as file:
        for name, size in (("scan.npy", 2**31 + 512), ("cat/0.png", 2**31 + 512), ("cat/1.jpg", len(image))):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf())
            file.seek(size + -size % 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    with pytest.raises(InputError, match=r"cat/0.png in .*a.tar has 2,147,484,160 bytes, too many for an image"):
        opened(f"tar:{folder}/a.tar")
    assert len(opened(f"tar:{folder}/a.tar,image=jpg")) == 1


def test_names_in_a_tar_file_are_written_in_many_ways(folder):
    cat, dog = images_of(folder, "train")[0].read_bytes(), images_of(folder, "train")[-1].read_bytes()
    for one, other in (
        ("./cat/0.png", "././dog/0.png"),
        ("/cat/0.png", "/dog/0.png"),
        ("../cat/0.png", "../dog/0.png"),
    ):
        source = opened(f"tar:{write_tar(folder / 'a.tar', [(one, cat), (other, dog)])}")
        assert source.classes == ["cat", "dog"] and not source.notes
        assert source.name(0).endswith("a.tar/cat/0.png")
    inner = [write_tar(folder / f"{name}.tar", [("./0.png", cat), ("./._0.png", b"")]) for name in ("cat", "dog")]
    source = opened(f"tar:{write_tar(folder / 'all.tar', [(path.name, path.read_bytes()) for path in inner])}")
    assert source.classes == ["cat", "dog"] and source.notes[0].endswith(": 2 hidden")
    shard = write_tar(folder / "b.tar", [("0.JPG", cat), ("0.cls", b"0"), ("0.webp", cat)])
    assert opened(f"tar:{shard},image=.jpg").name(0).endswith("b.tar/0.JPG")
    with pytest.raises(InputError, match=r"there are no images in .*b.tar .not used: 1 .jpg, 1 .webp, 1 .cls. — check"):
        opened(f"tar:{shard},image=png")


def test_links_in_a_tar_file_are_a_note(folder):
    (folder / "train/dog/link.png").symlink_to("0.png")
    (folder / "train/dog/hard.png").hardlink_to(folder / "train/dog/0.png")
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "train", "train")
    source = opened(f"tar:{folder}/a.tar")
    assert len(source) == 8 and source.notes[0].endswith(": 2 links")


def test_a_file_stored_without_its_zeros_is_refused(folder):
    (folder / "cat").mkdir()
    with (folder / "cat/0.bmp").open("wb") as file:
        file.seek(10**6)
        file.write(b"end")
    for form in ("gnu", "posix"):
        subprocess.run(["tar", "-S", "-c", f"--format={form}", "-f", "a.tar", "cat"], cwd=folder, check=True)
        with pytest.raises(InputError, match=r"cat/0.bmp in .*a.tar is stored in parts, without its zeros"):
            opened(f"tar:{folder}/a.tar")


def test_tar_files_that_are_named_twice(folder):
    as_webdataset(folder, folder)
    with pytest.raises(InputError, match=r"the pattern .* names .*000.tar twice — name each file once"):
        opened(f"tar:{folder}/train/{{000,001,000}}.tar")
    dataset = f"tar:{folder}/*/*.tar,val={folder}/val/*.tar"
    assert opened(dataset, train=False).notes == (
        f"2 tar files are for training too, such as {folder}/val/000.tar: the accuracy counts their images",
    )
    assert (
        not opened(dataset).notes and not opened(f"tar:{folder}/train/*.tar,val={folder}/val/*.tar", train=False).notes
    )


# labels


def test_a_label_is_the_same_however_it_is_written(folder):
    images = images_of(folder, "train")[:4]
    words = ["\ufeff10", " 2\r\n", "2", "10\n"]
    files = [file for image, word in zip(images, words, strict=True) for file in sample(image, word)]
    source = opened(f"tar:{write_tar(folder / 'a.tar', files)}")
    assert source.classes == ["2", "10"] and source.labels.tolist() == [1, 0, 0, 1]
    table = folder / "a.csv"
    rows = [
        f"{image.relative_to(folder)}, {word}"
        for image, word in zip(images, ["10.0 ", "2.0", "2.0", "10.0"], strict=True)
    ]
    table.write_text("\n".join(["Path, Label", *rows]))
    source = opened(f"list:{table}")
    assert source.classes == ["2.0", "10.0"] and source.labels.tolist() == [1, 0, 0, 1]
    for word, message in (
        ("02.0", "has the labels '2.0', '02.0', which are one number — write it in one way"),
        ("NaN", "has the label nan among numbers — leave out images without a label"),
        ("-1.0", "has images with a negative label"),
        ("9" * 5000, None),
    ):
        table.write_text("\n".join(["path,label", *rows, f"train/dog/0.png,{word}"]))
        if message is None:
            assert opened(f"list:{table}").classes == ["2.0", "10.0", word]
            continue
        with pytest.raises(InputError, match=message):
            opened(f"list:{table}")


# tables


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_a_table_is_divided_as_its_header_is(folder, suffix):
    source = opened(as_table(folder, folder, suffix=suffix))
    assert contents(source) == contents(opened("folder", folder))


def test_tables_say_which_images_are_for_what(folder):
    dataset, table = as_table(folder, folder), folder / "images.csv"
    assert not opened(f"{dataset},val={table}", train=False).notes
    assert contents(opened(dataset, train=False)) == contents(opened("folder", folder, train=False))
    assert len(opened(dataset, train=False, split="train")) == 8
    with pytest.raises(InputError, match=r"no rows of the split other; its splits are train, val — add --split"):
        opened(dataset, train=False, split="other", only=True)
    lines = [line.rpartition(",")[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines))
    assert len(opened(dataset)) == len(opened(dataset, train=False, only=True)) == 12
    with pytest.raises(
        InputError, match=r"images.csv does not say which images are for evaluation — add a column split"
    ):
        opened(dataset, train=False)
    with pytest.raises(UsageError, match=r"has no column split — remove --split"):
        opened(dataset, train=False, split="val")
    (folder / "other.csv").write_text("\n".join(lines[:3]))
    source = opened(f"{dataset},val={folder}/other.csv", train=False)
    assert len(source) == 2 and source.notes == (
        f"2 images of {folder}/other.csv are for training too: the accuracy counts them",
    )
    assert len(opened(f"list:nowhere.csv,val={folder}/other.csv", train=False, only=True)) == 2
    assert len(opened(f"{dataset},val={folder}/other.csv")) == 12


def test_tables_are_read_as_other_programs_write_them(folder):
    table = folder / "a.csv"
    rows = [
        "train/cat/0.png,cat,train",
        "train/dog/0.png,dog ,Train ",
        "val/cat/0.png,cat,VAL",
        '"val/dog/0.png", "dog", "val"',
    ]
    table.write_text("\r\n".join(["\ufeffFILE , Class,Split", *rows, ",,", " ", ""]))
    for train, names in ((True, "train"), (False, "val")):
        source = opened(f"list:{table}", train=train)
        assert source.classes == ["cat", "dog"] and len(source) == 2 and names in source.name(1)
    assert len(opened(f"list:{table}", train=False, split="Train")) == 2
    for content, message in (
        ('path,label\ntrain/cat/0.png,"cat\ntrain/dog/0.png,dog\n', "cannot read table .*: unexpected end of data"),
        ('path,"label\n', "cannot read table .*: unexpected end of data"),
        ("path,label,Label\n", "has two columns label — rename one of them"),
        ("path,label\ntrain\\\\cat\\\\0.png,cat\n", "is not there — write paths with /"),
    ):
        table.write_text(content)
        with pytest.raises(InputError, match=message):
            opened(f"list:{table}")


def test_a_home_folder_is_found_where_no_shell_expands_it(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    as_webdataset(folder, folder)
    as_table(folder, folder)
    as_parquet(folder, folder)
    (folder / "b.csv").write_text("path,label\n~/train/cat/0.png,cat\n")
    datasets = ("tar:~", "tar:~/train/*.tar", "list:~/images.csv", f"list:{folder}/b.csv", "hf:~/parquet")
    assert [len(opened(dataset)) for dataset in datasets] == [8, 8, 8, 1, 8]


def test_a_pipe_is_no_file(folder):
    """To open one would wait for ever."""
    os.mkfifo(folder / "pipe")
    for dataset in (f"list:{folder}/pipe", f"tar:{folder}/pipe"):
        with pytest.raises(InputError, match=r"cannot read .*/pipe: not a regular file"):
            opened(dataset)


def test_an_index_is_kept_where_a_home_is_known(folder, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(UnavailableError, match=r"there is no home folder — set \$HOME or \$XDG_CACHE_HOME"):
        opened(as_webdataset(folder, folder))


def test_parquet_is_a_table_too(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import csv, parquet

    as_table(folder, folder)
    parquet.write_table(csv.read_csv(folder / "images.csv"), folder / "images.parquet")
    assert contents(opened(f"list:{folder}/images.parquet")) == contents(opened("folder", folder))
    table = pyarrow.table({"file": ["train/cat/0.png"], "n": [7], "nested": [[1]]})
    parquet.write_table(table, folder / "odd.parquet")
    assert opened(f"list:{folder}/odd.parquet,label=n").classes == ["7"]
    table = pyarrow.table(
        {"path": ["train/cat/0.png", "train/cat/1.png"], "image": [b"pixels"] * 2, "label": [1.0, float("nan")]}
    )
    parquet.write_table(table, folder / "ODD.PARQUET")
    with pytest.raises(InputError, match=r"has the label nan among numbers"):
        opened(f"list:{folder}/ODD.PARQUET")
    parquet.write_table(table.drop_columns("path"), folder / "odd.parquet")
    with pytest.raises(InputError, match=r"has no column path or image .first row: label. — name it"):
        opened(f"list:{folder}/odd.parquet")
    (folder / "odd.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"cannot read table .*odd.parquet"):
        opened(f"list:{folder}/odd.parquet")


def test_what_is_wrong_with_a_table_is_said_with_its_row(folder):
    table = folder / "bad.csv"
    first = "path,label,split\ntrain/cat/0.png,cat,train\n"
    for content, message in (
        ("", "has no column path or image .first row: . — give a table with a header"),
        (
            "train/cat/0.png,cat\n",
            "has no column path or image .first row: train/cat/0.png, cat. — name it: list:FILE,im",
        ),
        ("path,kind\na,b\n", "has no column label or class .*,label=COLUMN"),
        ("path,label\n", "names no images"),
        (first + "train/dog/0.png,,train\n", "row 3 of .* has no label — complete or remove the row"),
        (first + "train/dog/0.png\n", "row 3 of .* has no label"),
        (first + ",dog,train\n", "row 3 of .* has no image"),
        (first + "\ntrain/dog/0.png,dog\n", "row 4 of .* has no split"),
        (first + "train/cat/0.png,dog,train\n", "train/cat/0.png has two labels in .*, cat and dog"),
        ("path,label\nnowhere/0.png,cat\n", "nowhere/0.png, the first image of .*, is not there — give paths relative"),
    ):
        table.write_text(content)
        with pytest.raises(InputError, match=message):
            opened(f"list:{table}")
    table.write_bytes("path,label\ntrain/cat/0.png,Zürich\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"cannot read table .* — save it as CSV in UTF-8"):
        opened(f"list:{table}")
    with pytest.raises(InputError, match=r"cannot read .*nowhere.csv: no such file"):
        opened("list:nowhere.csv")
    with pytest.raises(UsageError, match="list: names no table"):
        opened("list:")
    table.write_text(first + "train/cat/0.png,cat,val\ntrain/cat/1.png,cat,train\ntrain/cat/1.png,cat,train\n")
    again, shared = opened(f"list:{table}").notes
    assert again.endswith("bad.csv names 2 images again") and shared.startswith("1 of them are in two splits")


# Hugging Face


def test_columns_of_a_dataset_are_found_or_named(folder):
    import datasets

    dataset = as_parquet(folder, folder)
    rows = datasets.load_dataset(f"{folder}/parquet")
    saved = rows.map(lambda row: {"other": row["label"]}).cast_column("other", datasets.ClassLabel(names=["x", "y"]))
    saved.save_to_disk(str(folder / "saved"))
    with pytest.raises(
        UsageError, match=r"has several columns of labels: label, other — name it: hf:NAME,label=COLUMN"
    ):
        opened(f"hf:{folder}/saved")
    source = opened(f"hf:{folder}/saved,label=label")
    assert contents(source) == contents(opened(dataset)) and source.fingerprint() != opened(dataset).fingerprint()
    assert opened(f"hf:{folder}/saved,label=other").classes == ["x", "y"]
    with pytest.raises(UsageError, match=r"has no column kind; it has image, label, other"):
        opened(f"hf:{folder}/saved,label=kind")
    rows["train"].remove_columns("label").save_to_disk(str(folder / "bare"))
    with pytest.raises(UsageError, match=r"has no column of labels: image"):
        opened(f"hf:{folder}/bare")
    rows["train"].remove_columns("image").save_to_disk(str(folder / "blind"))
    with pytest.raises(UsageError, match=r"has no column of images: label"):
        opened(f"hf:{folder}/blind")
    with pytest.raises(UsageError, match=r"has no split val or .*; it has train — evaluate another with --split NAME"):
        opened(f"hf:{folder}/blind", train=False)
    assert len(opened(f"hf:{folder}/saved,label=label,val=train", train=False)) == 8
    with pytest.raises(UsageError, match=r"the column label of .*saved holds no images: Unsupported cast"):
        opened(f"hf:{folder}/saved,label=label,image=label")
    with pytest.raises(InputError, match=r"saved was saved by save_to_disk and has no configuration other"):
        opened(f"hf:{folder}/saved:other,label=label")
    words = rows["train"].cast_column("label", datasets.Value("string"))
    words = words.map(lambda row, number: {"label": f"dog{' ' * (number % 2)}"}, with_indices=True)
    words.with_format("numpy", columns=["label"]).save_to_disk(str(folder / "words"))
    source = opened(f"hf:{folder}/words")
    assert source.classes == ["dog"] and source.load(0)[0].size == (10, 12)
    words.map(lambda row: {"label": " "}).save_to_disk(str(folder / "empty"))
    with pytest.raises(InputError, match=r"empty, split train has images without a label"):
        opened(f"hf:{folder}/empty")


def test_files_of_no_dataset_in_particular_are_read(folder):
    as_parquet(folder, folder)
    assert contents(opened("hf:parquet", folder / "parquet")) == contents(opened("folder", folder))
    assert contents(opened("hf:imagefolder", folder)) == contents(opened("folder", folder))
    assert opened("hf:parquet", folder / "parquet").name(3) == "hf:parquet/train/3"
    import datasets

    datasets.load_dataset(f"{folder}/parquet")["train"].save_to_disk(str(folder / "saved"))
    (folder / "arrow").mkdir()
    for path in (folder / "saved").glob("*.arrow"):
        path.rename(folder / "arrow" / f"train-{path.name}")
    assert contents(opened("hf:arrow", folder / "arrow")) == contents(opened("folder", folder))


def test_a_dataset_that_is_nowhere_is_one_error(folder, monkeypatch):
    with pytest.raises(UnavailableError, match=r"hf:someone/nothing is neither in .* nor to be had from the hub"):
        opened("hf:someone/nothing")
    (folder / "parquet").mkdir()
    (folder / "parquet/train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"cannot read hf:.*parquet: "):
        opened(f"hf:{folder}/parquet")
    (folder / "bare").mkdir()
    for dataset in (f"hf:{folder}/bare", "hf:arrow"):
        with pytest.raises(InputError, match=r"cannot read hf:.* doesn't contain any data files — check the files"):
            opened(dataset, folder / "bare")
    with pytest.raises(UsageError, match=r"train.parquet is a file — name its folder, or give hf:parquet"):
        opened(f"hf:{folder}/parquet/train.parquet")
    with pytest.raises(UsageError, match="hf: names no dataset"):
        opened("hf:")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UnavailableError, match=r"needs the package datasets.*pip install 'lsag\[hf\]'"):
        opened("hf:cifar10")


def test_without_a_download_the_hub_is_not_asked(monkeypatch):
    import datasets

    asked = []
    logging.getLogger("datasets").setLevel(logging.WARNING)

    def load(*arguments, **options):
        asked.append(datasets.config.HF_HUB_OFFLINE)
        assert not logging.getLogger("datasets.load").isEnabledFor(logging.ERROR), "which would be lines on stderr"
        raise ConnectionError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for download, offline, expected in ((True, False, False), (False, False, True), (True, True, True)):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UnavailableError, match="nor to be had from the hub: no hub"):
            opened("hf:someone/nothing", download=download)
        assert asked.pop() == expected and offline == datasets.config.HF_HUB_OFFLINE


# URLs


class Flaky:
    """Lets the reads of a file system fail a number of times."""

    def __init__(self, monkeypatch, method="cat_file"):
        self.failures, self.tried = 0, 0
        self.original = getattr(fsspec.get_filesystem_class("memory"), method)
        monkeypatch.setattr(fsspec.get_filesystem_class("memory"), method, lambda *a, **k: self(*a, **k))
        monkeypatch.setattr(lsag.data.storage, "WAITS", (0.0, 0.0, 0.0))

    def __call__(self, *arguments, **options):
        self.tried += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("Connection reset by peer")
        return self.original(*arguments, **options)


@pytest.fixture
def bucket(folder):
    """The layouts of `folder` in fsspec's memory."""
    as_webdataset(folder, folder)
    as_table(folder, folder)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    yield "memory://bucket"
    memory.store.clear()


def test_what_lies_behind_a_url_is_the_same(folder, bucket):
    plain = contents(opened("folder", folder))
    for dataset in (f"tar:{bucket}/train/*.tar", f"tar:{bucket}/train/{{000..002}}.tar", f"list:{bucket}/images.csv"):
        assert contents(opened(dataset)) == plain, dataset
    assert opened(f"tar:{bucket}/train/*.tar").name(0) == "memory:///bucket/train/000.tar/cat-0.png"
    with pytest.raises(
        InputError, match=r"cannot read memory://bucket/none.csv: there is no such file — check the URL"
    ):
        opened(f"list:{bucket}/none.csv")
    with pytest.raises(InputError, match=r"cannot read nothing://x.tar: Protocol not known"):
        opened("tar:nothing://x.tar")
    with pytest.raises(UnavailableError, match=r"s3://x/y.tar needs a package that is not installed"):
        opened("tar:s3://x/y.tar")


def test_urls_of_this_machine_are_read(folder, monkeypatch):
    as_webdataset(folder, folder)
    assert contents(opened(f"tar:file://{folder}/train/*.tar")) == contents(opened("folder", folder))
    monkeypatch.setattr(lsag.data.storage, "WAITS", ())
    with pytest.raises(InputError, match=r"cannot read file:///.*: Is a directory — check the URL"):
        opened(f"tar:file://{folder}")


def test_an_image_whose_package_is_missing_is_not_broken(folder, lsag):
    rows = [f"train/cat/{index}.png,cat\ns3://bucket/{index}.png,dog" for index in range(2)]
    (folder / "a.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(UnavailableError, match=r"s3://bucket/0.png needs a package that is not installed"):
        opened(f"list:{folder}/a.csv").load(1)
    options = ["--dataset", "list:a.csv", "--val-split", "0.5", "--set", "train.batch_size=2", "--skip-broken"]
    done = lsag("train", *options, "--device", "cpu", "--workers", "1", *TINY)
    assert done.returncode == 4 and "png needs a package that is not installed" in done.stderr


def test_a_connection_that_fails_is_tried_again(bucket, monkeypatch, caplog):
    source = opened(f"tar:{bucket}/train/*.tar")
    flaky = Flaky(monkeypatch)
    flaky.failures = 3
    with caplog.at_level(logging.WARNING):
        assert source.load(0)[0].size == (10, 12)
    assert flaky.tried == 4 and caplog.text.count("Connection reset by peer; trying again") == 3
    flaky.failures = 4
    with pytest.raises(
        UnreachableError, match=r"cannot reach .*000.tar: Connection reset by peer .4 attempts. — check"
    ):
        source.load(0)


# names of datasets


def test_names_of_datasets_are_checked():
    assert parse_dataset("tar:a,b-{0..1}.tar,val=c.tar") == ("tar", "a,b-{0..1}.tar", {"val": "c.tar"})
    assert parse_dataset("hf:org/name:config,label=fine") == ("hf", "org/name:config", {"label": "fine"})
    for name, message in (
        ("zip:a", "unknown dataset 'zip:a' — use one of: digits, .*, folder, tar:..., list:..., hf:..."),
        ("folder:a", "unknown dataset 'folder:a', did you mean 'folder'"),
        ("tar:a,vall=b", "tar: has no setting vall, did you mean 'val'. — its settings are val, image, label, classes"),
        ("list", "unknown dataset 'list'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_dataset(name)


def test_parts_of_files_are_read_from_the_file_that_was_indexed(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    version = lsag.data.storage.version(str(path))
    assert lsag.data.storage.read_part(str(path), 2, 3, expected=version) == b"234"
    with pytest.raises(InputError, match="ends after 10 bytes, but 12 are needed"):
        lsag.data.storage.read_part(str(path), 2, 10, expected=version)
    lsag.data.storage._kept_open.cache_clear()
    assert not [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(path)]
