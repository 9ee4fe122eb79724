"""tar: images read from where they lie in tar files, which are indexed once and never unpacked (docs/data.md).

Three layouts: WebDataset's, in which KEY.jpg has its label in KEY.cls or KEY.json; CLASS/IMAGE.jpg; and ILSVRC's, a tar
file of a tar file for each class.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lsag.config import DatasetSpec
from lsag.data.folders import NEVER_DATA, because, decodable, is_folder, listed
from lsag.data.images import REPAIR, TRAINING_FIX
from lsag.data.sources import EVAL_SPLITS, EncodedSource, Names, Words, classified
from lsag.data.storage import Version, cache_folder, expanded, is_url, read, read_part, scanned, seen_from, version
from lsag.errors import InputError, OutputError, UsageError, first_line
from lsag.files import CHUNK, replacing

FORMAT = 2
"""Of a cached index."""
REPORT_SECONDS = 5
"""Time between two lines on an index in the making."""
MAX_IMAGE, MAX_LABEL, MAX_WORD = 2**31, 2**20, 1000
"""Bytes of an image and of a file with a label, and characters of a label."""
JSON_FIELDS = ("label", "cls")
BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")
"""How the files of gzip, bzip2, xz, zstd and zip begin."""
CLASS_FILES = ("classes.txt", "classnames.txt")

logger = logging.getLogger(__name__)


class TarSource(EncodedSource):
    """Images inside tar files, whose places are in an index."""

    def __init__(self, index: "Index", labels: np.ndarray, classes: Sequence[str], *, mode: str, train: bool) -> None:
        self.index = index
        super().__init__(
            index.names,
            labels,
            classes,
            where=str(PurePosixPath(index.shards[0]).parent),
            mode=mode,
            fix=TRAINING_FIX if train else REPAIR,
            shards=index.shard,
            notes=index.notes,
        )

    def name(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.index.shards[self.index.shard[row]]}/{self.names[row]}"

    def open(self, row: int) -> BinaryIO:
        shard = self.index.shard[row]
        start, size = int(self.index.start[row]), self.size(row)
        return io.BytesIO(read_part(self.index.shards[shard], start, size, expected=self.index.versions[shard]))

    def size(self, row: int) -> int:
        return int(self.index.size[row])


@dataclass(frozen=True)
class Index:
    """Where the images of some tar files are: the shard, the first byte, the size and the label of each.

    `shards` are the files, with their `versions`. `names` are those inside a shard; the label of image i is written as
    `words[code[i]]`.
    """

    shards: list[str]
    versions: list[Version]
    names: Names
    shard: np.ndarray
    start: np.ndarray
    size: np.ndarray
    code: np.ndarray
    words: list[str]
    notes: tuple[str, ...]


def open_tar(spec: DatasetSpec, data_dir: Path, mode: str, *, train: bool, split: str | None, only: bool) -> TarSource:
    """The images of a split: those in the files that a pattern names, or in the folder of a split.

    InputError for files that are missing or damaged, and for images without a label or with two.
    """
    shards = _shards(spec, data_dir, train=train, split=split, only=only)
    if twice := [path for path, count in Counter(shards).items() if count > 1]:
        raise InputError(f"the pattern {spec.what} names {twice[0]} twice", "name each file once")
    index = indexed(shards, image=spec.settings.get("image"), label=spec.settings.get("label"))
    if not (train or split or only) and "val" in spec.settings:
        both = set(shards).intersection(expanded(spec.what, data_dir))
        if both:
            note = (
                f"{len(both):,} tar files are for training too, such as {min(both)}: the accuracy counts their images"
            )
            index = replace(index, notes=(*index.notes, note))
    where = shards[0] if len(shards) == 1 else f"{shards[0]} ... {shards[-1]}"
    classes, labels = classified(index.words, index.code, known=_known_classes(spec, data_dir, index), where=where)
    return TarSource(index, labels, classes, mode=mode, train=train)


def _shards(spec: DatasetSpec, data_dir: Path, *, train: bool, split: str | None, only: bool) -> list[str]:
    """The tar files of a split. InputError if there are none."""
    wanted = (split,) if split else ("train",) if train else EVAL_SPLITS
    named = seen_from(data_dir, spec.what) if spec.what else str(data_dir)
    if not is_url(named) and is_folder(Path(named)):
        if "val" in spec.settings:
            raise UsageError(f"{named} is a folder of train/*.tar and val/*.tar", "remove ,val=, or name files")
        for name in wanted:
            if shards := expanded("*.tar", Path(named, name)):
                return shards
        expected = " or ".join(f"{named}/{name}/*.tar" for name in wanted[:2])
        raise InputError(f"no tar files in {named}: expected {expected}", "name them: tar:PATTERN,val=PATTERN")
    given = spec.settings.get("val")
    pattern = spec.what
    if split not in (None, "train", "val"):
        raise UsageError(f"tar:{spec.what} has no split {split}", "--split train or --split val")
    if split == "val" or not (train or split or only):
        if given is None:
            raise InputError(
                f"tar:{spec.what} does not say which images are for evaluation",
                "name their files with ,val=PATTERN, or hold out training images with --val-split 0.1",
            )
        pattern = given
    elif only and not split and given:
        pattern = given
    shards = expanded(pattern, data_dir)
    if not shards:
        raise InputError(
            f"there are no files {seen_from(data_dir, pattern)}", "check the pattern, which is relative to --data-dir"
        )
    return shards


def _known_classes(spec: DatasetSpec, data_dir: Path, index: Index) -> list[str]:
    """The names of the classes, one in each line of the file that is named.

    For labels that are numbers, by default of classes.txt beside the shards, in the folder above or in its train/.
    """
    shard = index.shards[0]
    if given := spec.settings.get("classes"):
        path = seen_from(data_dir, given)
    elif is_url(shard) or not all(word.isdecimal() for word in index.words):
        return []
    else:
        beside = Path(shard).absolute().parent
        folders = beside, beside.parent, beside.parent / "train"
        path = next((str(folder / name) for folder in folders for name in CLASS_FILES if (folder / name).is_file()), "")
        if not path:
            return []
    try:
        names = [line.strip() for line in read(path).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}", "save it in UTF-8") from error
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path} names {repeated[0]} twice", "give each class a name of its own")
    return names


def indexed(shards: Sequence[str], *, image: str | None, label: str | None) -> Index:
    """The index of some files, from the cache if none has changed, else made and kept there.

    `image` is the one extension that counts, if several of a key are images; `label` the field of KEY.json.
    """
    versions = [version(path) for path in shards]
    places = [path if is_url(path) else str(Path(path).absolute()) for path in shards]
    key = json.dumps([FORMAT, places, versions, image, label, sorted(decodable())])
    path = (
        cache_folder()
        / f"tar-{hashlib.blake2b(key.encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}.npz"
    )
    found = _cached(path, shards, versions)
    if found is None:
        found = _made(shards, versions, image=image, label=label)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **_arrays(found))  # type: ignore[arg-type]
        except (OSError, OutputError) as error:
            logger.warning("the index of the tar files is not kept: %s", first_line(error))
    return found


def _arrays(index: Index) -> dict[str, np.ndarray]:
    described = json.dumps([index.words, index.notes]).encode()
    return {
        "text": index.names.text,
        "ends": index.names.ends,
        "shard": index.shard,
        "start": index.start,
        "size": index.size,
        "code": index.code,
        "described": np.frombuffer(described, np.uint8),
    }


def _cached(path: Path, shards: Sequence[str], versions: Sequence[Version]) -> Index | None:
    """The index in a file; None if there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = Names(())
            names.text, names.ends = arrays["text"], arrays["ends"]
            words, notes = json.loads(arrays["described"].tobytes())
            rest = {name: arrays[name] for name in ("shard", "start", "size", "code")}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive raises anything
        logger.warning("the index %s is damaged and made again: %s", path, first_line(error))
        return None
    return Index(list(shards), list(versions), names, words=words, notes=tuple(notes), **rest)


