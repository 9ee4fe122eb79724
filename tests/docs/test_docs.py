"""What the documentation says of the code is so."""

import re
import subprocess
import tomllib

import numpy as np
import pytest
from PIL import Image

from lsag import load_preset
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.model.flops import count
from lsag.presets import preset_names, preset_paths
from lsag.weights import cards
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs/models.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_the_tables_of_presets_count_right():
    for name in preset_names():
        total = count(load_preset(name).model)
        for page in (README, MODELS, DESIGN):
            for row in (line for line in page.splitlines() if line.startswith(f"| `{name}` |")):
                plain = "" if page is README else f"{total.macs / 1e9:.2f} / "
                assert f"| {total.params:,} | {plain}{total.macs_run / 1e9:.2f} G |" in row
        assert f"| `{name}` |" in (MODELS if name in preset_paths() else DESIGN)


def test_the_accuracies_of_trained_weights_are_those_of_their_cards():
    for page in (README, MODELS):
        row = next(line for line in page.splitlines() if line.startswith("| `cifar-nano` |"))
        assert f"{cards()['cifar-nano'].top1:.2%}".replace("%", " %") in row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_open(page):
    text = page.read_text()
    assert not re.search(r"@@|TODO|FILL|_AFTER", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    preset = load_preset("cifar-nano")
    (tmp_path / "runs/mine").mkdir(parents=True)
    save_checkpoint(tmp_path / "runs/mine/best.pt", random_checkpoint(preset))
    for name in ("cat.jpg", "photo.jpg"):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for page, printed in ((README, "probabilities="), ((ROOT / "docs/inference.md").read_text(), "unnamed class")):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, {})
        assert printed in capsys.readouterr().out


def test_the_constraints_are_within_the_bounds():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        if name != "onnxruntime":
            assert tuple(map(int, pinned[name].split("+")[0].split(".")[:2])) >= tuple(map(int, floor.split(".")[:2]))


@pytest.mark.parametrize(
    "path", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name
)
def test_shell_examples_are_shell(path):
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


@pytest.mark.slow
def test_the_commands_of_the_readme_run(lsag, tmp_path):
    """One after the other in one folder; trainings and evaluations of data sets take a few images and one epoch."""
    few = "--dataset folder --data-dir photos --val-split 0.5 --epochs 1 --set train.batch_size=4"
    instead = {
        "train": "--epochs 1",
        "train --preset cifar-nano": few,
        "train --preset cifar-tiny --dataset cifar100": few,
        "train --preset in1k-tiny --gpus 8 --out runs/in1k": f"{few} --device cpu --procs 2",
        "eval ckpt.pt --dataset cifar10": "--dataset folder --data-dir cifar",
    }
    rng, folders = np.random.default_rng(0), ("photos/cat", "photos/dog", "cifar/val/cat", "cifar/val/dog")
    for name in ("photo.jpg", *(f"{folder}/{index}.jpg" for folder in folders for index in range(4))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / name)
    lsag("export", "cifar-nano", "--safetensors", "--out", "ckpt.safetensors")
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    commands = [command for block in blocks for command in re.findall(r"\blsag ([a-z][^\n#]*)", block)]
    assert len(commands) == 14 and instead.keys() <= {command.strip() for command in commands}
    for command in map(str.strip, commands):
        words = f"{command} {instead.get(command, '')}".replace("ckpt.pt", "ckpt.safetensors").split()
        if "--procs" in words:
            words = [word for word in words if word not in ("--gpus", "8")]
        done = lsag(*words)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_commands_of_the_cluster_page_take_these_options(lsag):
    """Each `lsag train` of docs/cluster.md, as a plan: options, presets and batches must fit."""
    text = (ROOT / "docs/cluster.md").read_text()
    commands = re.findall(r"^(?:srun )?lsag train ([^\n#]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        done = lsag("train", *[word for word in command.split() if word != "--resume"], "--dry-run")
        assert done.returncode == 0, f"{command}: {done.stderr}"
