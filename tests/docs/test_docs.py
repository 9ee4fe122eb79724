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
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_the_table_of_presets_counts_right():
    for name in preset_names():
        total = count(load_preset(name).model)
        page = README if name in preset_paths() else DESIGN
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {total.params:,} | {total.macs / 1e9:.2f} / {total.macs_run / 1e9:.2f} G |" in row


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
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    for page in (README, (ROOT / "docs/inference.md").read_text()):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, {})
        assert "unnamed class" in capsys.readouterr().out


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


def test_commands_of_the_cluster_page_take_these_options(lsag):
    """Each `lsag train` of docs/cluster.md, as a plan: options, presets and batches must fit."""
    text = (ROOT / "docs/cluster.md").read_text()
    commands = re.findall(r"^(?:srun )?lsag train ([^\n#]*)", text, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        done = lsag("train", *[word for word in command.split() if word != "--resume"], "--dry-run")
        assert done.returncode == 0, f"{command}: {done.stderr}"
