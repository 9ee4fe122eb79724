"""The run that is killed, starved and resumed, and what it must come to."""

import json
import time
from pathlib import Path

import torch
from PIL import Image

# Everything that draws random numbers is on, so that a resume that forgets one of them shows.
PRESET = """
[model]
image_size = 8
num_classes = 4
shifts = [[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]
patch_kernel = 3
patch_stride = 1
patch_padding = 1
drop_path = 0.2
stages = [{embed_dim = 32, depth = 1, num_heads = 2, num_kv_heads = 1}, {embed_dim = 32, depth = 1, num_heads = 2}]
[data]
dataset = "folder"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
train_crop = "padded"
crop_padding = 1
[train]
epochs = 3
batch_size = 16
lr = 2e-2
warmup_epochs = 1
ema_decay = 0.9
"""
STEPS_PER_EPOCH = 24
STEPS = 3 * STEPS_PER_EPOCH


def make_data(folder: Path) -> Path:
    """384 training and 30 evaluation images of four coloured shapes with noise."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 16 * STEPS_PER_EPOCH // 4), ("val", 8)):
        for label in range(4):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for index in range(count - (split == "val" and label > 1)):
                pixels = torch.randint(0, 120, (8, 8, 3), generator=generator, dtype=torch.uint8)
                pixels[label : label + 4, label : label + 4, label % 3] += 100
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


def wait_for_step(out: Path, step: int, timeout: float = 120) -> None:
    """Until the log of a run shows that `step` is done."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if steps_logged(out) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{out} did not reach step {step}")


def wait_until_idle(process: int, timeout: float = 120) -> None:
    """Until a process has used no processor time for two seconds."""
    end, used = time.monotonic() + timeout, None
    while time.monotonic() < end:
        before, used = used, Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        if used == before:
            return
        time.sleep(2)
    raise TimeoutError(f"process {process} does not come to rest")


def steps_logged(out: Path) -> int:
    path = out / "steps.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


def result(out: Path) -> dict[str, object]:
    """All that must not depend on how often a run was stopped: each step's loss, the metrics, the final state."""
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    timing = {"images_per_second", "data_wait", "save_share", "seconds"}
    epochs = [
        {key: value for key, value in json.loads(line).items() if key not in timing}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    newest = max(out.glob("step-*.pt"))
    tensors: dict[str, object] = {}

    def flatten(value: object, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(inner, f"{key}/{name}")
        elif isinstance(value, torch.Tensor):
            tensors[key] = value.numpy().tobytes()
        elif not key.endswith("seconds"):
            tensors[key] = value

    flatten(torch.load(newest), newest.name)
    flatten(torch.load(out / "best.pt"), "best.pt")
    return {"steps": steps, "epochs": epochs, "state": tensors}


def assert_same(found: dict[str, object], expected: dict[str, object]) -> None:
    for name, value in expected.items():
        if found[name] != value:
            if isinstance(value, list):
                theirs = found[name]
                assert isinstance(theirs, list)
                assert len(theirs) == len(value), f"{len(theirs)} rows of {name}, not {len(value)}"
                first = next(i for i, (a, b) in enumerate(zip(theirs, value, strict=True)) if a != b)
                raise AssertionError(f"{name} differ first at {first}: {theirs[first]} against {value[first]}")
            assert isinstance(value, dict)
            other = found[name]
            assert isinstance(other, dict)
            raise AssertionError(f"{name} differs in {[key for key in value if other.get(key) != value[key]][:5]}")
