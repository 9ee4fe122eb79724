"""What a dataset is to the rest: decoded images with their labels. The files beside this one say where they are."""

import copy
import hashlib
import itertools
import re
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from typing import BinaryIO, Protocol, Self

import numpy as np
from PIL import Image

from lsag.data.images import REPAIR, decode
from lsag.data.storage import seen_from
from lsag.errors import InputError
from lsag.machine import available_cores

EVAL_SPLITS = ("val", "valid", "validation", "test")
"""What the split for evaluation is called, the likeliest first."""
PACK_BYTES = 2**29
"""Every rank holds a split in memory if its decoded images take no more than this, or twice this while packing."""


class Source(Protocol):
    """Decoded images with their labels, int32 (N,); `classes[label]` is a label's name.

    `shards`, int32 (N,), are the numbers of the files in which several images lie, None if each has its own. `notes`
    are for a person to read.
    """

    classes: list[str]
    labels: np.ndarray
    shards: np.ndarray | None
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The name of an image in messages and tables: its path or its index."""

    def fingerprint(self) -> str:
        """A digest of the images, their labels and their order; of files, only the names are read."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image, in mode L or RGB, and its label. InputError for an image that cannot be read."""


class Names:
    """Strings in one array: a list of a million takes several times the memory, which workers that read it copy."""

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        self.text, self.ends = np.frombuffer(text, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.text[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class EncodedSource(ABC):
    """Images that are decoded when they are loaded. A row is an image's place in what was found.

    `rows`, (N,), are those of the images that belong to this source; `labels` and `shards` are aligned with them.
    """

    def __init__(
        self,
        names: Names,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        where: str,
        mode: str,
        fix: str = REPAIR,
        shards: np.ndarray | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.names, self.classes, self.where, self.mode, self.fix = names, list(classes), where, mode, fix
        self.labels, self.shards, self.notes = labels.astype(np.int32), shards, notes
        self.rows = np.arange(len(names), dtype=np.int32)

    @abstractmethod
    def open(self, row: int) -> BinaryIO:
        """The encoded image. OSError or InputError if it cannot be read."""

    @abstractmethod
    def size(self, row: int) -> int:
        """Bytes of the encoded image; sys.maxsize if that cannot be told without reading it from afar."""

    def name(self, index: int) -> str:
        return seen_from(self.where, self.names[int(self.rows[index])])

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        samples = enumerate(zip(map(int, self.rows), self.labels, strict=True))
        parts = (f"{', ' if index else '['}({self.names[row]!r}, {label})" for index, (row, label) in samples)
        return digest(itertools.chain(parts, "]"))

    def load(self, index: int) -> tuple[Image.Image, int]:
        row = int(self.rows[index])
        return decode(lambda: self.open(row), self.mode, name=self.name(index), fix=self.fix), int(self.labels[index])

    def part(self, held_out: float, *, seed: int, train: bool) -> Self:
        """This source with only the images to train on, or only the share of each class that is `held_out`.

        An image is held out by its name and the seed, so that few others change sides when images are added.
        InputError for a class of one image.
        """
        kept: list[int] = []
        by_class = np.split(np.argsort(self.labels, kind="stable"), np.bincount(self.labels).cumsum()[:-1])
        for label, group in enumerate(by_class):
            if not len(group):
                continue
            images = sorted(
                group.tolist(), key=lambda index: digest([repr(seed), repr(self.names[int(self.rows[index])])])
            )
            if len(images) < 2:
                what = f"the class {self.classes[label]} of {self.where} has one image, which cannot be split"
                raise InputError(what, "add images")
            count = min(max(1, round(held_out * len(images))), len(images) - 1)
            kept += images[count:] if train else images[:count]
        return self.subset(np.sort(kept))

    def subset(self, chosen: np.ndarray) -> Self:
        """This source with only the images of these indices."""
        part = copy.copy(self)
        part.rows, part.labels = self.rows[chosen], self.labels[chosen]
        part.shards = None if self.shards is None else self.shards[chosen]
        return part

    def packed(self) -> Source:
        """This source with its images decoded in memory, or itself if they would take more than PACK_BYTES.

        InputError for an image that cannot be read.
        """
        room = PACK_BYTES // 4
        for row in map(int, self.rows):
            with suppress(OSError, InputError):  # an unreadable image is reported when it is loaded
                room -= self.size(row)
            if room < 0:
                return self
        images, used = [], 0
        with ThreadPoolExecutor(available_cores()) as threads:
            for image, _ in threads.map(self.load, range(len(self))):
                images.append(np.asarray(image))
                used += images[-1].nbytes
                if used > PACK_BYTES:
                    threads.shutdown(cancel_futures=True)
                    return self
        return _PackedSource(self, images)


class _PackedSource:
    """The decoded images of a source in one array, which forked workers share, with the start and shape of each."""

    def __init__(self, source: EncodedSource, images: Sequence[np.ndarray]) -> None:
        self.source, self.classes, self.labels, self.notes = source, source.classes, source.labels, source.notes
        self.name, self.fingerprint, self.shards = source.name, source.fingerprint, source.shards
        self.shapes = np.array([(*image.shape, 1)[:3] for image in images])
        self.starts = np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1))])
        self.pixels = np.concatenate([image.reshape(-1) for image in images])

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.pixels[self.starts[index] : self.starts[index + 1]].reshape(self.shapes[index])
        return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels), int(self.labels[index])


