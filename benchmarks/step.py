"""Images per second and peak memory of presets on this machine: inference and training step.

    python benchmarks/step.py cifar-tiny in1k-tiny --batch 8
    python benchmarks/step.py cifar-nano --batch 128 --compare-memory

Each preset is measured in rounds that take turns, each round in a process of its own; medians are printed.
--compare-memory adds rounds with the allocator as glibc sets it up, to show what lsag.device's setting does.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def measure(name: str, batch: int, keep: bool, steps: int) -> dict[str, float]:
    """One round in this process: median seconds of a forward pass and of a training step, and peak memory in bytes."""
    import torch
    import torch.nn.functional as F

    from lsag import LSAG, load_preset
    from lsag.device import choose_device
    from lsag.optim import make_optimizer

    if keep:
        choose_device("cpu")
    preset = load_preset(name)
    torch.manual_seed(0)
    config = preset.model
    model, images = LSAG(config), torch.randn(batch, config.in_channels, config.image_size, config.image_size)
    labels = torch.randint(0, config.num_classes, (batch,))
    optimizer = make_optimizer(model, preset.train)

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(images)

    def step() -> None:
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {}
    for kind, run in (("inference", forward), ("training", step)):
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        seconds[kind] = statistics.median(times[2:])
        seconds[f"{kind}_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compare-memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.presets[0], options.batch, options.child == "keep", options.steps)))
        return
    settings = ["keep", "glibc"] if options.compare_memory else ["keep"]
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in options.presets:
            for setting in settings:
                child = [sys.executable, __file__, name, "--child", setting]
                child += ["--batch", str(options.batch), "--steps", str(options.steps)]
                output = subprocess.run(child, check=True, capture_output=True, text=True).stdout
                results.setdefault((name, setting), []).append(json.loads(output))
    print(f"{'preset':20}{'memory':8}{'batch':>6}{'inference':>14}{'training':>14}{'peak inf.':>12}{'peak train':>12}")
    for (name, setting), rounds in results.items():
        speed = [options.batch / statistics.median(r[kind] for r in rounds) for kind in ("inference", "training")]
        peak = [statistics.median(r[f"{kind}_peak"] for r in rounds) / 1e6 for kind in ("inference", "training")]
        print(
            f"{name:20}{setting:8}{options.batch:6}{speed[0]:8.1f} img/s{speed[1]:8.1f} img/s"
            f"{peak[0]:9.0f} MB{peak[1]:9.0f} MB"
        )


if __name__ == "__main__":
    main()
