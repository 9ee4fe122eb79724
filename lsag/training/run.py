"""The folder of one training: its lock, its logs and its checkpoints, of which a valid one is there at any moment."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from lsag.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lsag.errors import DamagedError, InputError, OutputError
from lsag.failpoints import failpoint
from lsag.files import replacing, sync_folder, writing
from lsag.runs import BEST, CURVES, LOCK, METRICS, PRESET, STEPS, step_file, step_files

KEEP = 3
"""Checkpoints that are kept beside best.pt."""

logger = logging.getLogger(__name__)


def check_run_folder(out: Path, *, resume: bool) -> None:
    """OutputError if `out` could not be written, or holds something that a run would disturb. Creates nothing."""
    try:
        if step_files(out) and not resume:
            raise OutputError(f"{out} holds a run", f"continue it with --resume {out}, or choose another --out")
        if out.exists() and not step_files(out):
            foreign = [entry for entry in out.iterdir() if not _is_ours(entry.name)]
            if foreign:
                raise OutputError(f"{out} is not empty, and no run of lsag", "choose another --out")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write to {there}", "choose another --out")
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}", "choose another --out") from error


def _is_ours(name: str) -> bool:
    """Whether a name is what a run leaves that was stopped before its first checkpoint."""
    return name in (LOCK, PRESET, STEPS, METRICS) or _is_temporary(name)


def _is_temporary(name: str) -> bool:
    return name.startswith((".step-", *(f".{file}." for file in (BEST, PRESET, STEPS, METRICS, CURVES))))


class RunFolder:
    """An open run folder; one process on one machine holds it, and no other can open it until that process ends."""

    def __init__(self, path: Path) -> None:
        """Create the folder where it is absent, take its lock, and clear away what an interrupted write left."""
        self.path = path
        self.steps, self.epochs = _Log(path / STEPS), _Log(path / METRICS)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+")
            try:
                # A record lock belongs to this process alone: workers that it forks do not keep it.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._lock.seek(0)
                holder = self._lock.read(200).strip() or "another process"
                self._lock.close()
                raise OutputError(f"{path} is in use by {holder}", "wait for it, or choose another --out") from error
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%F %T} UTC\n")
            self._lock.flush()
            for entry in list(path.iterdir()):
                if _is_temporary(entry.name):
                    entry.unlink()

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The newest checkpoint that is whole; damaged ones are renamed to *.corrupt. None where there never was one.

        InputError if there are checkpoints, but none is whole, or one cannot be read or is of a newer format.
        """
        files = step_files(self.path)
        for path in files:
            try:
                checkpoint = load_checkpoint(path)
                if (checkpoint.training or {}).get("step") != int(path.stem.removeprefix("step-")):
                    raise DamagedError(f"{path} holds another step than its name says")
                return path, checkpoint
            except DamagedError as error:
                with writing(path):
                    path.rename(path.with_suffix(".pt.corrupt"))
                logger.warning("%s; it is passed over, and kept as %s.corrupt", error.what, path.name)
        if files:
            raise InputError(f"none of the {len(files)} checkpoints in {self.path} is whole", "start again elsewhere")
        return None

    def save(self, checkpoint: Checkpoint, step: int) -> None:
        """Write the logs and the checkpoint of `step`, then remove old ones."""
        failpoint("before_save")
        self.steps.flush(sync=True)
        self.epochs.flush(sync=True)
        path = step_file(self.path, step)
        save_checkpoint(path, checkpoint)
        for old in step_files(self.path)[KEEP:]:
            failpoint("mid_prune")
            try:
                old.unlink()
            except OSError as error:
                logger.warning("cannot remove %s: %s", old, error.strerror)
        with writing(self.path):
            sync_folder(self.path)

    def check_space(self, size: int) -> None:
        """OutputError unless the checkpoints that are kept, each of `size` bytes, and one in the making have room."""
        needed = (KEEP + 1 - len(step_files(self.path))) * size
        with writing(self.path):
            free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OutputError(
                f"the run needs {needed / 1e6:,.0f} MB in {self.path}, {free / 1e6:,.0f} MB are free",
                "free space or choose another --out",
            )


class _Log:
    """A file of JSON lines. Rows wait in memory until they are written; a write that fails is undone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self.pending.append(json.dumps(row, allow_nan=False) + "\n")

    def flush(self, *, sync: bool = False) -> None:
        """Append the waiting rows. OutputError when that fails; they then still wait."""
        if not self.pending and not sync:
            return
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, "".join(self.pending).encode())
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
        self.pending.clear()

    def rewind(self, keep: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """Remove the rows that are torn or not to be kept; gives those that stay."""
        rows, lines = [], []
        with writing(self.path):
            if self.path.exists() and not self.path.is_file():
                raise OutputError(f"{self.path} is not a regular file", "remove it")
            text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # of what is no row of ours
                row = json.loads(line)
                if line.endswith("\n") and keep(row):
                    rows.append(row)
                    lines.append(line)
        if "".join(lines) != text:
            with replacing(self.path) as file:
                file.write("".join(lines).encode())
        return rows


def _write_all(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
