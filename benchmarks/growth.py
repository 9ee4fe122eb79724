"""How the cost of an image grows with the number of variants, the image size and the batch size.

python benchmarks/growth.py --plot docs/images/growth.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from lsag import load_preset
from lsag.bench import Result, bench

VARIANTS, SIZES, BATCHES = (1, 3, 6, 9, 12, 15, 18), (224, 256, 288, 320, 384), (1, 2, 4, 8, 16, 32)
SHIFTS = [list(shift) for shift in load_preset("cifar-tiny").model.shifts]


def measure(rounds: int) -> dict[str, list[tuple[float, Result]]]:
    """The points of each panel: the number on the axis, and what was measured there."""

    def points(specs: dict[float, str], batch_size: int) -> list[tuple[float, Result]]:
        found = bench(list(specs.values()), batch_size=batch_size, rounds=rounds, device="cpu")
        return list(zip(specs, found.results, strict=True))

    tokens = {(size // 4) ** 2: f"in1k-small,model.image_size={size},data.eval_resize={size}" for size in SIZES}
    return {
        "variants T (cifar-tiny, batch 8)": points(
            {count: f"cifar-tiny,model.shifts={SHIFTS[:count]}" for count in VARIANTS}, 8
        ),
        "tokens of the local block (in1k-small, 224 to 384 pixels, batch 1)": points(tokens, 1),
        "batch size (cifar-tiny)": [(size, points({size: "cifar-tiny"}, size)[0][1]) for size in BATCHES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    measured = measure(options.rounds)
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, 3), measured.items(), strict=True):
        numbers = [number for number, _ in points]
        milliseconds = [1000 / result.images_per_second for _, result in points]
        mebibytes = [(result.peak_memory or 0) / 2**20 for _, result in points]
        print(label)
        for number, time, memory in zip(numbers, milliseconds, mebibytes, strict=True):
            print(f"{number:8} {time:8.1f} ms an image {1000 / time:8.1f} img/s {memory:8.0f} MiB")
        axes.plot(numbers, milliseconds, "o-", color="tab:blue")
        axes.set(xlabel=label, ylim=(0, None), xlim=(0, None))
        axes.set_ylabel("milliseconds an image", color="tab:blue")
        right = axes.twinx()
        right.plot(numbers, mebibytes, "s--", color="tab:orange")
        right.set(ylim=(0, None))
        right.set_ylabel("tensors at the peak (MiB)", color="tab:orange")
        axes.grid(alpha=0.3)
    if options.plot:
        figure.savefig(options.plot, dpi=100)


if __name__ == "__main__":
    main()