def _made(shards: Sequence[str], versions: Sequence[Version], *, image: str | None, label: str | None) -> Index:
    words, unused = Words(), Counter[str]()
    shard, start, size = array("i"), array("q"), array("I")
    labelled: dict[bool, str] = {}
    reported = time.monotonic()

    def names() -> Iterator[str]:
        nonlocal reported
        for number, path in enumerate(shards):
            if time.monotonic() - reported > REPORT_SECONDS:
                logger.warning("indexing tar files, once: %d of %d done", number, len(shards))
                reported = time.monotonic()
            length = versions[number][0]
            found = scanned(path, partial(_scan, path=path, length=length, image=image, label=label))
            if labelled.setdefault(found.labelled, path) and len(labelled) > 1:
                what = f"{labelled[True]} has labels in files of their own, {labelled[False]} has none"
                raise InputError(what, "give both the same layout")
            for one in found.images:
                words.append(one.label)
                shard.append(number)
                start.append(one.start)
                size.append(one.size)
                yield one.name
            unused.update(found.unused)

    packed = Names(names())
    if not len(packed):
        raise InputError(f"there are no images in {shards[0]}{because(unused)}", "check the pattern")
    where = shards[0].rpartition("/")[0] or "."
    return Index(
        list(shards),
        list(versions),
        packed,
        np.frombuffer(shard, np.int32),
        np.frombuffer(start, np.int64),
        np.frombuffer(size, np.uint32),
        np.frombuffer(words.codes, np.int32),
        list(words.numbers),
        (f"not used in the tar files of {where}: {listed(unused)}",) if unused.total() else (),
    )


