"""The images of a folder with train/CLASS/* and val/CLASS/* in the other layouts that lsag reads."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

SPLITS = ("train", "val")


def images_of(folder: Path, split: str) -> list[Path]:
    """In the order in which a folder is read."""
    return sorted((folder / split).glob("*/*"))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A tar file of named contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(image: Path, label: str, kind: str = "cls") -> list[tuple[str, bytes]]:
    """A WebDataset sample: an image and its label."""
    key = f"{image.parent.name}-{image.stem}"
    content = label if kind == "cls" else json.dumps({"label": label, "text": "of an image"})
    return [(f"{key}{image.suffix}", image.read_bytes()), (f"{key}.{kind}", content.encode())]


def as_webdataset(folder: Path, out: Path, *, per_shard: int = 3, kind: str = "cls") -> str:
    for split in SPLITS:
        images = images_of(folder, split)
        for number, start in enumerate(range(0, len(images), per_shard)):
            shard = images[start : start + per_shard]
            files = [file for image in shard for file in sample(image, image.parent.name, kind)]
            write_tar(out / split / f"{number:03}.tar", files)
    return f"tar:{out}"


def as_one_tar(folder: Path, out: Path) -> str:
    for split in SPLITS:
        images = images_of(folder, split)
        write_tar(
            out / f"{split}.tar", [(f"./{image.parent.name}/{image.name}", image.read_bytes()) for image in images]
        )
    return f"tar:{out}/train.tar,val={out}/val.tar"


def as_tar_of_tars(folder: Path, out: Path) -> str:
    for split in SPLITS:
        inner = []
        for classes in sorted((folder / split).iterdir()):
            files = [(image.name, image.read_bytes()) for image in sorted(classes.iterdir())]
            path = write_tar(out / f"{classes.name}.tar", files)
            inner.append((path.name, path.read_bytes()))
            path.unlink()
        write_tar(out / f"{split}.tar", inner)
    return f"tar:{out}/train.tar,val={out}/val.tar"


def as_table(folder: Path, out: Path, *, suffix: str = ".csv") -> str:
    delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix, ";")
    path = out / f"images{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["path", "label", "split"])
        for split in SPLITS:
            for image in images_of(folder, split):
                writer.writerow([os.path.relpath(image, out), image.parent.name, split])
    return f"list:{path}"


def as_parquet(folder: Path, out: Path) -> str:
    """As the hub has them: images as bytes, labels as numbers with the names of their classes."""
    import datasets

    names = sorted(path.name for path in (folder / "train").iterdir())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split in SPLITS:
        rows = {
            "image": [{"bytes": image.read_bytes(), "path": None} for image in images_of(folder, split)],
            "label": [image.parent.name for image in images_of(folder, split)],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        (out / "parquet").mkdir(exist_ok=True)
        table.to_parquet(out / "parquet" / f"{'validation' if split == 'val' else split}-00000-of-00001.parquet")
    return f"hf:{out}/parquet"


LAYOUTS = {
    "webdataset": as_webdataset,
    "one tar": as_one_tar,
    "tar of tars": as_tar_of_tars,
    "table": as_table,
    "parquet": as_parquet,
}
