"""list: images named in a table, with a label and perhaps a split each (docs/data.md)."""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lsag.config import DatasetSpec
from lsag.data.images import REPAIR, TRAINING_FIX
from lsag.data.sources import EVAL_SPLITS, EncodedSource, Names, Words, classified
from lsag.data.storage import is_url, read, regular_file, seen_from
from lsag.errors import InputError, UnavailableError, UsageError, first_line

COLUMNS = {
    "image": ("path", "image", "file", "filename", "file_name", "image_path", "filepath"),
    "label": ("label", "class", "target", "labels"),
    "split": ("split",),
}
"""What the columns are called unless their names are given."""


class ListSource(EncodedSource):
    """Images named in a table, relative to its folder, which may be a URL."""

    def open(self, row: int) -> BinaryIO:
        path = seen_from(self.where, self.names[row])
        return io.BytesIO(read(path)) if is_url(path) else regular_file(Path(path))

    def size(self, row: int) -> int:
        path = seen_from(self.where, self.names[row])
        return sys.maxsize if is_url(path) else Path(path).stat().st_size


def open_list(
    spec: DatasetSpec, data_dir: Path, mode: str, *, train: bool, split: str | None, only: bool
) -> ListSource:
    """The images of a split: those of the rows that say so, or of a table of their own (`val=`).

    With `only`, or to train, a table without a column for the split is one split. InputError for a table that cannot be
    read, has no such split, names an image twice with two labels, or whose first image is not there.
    """
    if not spec.what:
        raise UsageError("list: names no table", "give list:FILE.csv, with the columns path and label")
    own = None if train or split else spec.settings.get("val")
    table = seen_from(data_dir, own or spec.what)
    names, words, splits = _read(table, spec.settings)
    codes = np.frombuffer(words.codes, np.int32)
    notes = _check_repeats(table, names, codes, list(words.numbers), splits)
    chosen = np.arange(len(names))
    if splits.numbers:
        wanted = (split.lower(),) if split else ("train",) if train else EVAL_SPLITS
        number = next((splits.numbers[name] for name in wanted if name in splits.numbers), None)
        if number is None:
            raise InputError(
                f"{table} has no rows of the split {' or '.join(wanted)}; its splits are {', '.join(splits.numbers)}",
                "add --split NAME" if only else "rename them, or hold out training images with --val-split 0.1",
            )
        chosen = np.flatnonzero(np.frombuffer(splits.codes, np.int32) == number)
    elif split:
        raise UsageError(f"{table} has no column split", "remove --split")
    elif not (train or only or own):
        raise InputError(
            f"{table} does not say which images are for evaluation",
            "add a column split, name another table with ,val=FILE.csv, or hold out images with --val-split 0.1",
        )
    if own and not only:  # to evaluate, the images that were trained on need not be here
        training = seen_from(data_dir, spec.what)
        others, _, parts = _read(training, spec.settings)
        rows = zip(others, parts.codes or repeat(None), strict=False)
        trained = {seen_from(_folder(training), name) for name, part in rows if part == parts.numbers.get("train")}
        if shared := sum(seen_from(_folder(table), names[row]) in trained for row in chosen.tolist()):
            notes += (f"{shared:,} images of {table} are for training too: the accuracy counts them",)
    used = sorted(set(codes[chosen].tolist()))
    present = list(words.numbers)
    classes, labels = classified([present[code] for code in used], np.searchsorted(used, codes[chosen]), where=table)
    folder = _folder(table)
    every = np.zeros(len(names), np.int32)
    every[chosen] = labels
    fix = TRAINING_FIX if train else REPAIR
    source = ListSource(names, every, classes, where=folder, mode=mode, fix=fix, notes=notes).subset(chosen)
    first = Path(source.name(0))
    if not is_url(source.name(0)) and not first.is_file():
        raise InputError(
            f"{first}, the first image of {table}, is not there",
            "write paths with /" if "\\" in first.name else f"give paths relative to the folder of the table, {folder}",
        )
    return source


def _folder(table: str) -> str:
    return table.rpartition("/")[0] if is_url(table) else str(Path(table).parent)


