"""hf: datasets of Hugging Face's library, from its hub or from a local copy (docs/data.md)."""

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lsag.config import DatasetSpec
from lsag.data.images import REPAIR, TRAINING_FIX
from lsag.data.sources import EVAL_SPLITS, EncodedSource, Names, Words, classified, digest
from lsag.data.storage import regular_file, seen_from
from lsag.errors import InputError, UnavailableError, UsageError, first_line

BUILDERS = ("imagefolder", "parquet", "arrow", "webdataset")
"""Of the library, for files of no dataset in particular: `hf:parquet` reads those in the data folder."""
SAVED = ("dataset_dict.json", "state.json")
"""Either is in a folder that `save_to_disk` wrote."""
LABELS = ("label", "labels", "class", "target")
"""What a column of labels is called whose type does not tell."""


class HuggingFaceSource(EncodedSource):
    """The images in a column of a dataset."""

    def __init__(self, table: Any, image: str, fingerprint: str, *arguments: Any, **options: Any) -> None:
        self.table, self.image, self.library_fingerprint = table, image, fingerprint
        super().__init__(*arguments, **options)

    def open(self, row: int) -> BinaryIO:
        value = self.table[int(row)][self.image]
        if value is None or (value["bytes"] is None and not value["path"]):
            raise OSError("there is none in this row")
        return regular_file(Path(value["path"])) if value["bytes"] is None else io.BytesIO(value["bytes"])

    def size(self, row: int) -> int:
        value = self.table[int(row)][self.image] or {}
        return len(value.get("bytes") or b"")

    def fingerprint(self) -> str:
        return digest([self.library_fingerprint, super().fingerprint()])


