"""Whether images are prepared faster than a training step consumes them, with the whole recipe.

    python benchmarks/loaders.py cifar-nano CIFAR_FOLDER in1k-tiny IMAGENET_FOLDER

A folder has train/CLASS/* and val/CLASS/* or test/CLASS/*. Loader and step are measured apart, in turn: on a CPU
they would share the cores.
"""

import argparse
import statistics
import time
from pathlib import Path

from lsag import load_preset
from lsag.bench import image_shape, make_run, open_contender, seconds
from lsag.data.loading import EpochBatches, batches, train_loader
from lsag.data.sources import EncodedSource
from lsag.data.splits import open_split
from lsag.device import choose_device
from lsag.machine import available_cores

BATCH_SIZE = {"cifar-nano": 128}
IMAGES = 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="PRESET FOLDER")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device, workers = choose_device("cpu"), available_cores()
    for name, folder in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        batch_size = BATCH_SIZE.get(name, 8)
        preset = load_preset(name, {"train.batch_size": batch_size}, dataset="folder")
        source = open_split("folder", Path(folder), train=True, mode=preset.image_mode)
        if isinstance(source, EncodedSource):
            source = source.packed()
        order = EpochBatches(len(source), preset)
        order.num_steps = min(order.num_steps, IMAGES // batch_size)
        step = make_run(open_contender(name, mode="training", device=device), "training", batch_size, device)
        loads, steps = [], []
        for _ in range(options.rounds):
            loading = batches(train_loader(source, preset, order, workers=workers))
            images, _ = next(loading)  # the workers' start is not counted
            start = time.perf_counter()
            loads.append(sum(len(images) for images, _ in loading) / (time.perf_counter() - start))
            assert images.shape[1:] == image_shape(preset.model)
            steps.append(batch_size / min(seconds(step, 1, device) for _ in range(3)))
        loaded, needed = statistics.median(loads), statistics.median(steps)
        where = "in memory" if not isinstance(source, EncodedSource) else "from files"
        print(
            f"{name}: {workers} workers prepare {loaded:,.0f} images/s ({where}), a step consumes {needed:,.0f}: "
            f"{loaded / needed:.1f} times as many"
        )


if __name__ == "__main__":
    main()