def _read(table: str, settings: dict[str, str]) -> tuple[Names, Words, Words]:
    """The images of a table, their labels and, where it has such a column, their splits."""
    rows = _parquet(table) if table.lower().endswith(".parquet") else _delimited(table)
    labels, splits = Words(), Words()

    def images() -> Iterator[str]:
        header = [name.strip() for name in next(rows, [])]
        columns = [_column(table, header, kind, settings.get(kind)) for kind in COLUMNS]
        for number, row in enumerate(rows, start=2):
            if not any(map(str.strip, row)):
                continue  # an empty line
            image, label, split = (
                None if column is None else row[column].strip() if column < len(row) else "" for column in columns
            )
            if not image or not label or split == "":
                missing = "image" if not image else "label" if not label else "split"
                raise InputError(f"row {number} of {table} has no {missing}", "complete or remove the row")
            labels.append(label)
            if split:
                splits.append(split.lower())
            yield image

    try:
        names = Names(images())
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read table {table}: {first_line(error)}", "save it as CSV in UTF-8") from error
    if not len(names):
        raise InputError(f"{table} names no images", "give a row for each image below the header path,label")
    return names, labels, splits


def _column(table: str, header: Sequence[str], kind: str, given: str | None) -> int | None:
    """The place of a column. InputError if there is none, or two of one name; the split may be absent."""
    names = (given,) if given else COLUMNS[kind]
    called = list(header) if given else [name.lower() for name in header]
    for name in names:
        if called.count(name) > 1:
            raise InputError(f"{table} has two columns {name}", "rename one of them")
        if name in called:
            return called.index(name)
    if kind == "split" and not given:
        return None
    found = ", ".join(header[:10])
    raise InputError(
        f"{table} has no column {' or '.join(names[:2])} (first row: {found})",
        f"name it: list:FILE,{kind}=COLUMN" if header else "give a table with a header",
    )


def _delimited(table: str) -> Iterator[list[str]]:
    """The rows of a table whose header tells whether commas, tabs or semicolons divide it."""
    text = io.TextIOWrapper(io.BytesIO(read(table)), encoding="utf-8-sig", newline="")
    first = text.readline()
    text.seek(0)
    # strict: a quotation mark that nothing closes would make one cell of the rest of the table
    yield from csv.reader(text, delimiter=max(",\t;", key=first.count), skipinitialspace=True, strict=True)


def _parquet(table: str) -> Iterator[list[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnavailableError("Parquet needs the package pyarrow", "pip install 'lsag[hf]'") from error
    try:
        file: Any = parquet.ParquetFile(io.BytesIO(read(table)))
        kinds, schema = pyarrow.types, file.schema_arrow
        others = (kinds.is_nested, kinds.is_binary, kinds.is_large_binary)  # such as the images themselves
        flat = [field.name for field in schema if not any(holds(field.type) for holds in others)]
        yield flat
        for batch in file.iter_batches(columns=flat):
            columns = [[("" if value is None else str(value)) for value in column.to_pylist()] for column in batch]
            yield from map(list, zip(*columns, strict=True))
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read table {table}: {first_line(error)}", "write it again") from error


def _check_repeats(table: str, names: Names, codes: np.ndarray, words: list[str], splits: Words) -> tuple[str, ...]:
    """Notes on images that are named more than once. InputError for one with two labels."""
    keys = np.fromiter(map(hash, names), np.int64, len(names))
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    before, after = order[:-1][same], order[1:][same]
    for one, other in zip(before, after, strict=True):
        if codes[one] != codes[other]:
            what = f"{names[one]} has two labels in {table}, {words[codes[one]]} and {words[codes[other]]}"
            raise InputError(what, "remove one of the rows")
    notes = []
    if len(before):
        notes.append(f"{table} names {len(before):,} images again")
    if splits.codes and (shared := np.count_nonzero(np.diff(np.array(splits.codes)[[before, after]], axis=0))):
        notes.append(f"{shared:,} of them are in two splits: the accuracy counts images that were trained on")
    return tuple(notes)
