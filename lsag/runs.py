"""The run folder of a training: what its files are called, and whether a folder may become one."""

import os
import re
from pathlib import Path

from lsag.errors import OutputError

RUNS = Path("runs")
"""Where runs are made when nothing else is asked for."""
LOCK, PRESET, OPTIONS, STEPS, METRICS, RESULTS, CURVES, BROKEN, BEST = (
    ".lock",
    "preset.json",
    "options.json",
    "steps.jsonl",
    "metrics.jsonl",
    "results.csv",
    "curves.png",
    "broken.txt",
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


def newest_run(having: str) -> Path | None:
    """The run folder in RUNS whose file `having` is the newest, None if there is none."""
    found = max(RUNS.glob(f"*/{having}"), key=lambda path: path.stat().st_mtime, default=None)
    return found.parent if found else None


def check_run_folder(out: Path, *, resume: bool) -> None:
    """OutputError if `out` cannot be written, or holds something that a run would disturb. Creates nothing."""
    try:
        if step_files(out) and not resume:
            raise OutputError(f"{out} holds a run", f"resume it with --resume {out}, or choose another --out")
        if out.exists() and not step_files(out):
            foreign = [entry for entry in out.iterdir() if not _is_ours(entry.name)]
            if foreign:
                raise OutputError(f"{out} is not empty, and not a run of lsag", "choose another --out")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write to {there}", "choose another --out")
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}", "choose another --out") from error


def _is_ours(name: str) -> bool:
    """Whether a run that was stopped before its first checkpoint leaves a file of this name."""
    return name in (LOCK, PRESET, OPTIONS, STEPS, METRICS) or is_temporary(name)


def is_temporary(name: str) -> bool:
    """Whether an interrupted write leaves a file of this name."""
    return name.startswith(
        (".step-", *(f".{file}." for file in (BEST, PRESET, OPTIONS, STEPS, METRICS, RESULTS, CURVES, BROKEN)))
    )
