"""The files of a training's run folder, by name. Nothing here reads or writes them."""

import re
from pathlib import Path

from lsag.errors import InputError, OutputError

RUNS = Path("runs")
"""Where runs are made when nothing else is asked for."""
LOCK, PRESET, STEPS, METRICS, CURVES, BEST = (
    ".lock",
    "preset.json",
    "steps.jsonl",
    "metrics.jsonl",
    "curves.png",
    "best.pt",
)
STEP_FILE = re.compile(r"step-(\d{10})\.pt")


def step_file(folder: Path, step: int) -> Path:
    """The checkpoint of optimizer step `step` in a run folder."""
    return folder / f"step-{step:010d}.pt"


def step_files(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first: by the step in the name, not by a clock."""
    try:
        names = [entry.name for entry in folder.iterdir() if STEP_FILE.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}", "choose another folder") from error
    return [folder / name for name in sorted(names, reverse=True)]


def newest_run(having: str) -> Path:
    """The run folder in RUNS whose file `having` is the newest. InputError if there is none."""
    found = sorted(RUNS.glob(f"*/{having}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"no run in ./{RUNS} has a {having}", "name the run or the file")
    return found[-1].parent
