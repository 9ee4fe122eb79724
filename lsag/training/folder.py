"""The run folder on disk: its lock, its logs and its checkpoints, of which at least one is valid at any moment."""

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from lsag.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lsag.errors import DamagedError, InputError, OutputError
from lsag.failpoints import failpoint
from lsag.files import replacing, sync_folder, writing
from lsag.runs import LOCK, METRICS, STEPS, is_temporary, step_file, step_files
from lsag.training.events import Epoch, StepRow

KEEP = 3
"""Number of checkpoints to keep beside best.pt."""

logger = logging.getLogger(__name__)
Row = TypeVar("Row")
_locked: set[tuple[int, int]] = set()
"""Device and inode of each lock that this process holds: to itself, a record lock is no obstacle."""


class RunFolder:
    """An open run folder. Its lock is held, and no other training on this machine can open it until it is closed."""

    def __init__(self, path: Path) -> None:
        """Create the folder if it is absent, take its lock, and remove what an interrupted write left behind."""
        self.path = path
        self.steps, self.epochs = Log(path / STEPS, StepRow), Log(path / METRICS, Epoch)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            if (path / LOCK).exists() and _identity((path / LOCK).stat()) in _locked:
                raise OutputError(f"{path} is in use by this process", "wait for it, or choose another --out")
            self._lock = (path / LOCK).open("a+")
            try:
                # A record lock belongs to this process alone: workers that it forks do not inherit it.
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
                if is_temporary(entry.name):
                    entry.unlink()
            self._identity = _identity(os.fstat(self._lock.fileno()))
        _locked.add(self._identity)

    def close(self) -> None:
        """Release the lock."""
        _locked.discard(self._identity)
        self._lock.close()

    def check_place(self) -> None:
        """OutputError if another folder is now at `path`. One that is gone may come back: writing to it will tell."""
        try:
            in_place = _identity((self.path / LOCK).stat()) == self._identity
        except FileNotFoundError:
            in_place = not self.path.exists()
        except OSError:
            return
        if not in_place:
            what = f"{self.path} has been replaced: the lock of this run is not there, and nothing more is saved"
            raise OutputError(what, "move the run's own folder back, then resume it")

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The newest valid checkpoint, None if there are no checkpoints. Damaged ones are renamed to *.corrupt.

        InputError if none is valid, or if one cannot be read or has a newer format.
        """
        files = step_files(self.path)
        for path in files:
            try:
                checkpoint = load_checkpoint(path)
                step = (checkpoint.training or {}).get("step")
                if type(step) is not int or path != step_file(self.path, step):
                    raise DamagedError(f"{path} holds another step than its name says")
                return path, checkpoint
            except DamagedError as error:
                with writing(path):
                    path.rename(path.with_suffix(".pt.corrupt"))
                logger.warning("%s; it is skipped, and kept as %s.corrupt", error.what, path.name)
        if files:
            what = f"none of the {len(files)} checkpoints in {self.path} is valid"
            raise InputError(what, "start again with another --out")
        return None

    def save(self, checkpoint: Checkpoint, step: int) -> None:
        """Write the logs and the checkpoint of `step`, then remove the oldest ones."""
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
        """OutputError unless there is room for the checkpoints to keep, of `size` bytes each, and one being written."""
        needed = (KEEP + 1 - len(step_files(self.path))) * size
        with writing(self.path):
            free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OutputError(
                f"the run needs {needed / 1e6:,.0f} MB in {self.path}, {free / 1e6:,.0f} MB are free",
                "free space or choose another --out",
            )


class Log(Generic[Row]):
    """A file of rows in JSON. Rows are held in memory until they are flushed; a write that fails is undone."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path, self.kind = path, TypeAdapter(kind)
        self.pending: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self.pending.append(json.dumps(row, allow_nan=False) + "\n")

    def flush(self, *, sync: bool = False) -> None:
        """Append the pending rows. OutputError if that fails; they then stay pending."""
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

    def rewind(self, keep: Callable[[Row], bool]) -> list[Row]:
        """Remove torn or damaged rows and those not to `keep`; returns the others."""
        rows, lines, damaged = [], [], 0
        with writing(self.path):
            if self.path.exists() and not self.path.is_file():
                raise OutputError(f"{self.path} is not a regular file", "remove it")
            text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # torn by a kill
            try:
                row = self.kind.validate_json(line)
            except ValidationError:
                damaged += 1
                continue
            if keep(row):
                rows.append(row)
                lines.append(line)
        if damaged:
            logger.warning("%d damaged rows of %s were removed", damaged, self.path)
        if "".join(lines) != text:
            with replacing(self.path) as file:
                file.write("".join(lines).encode())
        return rows


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write_all(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