def open_hf(
    spec: DatasetSpec, data_dir: Path, mode: str, *, train: bool, split: str | None, download: bool
) -> HuggingFaceSource:
    """The images of a split. UsageError if a column or split has to be named; UnavailableError without the dataset."""
    library = _library()
    with _connected(library, download=download):
        splits = _loaded(library, spec, data_dir)
    wanted = (split,) if split else _wanted(spec, train=train)
    name = next((name for name in wanted if name in splits), None)
    if name is None:
        fix = (
            "evaluate another with --split NAME; to train, add ,train=NAME,val=NAME or hold out images, --val-split 0.1"
        )
        raise UsageError(f"hf:{spec.what} has no split {' or '.join(wanted)}; it has {', '.join(splits)}", fix)
    rows = splits[name]
    if not len(rows):
        raise InputError(f"hf:{spec.what}, split {name} has no images", "choose another split")
    image = _image_column(library, spec, rows.features)
    classes, labels = _labels(library, spec, rows, where=f"hf:{spec.what}, split {name}")
    try:
        table = rows.with_format(None).select_columns([image]).cast_column(image, library.Image(decode=False))
    except Exception as error:  # pyarrow's, or whatever NumPy makes of other values
        what = f"the column {image} of hf:{spec.what} holds no images: {first_line(error)}"
        raise UsageError(what, "name another: hf:NAME,image=COLUMN") from error
    counts = np.bincount(labels, minlength=len(classes))
    missing = [classes[label] for label in np.flatnonzero(counts == 0)] if train else []
    return HuggingFaceSource(
        table,
        image,
        rows._fingerprint,
        Names(f"{name}/{row}" for row in range(len(rows))),
        labels,
        classes,
        where=f"hf:{spec.what}",
        mode=mode,
        fix=TRAINING_FIX if train else REPAIR,
        notes=(f"classes without training images: {len(missing):,}, such as {missing[0]}",) if missing else (),
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        what = f"hf: needs the package datasets, which cannot be imported: {first_line(error)}"
        raise UnavailableError(what, "pip install 'lsag[hf]'") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what goes wrong there is also raised, and told in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


@contextmanager
def _connected(library: Any, *, download: bool) -> Iterator[None]:
    """Without `download`, let the library not even ask the hub, which takes half a minute where there is no network."""
    offline = library.config.HF_HUB_OFFLINE
    library.config.HF_HUB_OFFLINE = offline or not download
    try:
        yield
    finally:
        library.config.HF_HUB_OFFLINE = offline


def _loaded(library: Any, spec: DatasetSpec, data_dir: Path) -> Any:
    """The splits by name. UnavailableError for what is neither here nor to be had; InputError for what is damaged."""
    name, _, config = spec.what.partition(":")
    if not name:
        raise UsageError("hf: names no dataset", "give hf:NAME, or hf:parquet or hf:imagefolder with --data-dir")
    local = Path(seen_from(data_dir, name))
    if local.is_file():
        raise UsageError(f"hf:{spec.what} is a file", "name its folder, or give hf:parquet or hf:arrow with --data-dir")
    try:
        if name in BUILDERS:
            return library.load_dataset(name, config or None, data_dir=str(data_dir.absolute()))
        if any((local / file).is_file() for file in SAVED):
            if config:
                raise ValueError(f"{local} was saved by save_to_disk and has no configuration {config}")
            found = library.load_from_disk(str(local))
            return found if isinstance(found, dict) else {"train": found}
        if local.is_dir():
            return library.load_dataset(str(local.absolute()), config or None)
        return library.load_dataset(name, config or None)
    except (library.exceptions.DatasetGenerationError, library.exceptions.DataFilesNotFoundError) as error:
        cause = error.__cause__ or error
        raise InputError(f"cannot read hf:{spec.what}: {first_line(cause)}", "check the files") from error
    except ValueError as error:
        raise InputError(
            f"cannot read hf:{spec.what}: {first_line(error)}", "check its name and configuration"
        ) from error
    except Exception as error:  # the hub's client has errors of its own, and those of its connections
        if name in BUILDERS or local.is_dir():
            place = getattr(error, "filename", None)
            reason = f"{first_line(error)}{f': {place}' if place else ''}"
            raise InputError(
                f"cannot read hf:{spec.what}: {reason}", "check the files, and the cache in $HF_HOME"
            ) from error
        what = f"hf:{spec.what} is neither in {data_dir} nor to be had from the hub: {first_line(error)}"
        fix = "check the name and the connection; for one that asks for consent, log in with: hf auth login"
        raise UnavailableError(what, fix) from error


def _wanted(spec: DatasetSpec, *, train: bool) -> Sequence[str]:
    if given := spec.settings.get("train" if train else "val"):
        return (given,)
    return ("train",) if train else EVAL_SPLITS


def _image_column(library: Any, spec: DatasetSpec, features: Any) -> str:
    """The column of images: the one that is named, or the only one whose type says so."""
    if given := _given(spec, "image", features):
        return given
    typed = [name for name, kind in features.items() if isinstance(kind, library.Image)]
    encoded = [name for name, kind in features.items() if _holds_bytes(kind)]
    found = typed or encoded
    if len(found) != 1:
        columns = ", ".join(found or features)
        what = f"hf:{spec.what} has {'several columns' if found else 'no column'} of images: {columns}"
        raise UsageError(what, "name it: hf:NAME,image=COLUMN")
    return found[0]


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, dict):
        return {"bytes", "path"} <= set(kind)
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _labels(library: Any, spec: DatasetSpec, rows: Any, *, where: str) -> tuple[list[str], np.ndarray]:
    """The classes, and that of each row: in the column that is named, or the only one whose type or name says so."""
    features = rows.features
    column = _given(spec, "label", features)
    if column is None:
        typed = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
        found = typed or [name for name in LABELS if name in features][:1]
        if len(found) != 1:
            what = f"hf:{spec.what} has {'several columns' if found else 'no column'} of labels: "
            raise UsageError(what + ", ".join(found or features), "name it: hf:NAME,label=COLUMN")
        column = found[0]
    kind = features[column]
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    if values.null_count:
        raise InputError(f"{where} has {values.null_count:,} images without a label", "choose another split")
    if isinstance(kind, library.ClassLabel):
        labels = values.to_numpy()
        if len(labels) and labels.min() < 0:
            raise InputError(f"{where} has no labels", "choose another split")
        return list(kind.names), labels
    words = Words()
    for value in values.to_pylist():
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise UsageError(f"the column {column} of hf:{spec.what} holds no labels", "name it: hf:NAME,label=COLUMN")
        words.append(str(value).strip())
    if "" in words.numbers:
        raise InputError(f"{where} has images without a label", "choose another split")
    return classified(list(words.numbers), np.frombuffer(words.codes, np.int32), where=where)


def _given(spec: DatasetSpec, setting: str, features: Any) -> str | None:
    """The column that a setting names. UsageError if there is none of that name."""
    name = spec.settings.get(setting)
    if name is not None and name not in features:
        raise UsageError(f"hf:{spec.what} has no column {name}; it has {', '.join(features)}", f"correct ,{setting}=")
    return name
