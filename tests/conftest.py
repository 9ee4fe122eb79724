"""Fixtures: small presets, the material beside a checkout where it is present, and a run of the command line."""

import csv
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from lsag import ModelConfig, Preset, load_checkpoint, load_preset
from lsag.presets import ablations
from lsag.training.events import Started
from lsag.training.loop import train
from lsag.training.options import TrainOptions
from tests.processes import ROOT, Server, Spawned

SHARED = ROOT.parent / "shared"
CIFAR_SHIFTS = load_preset("cifar-tiny").model.shifts
IMAGENET_SHIFTS = load_preset("in1k-tiny").model.shifts


def shared(name: str) -> Path:
    """A file of the optional material beside the checkout; a test is skipped where all of it is absent, not a file."""
    if not (SHARED / "design").is_dir():
        pytest.skip("the shared material is not beside this checkout")
    return SHARED / name


def small_config(**changes: object) -> ModelConfig:
    """A network of three stages that runs in milliseconds: 12 x 12 images, 5 variants."""
    values: dict[str, object] = {
        "image_size": 12,
        "num_classes": 7,
        "shifts": CIFAR_SHIFTS[:5],
        "patch_kernel": 3,
        "patch_stride": 1,
        "patch_padding": 1,
        "stages": [
            {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_kv_heads": 1},
            {"embed_dim": 12, "depth": 1, "num_heads": 3},
            {"embed_dim": 16, "depth": 1, "num_heads": 4, "num_kv_heads": 2},
        ],
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


ONE_SHIFT = [[0, 0]]
ABLATIONS = {name: changes["model"] for name, changes in ablations().items() if name != "full"}
"""What `small_config` changes to be each ablation of the paper's Tables 5 and 6."""


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill every parameter with values large enough that no term of a formula can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale, offset = (0.3, 1.0) if "norm" in name and name.endswith("weight") else (0.3, 0.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    return module


def images(batch: int, config: ModelConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_channels, config.image_size, config.image_size, generator=generator)


def quantized() -> Tensor:
    """Ten values of eight bits: a tensor that is no weight."""
    with warnings.catch_warnings(action="ignore"):  # torch will remove them some day
        return torch.quantize_per_tensor(torch.zeros(10), 0.1, 0, torch.qint8)


@pytest.fixture(scope="session")
def tiny_preset() -> Preset:
    """digits-nano, cut down to train in seconds: one epoch, 8-dimensional."""
    return load_preset(
        "digits-nano",
        {
            "model.stages": [
                {"embed_dim": 8, "depth": 2, "num_heads": 2},
                {"embed_dim": 8, "depth": 1, "num_heads": 2},
            ],
            "train.epochs": 1,
            "train.warmup_epochs": 0,
        },
    )


def changed(preset: Preset, changes: dict[str, object]) -> Preset:
    """`preset` with other values for keys such as train.lr."""
    values = json.loads(preset.model_dump_json())
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return type(preset).model_validate(values)


def run(preset: Preset, out: Path, **options: Any) -> list[Any]:
    """The events of a whole training on the CPU."""
    options = {"precision": "fp32"} | options  # "auto" depends on the processor
    return list(train(preset, TrainOptions(data_dir=out.parent, out=out, device="cpu", **options)))


def stop_after(preset: Preset, out: Path, steps: int, **options: Any) -> None:
    """Train until `steps` are reported, with a save after each, and abandon it there without a word, as a kill does."""
    options = {"precision": "fp32"} | options
    going = train(preset, TrainOptions(data_dir=out.parent, out=out, device="cpu", save_minutes=0, **options))
    for event in going:
        if not isinstance(event, Started) and event.step >= steps:
            break
    going.close()


def newest(out: Path) -> Path:
    """The last checkpoint of a run."""
    return max(out.glob("step-*.pt"))


def weights(out: Path) -> dict[str, Tensor]:
    """Of the last checkpoint of a run."""
    return load_checkpoint(newest(out)).model.state_dict()


def losses(out: Path) -> list[float | None]:
    """Of each step of a run."""
    return [json.loads(line)["loss"] for line in (out / "steps.jsonl").read_text().splitlines()]


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's results.csv."""
    with (out / "results.csv").open(newline="") as file:
        return [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """To the bit."""
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


TINY = [
    "--set=model.stages=[{embed_dim=8,depth=2,num_heads=2},{embed_dim=8,depth=1,num_heads=2}]",
    "--set=train.warmup_epochs=0",
    "--epochs=1",
    "--precision=fp32",
]
"""Options that make `lsag train` finish in seconds."""


MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """The folder NAME that `make` fills, the first time that any of pytest's processes asks for it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that was skipped or failed
                folder.mkdir()
                make(folder)
                finished.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def lsag(server: Server, tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run a command in a forked process, in an empty folder."""

    def run(*arguments: object, env: dict[str, str] | None = None, cwd: Path = tmp_path) -> CompletedProcess[str]:
        return server.start([*map(str, arguments)], cwd, {"COLUMNS": "120"} | (env or {})).completed()

    return run


@pytest.fixture
def lsag_afresh(tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Run a command as a user does: for what is decided while Python and its libraries are loaded."""

    def run(*arguments: object, env: dict[str, str] | None = None, cwd: Path = tmp_path) -> CompletedProcess[str]:
        return Spawned([*map(str, arguments)], cwd, {"COLUMNS": "120"} | (env or {})).completed()

    return run


def assert_refused(done: CompletedProcess[str], code: int, *words: str) -> None:
    """One line on stderr that begins as documented and names each of `words`; that exit code; nothing on stdout."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("lsag: error: "), done.stderr
    assert len(lines[0]) <= 420
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert not done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 8 + 4 colour images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path