class _Image(NamedTuple):
    name: str
    start: int
    size: int
    label: str


@dataclass(frozen=True)
class _Shard:
    """What was found in a tar file. `labelled` says that labels are in files of their own, not the names of folders."""

    images: list[_Image]
    labelled: bool
    unused: Counter[str]


def _scan(file: BinaryIO, path: str, length: int, image: str | None, label: str | None) -> _Shard:
    """Read the headers of a tar file, and its labels. InputError that names the file, and the key of a bad sample."""
    found: list[tuple[str, int, int]] = []
    words: dict[str, dict[str, str]] = {}
    unused = Counter[str]()
    for name, start, size in _files(file, path, length, unused):
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122  Path takes several times as long
        if suffix in (".cls", ".json"):
            kind, key = suffix[1:], _key(name)
            if kind in words.setdefault(key, {}):
                raise InputError(
                    f"{key} in {path} has two files {suffix}", "remove one; a key ends at the first dot of a name"
                )
            file.seek(start)
            word = _label(file.read(min(size, MAX_LABEL)), kind, label, f"{name} in {path}")
            if word is not None:
                words[key][kind] = word
        elif suffix in decodable() and (image is None or name.lower().endswith(f".{image.lower().lstrip('.')}")):
            if size > MAX_IMAGE:
                raise InputError(f"{name} in {path} has {size:,} bytes, too many for an image", "remove it")
            found.append((name, start, size))
        else:
            unused[suffix or "without an extension"] += 1
    if words.keys().isdisjoint(_key(name) for name, _, _ in found):
        unused.update(f".{kind}" for kinds in words.values() for kind in kinds)
        return _Shard(list(_in_folders(found, path)), False, unused)
    images, seen = [], dict[str, str]()
    for name, start, size in found:
        key = _key(name)
        if key in seen:
            what = f"{key} in {path} has two images, {seen[key]} and {name}"
            raise InputError(what, "name the extension to take: ,image=jpg")
        seen[key] = name
        described = words.pop(key, None)
        labels = set((described or {}).values())
        if len(labels) != 1:
            what = f"{key} in {path} has " + (f"two labels, {' and '.join(sorted(labels))}" if labels else "no label")
            fix = f"add {key}.cls" if described is None else "say which counts: ,label=cls or ,label=FIELD of the JSON"
            raise InputError(what, fix)
        images.append(_Image(name, start, size, *labels))
    unused["unmatched labels"] += len(words)
    return _Shard(images, True, unused)


