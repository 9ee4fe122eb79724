"""How fast images are read from each layout, and what an index of 1,281,167 images costs.

    python benchmarks/data.py speed cifar-nano CIFAR_FOLDER in1k-tiny IMAGENET_FOLDER
    python benchmarks/data.py growth

A folder has train/CLASS/*. Layouts are read in turn, with the whole augmentation, from files in the page cache.
"""

import argparse
import csv
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lsag import load_preset
from lsag.data.loading import EpochBatches, batches, train_loader
from lsag.data.splits import open_split
from lsag.machine import available_cores

NUM_IMAGES, NUM_SHARDS, NUM_CLASSES = 1_281_167, 147, 1000
BATCH = 128


def write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def layouts(images: list[tuple[str, bytes]], out: Path, *, per_shard: int) -> dict[str, str]:
    """The images, of which each has the name CLASS/FILE, as tar shards, a Parquet file and a table."""
    import datasets

    datasets.disable_progress_bars()
    for number, start in enumerate(range(0, len(images), per_shard)):
        write_tar(out / f"{number:05}.tar", iter(images[start : start + per_shard]))
    rows = {"image": [{"bytes": content, "path": None} for _, content in images]}
    rows |= {"label": [name.split("/")[0] for name, _ in images]}
    names = sorted(set(rows["label"]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(out / "train.parquet")
    return {"tar shards": f"tar:{out}/*.tar", "Parquet (datasets)": f"hf:{out}"}


def speed(pairs: list[str], rounds: int) -> None:
    """Images/s of each layout."""
    for name, folder in zip(pairs[::2], pairs[1::2], strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            out, root = Path(temporary), Path(folder, "train").absolute()
            paths = sorted(root.glob("*/*"))
            images = [(str(path.relative_to(root)), path.read_bytes()) for path in paths]
            found = layouts(images, out, per_shard=5_000)
            with (out / "images.csv").open("w", newline="") as file:
                csv.writer(file).writerows([("path", "label"), *((path, path.parent.name) for path in paths)])
            specs = {"loose files": "folder", "table": f"list:{out}/images.csv"} | found
            preset = load_preset(name, {"train.batch_size": min(BATCH, len(images) // 4)}, dataset="folder")
            speeds: dict[str, list[float]] = {layout: [] for layout in specs}
            for _ in range(rounds):
                for layout, spec in specs.items():
                    source = open_split(spec, Path(folder), train=True, mode=preset.image_mode)
                    loading = batches(
                        train_loader(source, preset, EpochBatches(len(source), preset), workers=available_cores())
                    )
                    next(loading)  # the workers' start is not counted
                    start = time.perf_counter()
                    count = sum(len(pixels) for pixels, _ in loading)
                    speeds[layout].append(count / (time.perf_counter() - start))
            for layout, measured in speeds.items():
                print(f"{name:12} {len(images):7,} images  {layout:20} {statistics.median(measured):7,.0f} images/s")


def growth() -> None:
    """Memory of an open dataset of the size of ImageNet, and the time to its first batch, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        file = io.BytesIO()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
        names = [f"n{index % NUM_CLASSES:08}/n{index % NUM_CLASSES:08}_{index}.png" for index in range(NUM_IMAGES)]
        images = [(name, file.getvalue()) for name in names]
        specs = layouts(images, out, per_shard=NUM_IMAGES // NUM_SHARDS)
        with (out / "images.csv").open("w", newline="") as table:
            csv.writer(table).writerows([("path", "label"), *((name, name.split("/")[0]) for name in names)])
        (out / names[0]).parent.mkdir()
        (out / names[0]).write_bytes(file.getvalue())
        specs["table"] = f"list:{out}/images.csv"
        for layout, spec in specs.items():
            for state in ("first", "again"):
                done = subprocess.run(
                    [sys.executable, __file__, "open", spec],
                    env=os.environ | {"XDG_CACHE_HOME": str(out), "HF_HOME": str(out / "hf")},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                print(f"{layout:20} {state:6} {done.stdout.strip()}")


def open_one(spec: str) -> None:
    """Open a dataset, and print what that cost."""
    if spec.startswith("hf:"):
        import datasets  # noqa: F401  its own memory is not that of the index
    preset = load_preset("cifar-nano", {"model.image_size": 8}, dataset="folder")
    before, start = anonymous_memory(), time.perf_counter()
    source = open_split(spec, Path(), train=True, mode="RGB")
    opened, memory = time.perf_counter() - start, anonymous_memory() - before
    order = iter(EpochBatches(len(source), preset))
    for _, image in next(order):
        if not spec.startswith("list:"):  # the images of the table are not there
            source.load(image)
    first = time.perf_counter() - start
    print(f"{len(source):,} images  open {opened:.1f} s  first batch {first:.1f} s  {memory / 2**20:.0f} MiB")


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "growth", "open"))
    parser.add_argument("arguments", nargs="*", metavar="PRESET FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.arguments, options.rounds)
    elif options.what == "growth":
        growth()
    else:
        open_one(options.arguments[0])


if __name__ == "__main__":
    main()