class Words:
    """Labels as they are written, each word with the number of its first appearance."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.codes = array("i")

    def append(self, word: str) -> None:
        self.codes.append(self.numbers.setdefault(word, len(self.numbers)))


def classified(
    words: Sequence[str], codes: np.ndarray, *, known: Sequence[str] = (), where: str
) -> tuple[list[str], np.ndarray]:
    """The classes of labels that are written as `words[code]`, in order, and the number of each label, int32.

    Numbers are in numerical order, other words in alphabetical order. Of classes that are `known`, a word is the name
    or the number. InputError for a word that is neither, of several lines or a negative number, for one word in two
    Unicode forms, and among numbers for "nan" or one number that is written in two ways.
    """
    if any(re.fullmatch(r"-\d+(\.0*)?", word) for word in words):
        raise InputError(f"{where} has images with a negative label", "leave out images without a label")
    if several := [word for word in words if len(word.splitlines()) > 1]:
        raise InputError(f"{where} has the label {_named(several)}, which has several lines", "correct it")
    values = {word: value for word in words if (value := _number(word)) is not None}
    numeric = len(values) == len(words)
    if not known:
        if numeric and any(value.is_nan() for value in values.values()):
            raise InputError(f"{where} has the label nan among numbers", "leave out images without a label")
        written: dict[Decimal | str, str] = {}
        for word in words:
            meant = values[word] if numeric else unicodedata.normalize("NFC", word)
            if (other := written.setdefault(meant, word)) != word:
                reason = "which are one number" if numeric else "which differ in their Unicode form, NFC or NFD"
                raise InputError(f"{where} has the labels {_named([other, word])}, {reason}", "write it in one way")
    classes = list(known) or sorted(words, key=values.__getitem__ if numeric else None)
    numbers = {str(number): number for number in range(len(known))} | {name: n for n, name in enumerate(classes)}
    if strangers := [word for word in words if word not in numbers]:
        raise InputError(
            f"{where} has the label {_named(strangers)}, which is no class", "add it to the list of classes"
        )
    return classes, np.array([numbers[word] for word in words], np.int32)[codes]


def _number(word: str) -> Decimal | None:
    """The number that a label is, which may be NaN, as missing values are written; None for a name."""
    return Decimal(word) if re.fullmatch(r"\d+(\.\d*)?|nan", word, re.IGNORECASE) else None


def digest(parts: Iterable[str | bytes]) -> str:
    """A digest of all parts, one after another."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def placeholder_classes(num_classes: int) -> tuple[str, ...]:
    """Class names for a model that came without any."""
    return tuple(f"unnamed class {index}" for index in range(num_classes))


def number_as(classes: Sequence[str], source: Source, *, whose: str, where: str, fix: str) -> None:
    """Number the labels of `source` as in `classes`, by their names; of placeholder names only the number must agree.

    A class without images is no error; InputError for one that is not in `classes`, which are those of `whose`, while
    `source` is called `where`.
    """
    if tuple(classes) == placeholder_classes(len(classes)):
        if len(classes) != len(source.classes):
            raise InputError(f"{whose} has {len(classes)} classes, {where} has {len(source.classes)}", fix)
    else:
        numbers = {name: number for number, name in enumerate(classes)}
        if extra := [name for name in source.classes if name not in numbers]:
            missing = [name for name in classes if name not in source.classes]
            what = f"{whose} does not know {_named(extra)} of {where}"
            what += f", which lacks {_named(missing)}" if missing else ""
            if {unicodedata.normalize("NFC", name) for name in extra}.intersection(
                unicodedata.normalize("NFC", name) for name in missing
            ):
                what += " (names that look alike differ in their Unicode form, NFC or NFD)"
            raise InputError(what, fix)
        source.labels = np.array([numbers[name] for name in source.classes], np.int32)[source.labels]
    source.classes = list(classes)


def _named(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
