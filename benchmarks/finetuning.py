"""Whether trained weights are of use: Fashion-MNIST from a few images per class, from cifar-nano's and from scratch.

    python benchmarks/finetuning.py FOLDER OUT [--starts STARTS] [--seeds SEEDS]
    python benchmarks/finetuning.py FOLDER OUT --report docs/images/fine-tuning.png

FOLDER has the four idx files of Fashion-MNIST, OUT gets images as class folders, and the runs. Every training has the
recipe of cifar-nano's weights without their moving average, and the batch that `lsag train --init-from` cuts for so few
images. Fine-tuning takes a tenth of the learning rate, or the full one as from scratch. Another seed also draws other
images. The last epoch counts, on all 10,000 test images.
"""

import argparse
import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from lsag.checkpoint import load_checkpoint

CLASSES = ["top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
STARTS = {
    "weights of cifar-nano, a tenth of the learning rate, 40 epochs": 40,
    "weights of cifar-nano, the full learning rate, 40 epochs": 40,
    "from scratch, 40 epochs": 40,
    "from scratch, 100 epochs": 100,
}
FINE_TUNING = next(iter(STARTS))
"""What `lsag train --init-from` does by default, at a tenth of the learning rate."""
BATCHES = {20: 16, 100: 64}
"""By the number of images per class."""
HELD_OUT = 20
"""Images per class for the accuracies during the training, which decide nothing."""


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 28, 28) and labels (N,) of "train" or "t10k"."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def write(images: np.ndarray, labels: np.ndarray, numbers: np.ndarray, out: Path) -> None:
    """The images with these numbers, as RGB files in class folders."""
    for number in numbers:
        path = out / CLASSES[labels[number]] / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).convert("RGB").save(path)


def few_images(folder: Path, out: Path, *, per_class: int, seed: int) -> Path:
    """A data folder with train/, val/ and test/."""
    data = out / f"images-{per_class}-{seed}"
    if not (data / "done").exists():
        images, labels = read(folder, "train")
        shuffled = np.random.default_rng(seed).permutation(len(labels))
        for kind in range(len(CLASSES)):
            numbers = shuffled[labels[shuffled] == kind]
            write(images, labels, numbers[:per_class], data / "train")
            write(images, labels, numbers[per_class : per_class + HELD_OUT], data / "val")
        images, labels = read(folder, "t10k")
        write(images, labels, np.arange(len(labels)), data / "test")
        (data / "done").touch()
    return data


def accuracy(data: Path, out: Path, *, start: str, per_class: int, seed: int) -> float:
    """Top-1 on the test images of one training, which is resumed or read where there is one."""
    run = out / f"{start.replace(' ', '-').replace(',', '')}-{per_class}-{seed}"
    preset = load_checkpoint("cifar-nano").preset
    begin: list[object] = ["--init-from", "cifar-nano"]
    if "scratch" in start:
        file = out / "recipe.json"
        file.write_text(preset.model_dump_json())
        begin = ["--preset", file, "--set", f"train.batch_size={BATCHES[per_class]}", "--set", "train.ema_decay=0"]
    if start != FINE_TUNING:  # the peak depends on the batch; this keeps that of the recipe
        begin += ["--set", f"train.lr={preset.train.lr * preset.train.batch_size / BATCHES[per_class]}"]
    options = ["--dataset", "folder", "--data-dir", data, "--device", "cpu", "--workers", 0]
    epochs = ["--epochs", STARTS[start], "--set", "train.warmup_epochs=2", "--set", f"train.seed={seed}"]
    if not (run / "test.json").exists():
        lsag("train", *begin, *options, *epochs, "--out", run, "--resume", "--log-to", "none")
        text = lsag(
            "eval",
            max(run.glob("step-*.pt")),
            "--data-dir",
            data,
            "--split",
            "test",
            "--json",
            "--plot",
            run / "test.png",
        )
        (run / "test.json").write_text(text)
    return float(json.loads((run / "test.json").read_text())["top1"])


def lsag(*arguments: object) -> str:
    command = [sys.executable, "-m", "lsag_cli", *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Accuracies over the number of images per class, for each start: every seed a dot, their means a line."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for start, by_number in found.items():
        means = [100 * statistics.mean(values) for values in by_number.values()]
        (line,) = axes.plot(list(by_number), means, label=start)
        for number, values in by_number.items():
            axes.plot([number] * len(values), [100 * value for value in values], "o", color=line.get_color(), alpha=0.6)
    axes.set_xscale("log")
    axes.set_xticks(list(BATCHES), [str(number) for number in BATCHES])
    axes.minorticks_off()
    axes.set(xlabel="images per class", ylabel="top-1 accuracy (%)", title="Fashion-MNIST, three seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    all_found: dict[str, dict[int, list[float]]] = {start: {} for start in options.starts}
    for per_class in BATCHES:
        for start in options.starts:
            found = []
            for seed in options.seeds:
                data = few_images(options.folder, options.out, per_class=per_class, seed=seed)
                found.append(accuracy(data, options.out, start=start, per_class=per_class, seed=seed))
            listed = ", ".join(f"{100 * value:.2f}" for value in found)
            print(f"| {per_class} | {start} | **{100 * statistics.mean(found):.2f} %** | {listed} |", flush=True)
            all_found[start][per_class] = found
    if options.report:
        draw(all_found, options.report)


if __name__ == "__main__":
    main()
