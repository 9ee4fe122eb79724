"""From the name of a dataset to one of its splits."""

from pathlib import Path

from lsag.config import DATASETS, DatasetSpec, Preset, default_data_dir, parse_dataset
from lsag.data.arrays import cifar, digits
from lsag.data.class_folders import FolderSource
from lsag.data.folders import is_folder
from lsag.data.sources import EncodedSource, Source
from lsag.errors import InputError, UsageError

EVAL_FOLDERS = {"imagenet": ("val",), "folder": ("val", "test")}


def open_split(
    dataset: str,
    data_dir: Path,
    *,
    train: bool,
    mode: str,
    download: bool = True,
    split: str | None = None,
    val_split: float = 0.0,
    seed: int = 0,
    only: bool = False,
) -> Source:
    """One split of a dataset (docs/data.md), with images in `mode` L or RGB.

    `digits` needs no files. CIFAR is downloaded into `data_dir` if it is missing and `download` is true. `imagenet` and
    `folder` are `data_dir`/train and `data_dir`/val (or test for `folder`, or what `split` names), each with one folder
    per class; only in train must each of them hold images. Paths in `tar:`, `list:` and `hf:` are relative to
    `data_dir`. With `val_split` that share of each class of the training images, which `seed` chooses, is the
    evaluation split. With `only` nothing is trained, and images that are not split are the evaluation split.
    UsageError for another dataset, or a `val_split` of a folder that is split already; InputError for missing or wrong
    files, UnavailableError for a failed download or a missing package.
    """
    spec = parse_dataset(dataset)
    if split and spec.format in DATASETS and spec.format not in EVAL_FOLDERS:
        raise UsageError(f"{dataset} has a single evaluation split", "remove --split")
    if dataset == "digits":
        return digits(train, mode)
    if dataset in ("cifar10", "cifar100"):
        return cifar(dataset, data_dir, mode, train=train, download=download)
    if spec.format in EVAL_FOLDERS:
        return _folders(spec.format, data_dir, mode, train=train, split=split, val_split=val_split, seed=seed)
    held_out = 0.0 if split else val_split
    source = _named(spec, data_dir, mode, train=train or bool(held_out), split=split, only=only, download=download)
    return source.part(held_out, seed=seed, train=train) if held_out else source


def open_for(
    preset: Preset, dataset: str | None, data_dir: Path | None, *, split: str | None = None, download: bool = True
) -> Source:
    """The images on which to use a trained model: of a split, by default the one for evaluation, of its own dataset.

    `data_dir` is by default that of `default_data_dir`. The errors of open_split.
    """
    name = dataset or preset.data.dataset
    own = name in (preset.data.dataset, "folder")
    return open_split(
        name,
        default_data_dir(name) if data_dir is None else data_dir,
        train=False,
        mode=preset.image_mode,
        download=download,
        split=split,
        val_split=preset.data.val_split if own else 0.0,
        seed=preset.train.seed,
        only=True,
    )


def _named(
    spec: DatasetSpec, data_dir: Path, mode: str, *, train: bool, split: str | None, only: bool, download: bool
) -> EncodedSource:
    if spec.format == "tar":
        from lsag.data.tar import open_tar

        return open_tar(spec, data_dir, mode, train=train, split=split, only=only)
    if spec.format == "list":
        from lsag.data.tables import open_list

        return open_list(spec, data_dir, mode, train=train, split=split, only=only)
    from lsag.data.huggingface import open_hf

    return open_hf(spec, data_dir, mode, train=train, split=split, download=download)


def _folders(
    dataset: str, data_dir: Path, mode: str, *, train: bool, split: str | None, val_split: float, seed: int
) -> Source:
    names = (split,) if split else ("train",) if train else EVAL_FOLDERS[dataset]
    if dataset == "folder" and val_split and not split:
        if not is_folder(data_dir):
            raise InputError(f"no folder {data_dir}/, expected {data_dir}/CLASS/", "set --data-dir or $LSAG_DATA")
        splits = [name for name in ("train", "val", "test") if any(map(Path.is_dir, (data_dir / name).glob("[!.]*")))]
        if not splits:
            return FolderSource(data_dir, mode, complete=train).part(val_split, seed=seed, train=train)
        if train:
            raise UsageError(
                f"--val-split splits a folder of class folders, and {data_dir} has {splits[0]}/CLASS/",
                "--val-split 0, or name the folder that has the class folders with --data-dir",
            )
    found = [data_dir / name for name in names if is_folder(data_dir / name)]
    if not found:
        kind = "image folder" if dataset == "folder" else dataset
        expected = " or ".join(f"{data_dir / name}/CLASS/" for name in names)
        fix = "set --data-dir or $LSAG_DATA"
        if train and dataset == "folder":
            fix += f", or hold out a share of each {data_dir}/CLASS/ with --val-split 0.2"
        raise InputError(f"no {kind} in {data_dir}/: expected {expected}", fix)
    root, *others = found
    source = FolderSource(root, mode, complete=train)
    if dataset in DATASETS and len(source.classes) != DATASETS[dataset].num_classes:
        raise InputError(
            f"{root} has {len(source.classes)} class folders, but {dataset} has {DATASETS[dataset].num_classes}",
            "use --dataset folder for other images",
        )
    source.notes += tuple(f"evaluated on {root}, not on {other}" for other in others)
    return source