def _files(file: BinaryIO, path: str, length: int, unused: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each regular file; one in a tar file inside, CLASS.tar, is called CLASS/NAME."""
    for name, start, size in _regular(_members(file, path, 0, length), path, unused):
        if not name.lower().endswith(".tar"):
            yield name, start, size
            continue
        inside = f"{name} in {path}"
        for inner, inner_start, inner_size in _regular(_members(file, inside, start, start + size), inside, unused):
            yield f"{PurePosixPath(name).stem}/{inner}", inner_start, inner_size


def _regular(members: Iterator[tarfile.TarInfo], path: str, unused: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """The regular files that are not hidden; their names are without what leads nowhere, as in ./ and ../."""
    for member in members:
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        if not member.isreg():
            unused["links"] += member.issym() or member.islnk()
        elif any(part.startswith(".") or part in NEVER_DATA for part in parts):
            unused["hidden"] += 1
        elif member.sparse is not None:
            raise InputError(f"{member.name} in {path} is stored in parts, without its zeros", "make it without tar -S")
        else:
            yield "/".join(parts), member.offset_data, member.size


def _members(file: BinaryIO, path: str, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    """The members of the tar file that lies between two bytes of a file. InputError if it is not whole."""
    file.seek(start)
    try:
        archive = tarfile.TarFile(fileobj=file)
        while member := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # which would hold every member
            stored = 0 if member.sparse is not None else member.size  # that of a sparse file is not what is stored
            if member.offset_data + stored > end:
                raise tarfile.ReadError(f"{member.name} is cut off")
            yield member
    except (tarfile.TarError, ValueError) as error:
        file.seek(start)
        if file.read(6).startswith(COMPRESSED):
            what = f"{path} is compressed, so that no image can be read on its own"
            raise InputError(what, "decompress it") from error
        raise InputError(f"{path} is not a whole tar file: {first_line(error)}", "copy it again") from error
    file.seek(archive.offset)
    if len(mark := file.read(BLOCK)) < BLOCK or any(mark):  # tarfile takes anything that is no header for the end
        what = f"{path} is not a whole tar file: it is cut off or damaged at byte {archive.offset:,}"
        raise InputError(what, "copy it again")
    while rest := file.read(min(CHUNK, max(end - file.tell(), 0))):
        if any(rest):
            raise InputError(f"{path} goes on after its end mark, as joined tar files do", "give the files one by one")


def _in_folders(found: Sequence[tuple[str, int, int]], path: str) -> Iterator[_Image]:
    """Images with the name of the folder that they are in as their label. InputError if it is not clear."""
    folders: dict[str, str] = {}
    if twice := [name for name, count in Counter(name for name, _, _ in found).items() if count > 1]:
        raise InputError(f"{path} has {twice[0]} twice", "make it anew: tar -r and -u keep the old version of a file")
    for name, start, size in found:
        folder = name.rpartition("/")[0]
        label = folder.rpartition("/")[2]
        if not label:
            raise InputError(f"{name} in {path} has no label", f"add {_key(name)}.cls, or a folder for each class")
        if folders.setdefault(label, folder) != folder:
            what = f"{path} has two folders of the class {label}, {folders[label]} and {folder}"
            raise InputError(what, "make a tar file of each split")
        yield _Image(name, start, size, label)


def _key(name: str) -> str:
    """WebDataset's key of a file: its path without what follows the first dot of its name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _label(content: bytes, kind: str, wanted: str | None, name: str) -> str | None:
    """The label in a file of the `kind` cls or json; None if the one that is `wanted` is not there."""
    if wanted is not None and (wanted == "cls") != (kind == "cls"):
        return None
    try:
        value: Any = content.decode("utf-8-sig").strip()
        if kind == "json":
            fields = json.loads(value)
            if not isinstance(fields, dict):
                raise ValueError("no object with fields")
            value = next((fields[field] for field in ([wanted] if wanted else JSON_FIELDS) if field in fields), None)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise ValueError("neither a number nor a name")
            value = str(value).strip()
        if value == "" or len(value) > MAX_WORD:
            raise ValueError("empty" if value == "" else "too long")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{name} holds no label: {first_line(error)}", "correct or remove it") from error
    return value
