"""What several CPU processes gain, and what saving costs.

    python benchmarks/training.py --data-dir FOLDER          # FOLDER/train/CLASS/*.jpg and FOLDER/test/CLASS/*.jpg

Each training is a process of its own, `lsag train --preset cifar-nano` for one epoch; the settings take turns, and the
figures are medians. Saving is measured with the whole state of models of Table 2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lsag import LSAG, load_preset
from lsag.data.sources import placeholder_classes
from lsag.training.folder import RunFolder
from lsag.training.optim import make_optimizer
from lsag.training.state import State

SETTINGS = {
    "1 process, 1 thread": (["--procs", "1"], "1"),
    "1 process, 2 threads": (["--procs", "1"], "2"),
    "2 processes, 1 thread each": (["--procs", "2"], "1"),
    "2 processes, 2 slices each": (["--procs", "2", "--accum", "2"], "1"),
    "1 process, 2 threads, 4 slices": (["--procs", "1", "--accum", "4"], "2"),
}


def train(data: Path, options: list[str], threads: str) -> float:
    """Images per second in the one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lsag_cli", "train", "--preset", "cifar-nano", "--dataset", "folder"]
        command += ["--data-dir", str(data), "--epochs", "1", "--device", "cpu", "--workers", "0", "--out", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*command, *options], cwd=folder, check=True, capture_output=True, env=environment)
        return float(json.loads(Path(folder, "run/metrics.jsonl").read_text())["images_per_second"])


def save(name: str, repeats: int) -> tuple[float, float]:
    """The seconds that saving the state of a preset's training takes, and its size in MB."""
    preset = load_preset(name)
    model = LSAG(preset.model)
    optimizer = make_optimizer(model, preset.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = State(model, optimizer, scaler, None, preset, placeholder_classes(preset.model.num_classes), "")
    times = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        for step in range(repeats):
            start = time.perf_counter()
            run.save(state.checkpoint(), step)
            times.append(time.perf_counter() - start)
        size = max(path.stat().st_size for path in Path(folder).glob("step-*.pt")) / 1e6
        run.close()
    return statistics.median(times), size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    speeds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for _ in range(options.repeats):
        for setting, (arguments, threads) in SETTINGS.items():
            speeds[setting].append(train(options.data_dir, arguments, threads))
    first = statistics.median(next(iter(speeds.values())))
    for setting, found in speeds.items():
        median = statistics.median(found)
        print(f"{setting:32} {median:6.0f} img/s  {median / first:.2f}  (from {min(found):.0f} to {max(found):.0f})")
    for name in ("cifar-nano", "in1k-tiny", "cifar-small", "cifar-base"):
        seconds, size = save(name, options.repeats)
        print(f"saving {name:12} {size:7.1f} MB  {seconds:6.2f} s  {100 * seconds / 300:.2f} % of 5 minutes")


if __name__ == "__main__":
    main()
