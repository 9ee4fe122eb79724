"""A run as the loop sees it: what is kept of a training, and when. Rank 0 has a Run, the other ranks a NoRun."""

import contextlib
import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lsag.checkpoint import Checkpoint, save_checkpoint
from lsag.distributed.world import World
from lsag.errors import OutputError
from lsag.files import read_bytes, replacing, write_checked
from lsag.plots import draw_curves
from lsag.runs import BEST, BROKEN, CURVES, OPTIONS, PRESET, RESULTS, check_run_folder
from lsag.training.events import Epoch
from lsag.training.folder import RunFolder
from lsag.training.options import TrainOptions
from lsag.training.signals import Signals
from lsag.training.state import State

CURVES_SECONDS = 30
"""Time between two drawings of the curves."""

logger = logging.getLogger(__name__)


class NoRun:
    """What the other ranks have: it keeps nothing, and never wants to save."""

    save_seconds = 0.0

    @property
    def save_due(self) -> bool:
        return False

    def newest(self) -> tuple[Path, Checkpoint] | None:
        return None

    def begin(self, state: State) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def save(self, state: State) -> None: ...

    def rescue(self, state: State) -> None: ...

    def list_broken(self, reasons: Sequence[str]) -> None: ...

    def finish_epoch(self, state: State, summary: Epoch) -> None: ...


class Run(NoRun):
    """An open run folder, and when it is written to."""

    def __init__(self, folder: RunFolder, options: TrainOptions, signals: Signals) -> None:
        self.folder, self.options, self.signals = folder, options, signals
        self.history: list[dict[str, Any]] = []
        self.saved_at: tuple[int, int] | None = None
        """Step and epoch of the last checkpoint."""
        self.fresh = True
        self.curves_drawn = -math.inf
        self.warned = False
        self._schedule()

    @property
    def save_due(self) -> bool:
        """Whether the last checkpoint is as old as it may become."""
        return time.monotonic() > self.next_save

    def newest(self) -> tuple[Path, Checkpoint] | None:
        """The checkpoint to resume, with its file; None if there is none. The errors of RunFolder.newest."""
        found = self.folder.newest()
        self.fresh = found is None
        return found

    def begin(self, state: State) -> None:
        """Cut the logs off after the state's position, and keep preset, options and, of a fresh state, a checkpoint."""
        self.folder.check_place()
        position = state.position
        moments = 4 if state.ema else 3  # weights, moving average, AdamW's two moments, in fp32
        self.folder.check_space(state.num_parameters * 4 * moments)
        self.folder.steps.rewind(lambda row: row.step <= position.step)
        self.history = [asdict(row) for row in self.folder.epochs.rewind(lambda row: row.epoch <= position.epoch)]
        for name, content in (
            (PRESET, state.preset.model_dump_json(indent=2).encode() + b"\n"),
            (OPTIONS, self.options.to_keep()),
        ):
            with replacing(self.options.out / name) as file:
                file.write(content)
        if self.fresh:
            self.folder.save(state.checkpoint(), 0)
        self._show(self._write_results)
        self.saved_at = position.step, position.epoch

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row to steps.jsonl."""
        self.folder.steps.add(row)

    def flush(self) -> None:
        """Write the logs' pending rows; if that fails, the next save tries again, and raises."""
        self.folder.check_place()
        with contextlib.suppress(OutputError):
            self.folder.steps.flush()
            self.folder.epochs.flush()

    def save(self, state: State) -> None:
        """Write a checkpoint, unless there is one of this position. OutputError if that fails for too long."""
        position = state.position
        if self.saved_at != (position.step, position.epoch):
            self._persist(lambda: self.folder.save(state.checkpoint(), position.step))
            self.saved_at = position.step, position.epoch
        self._schedule()

    def rescue(self, state: State) -> None:
        """Write a checkpoint after a failure, if possible, without another rank's help."""
        with contextlib.suppress(OutputError):
            self.folder.check_place()
            self.folder.save(state.checkpoint(), state.position.step)

    def list_broken(self, reasons: Sequence[str]) -> None:
        """Add to the run's list what is wrong with training images that were skipped, and say how many it has."""
        path = self.options.out / BROKEN
        known = read_bytes(path, what="list of broken images").splitlines() if path.exists() else []
        lines = sorted({*known, *(reason.encode("utf-8", "surrogateescape") for reason in reasons)})
        if lines != known:
            self._persist(lambda: write_checked(path, b"\n".join([*lines, b""])))
            logger.warning("broken training images that others replaced: %d, listed in %s", len(lines), path)

    def finish_epoch(self, state: State, summary: Epoch) -> None:
        """Log the epoch, keep the best model, save if it is time or the last epoch, and show the epochs so far."""
        self.history.append(asdict(summary))
        self.folder.epochs.add(self.history[-1])
        last = state.finished
        # First the best model, then the state that says which one is best.
        if summary.epoch == state.position.best_epoch:
            best = replace(state.checkpoint(), training=None)
            self._persist(lambda: save_checkpoint(self.options.out / BEST, best))
        if last or self.save_due:
            self.save(state)
        self.flush()
        self._show(self._write_results)
        if last or time.monotonic() - self.curves_drawn > CURVES_SECONDS:
            self._show(lambda: draw_curves(self.history, self.options.out / CURVES, title=state.preset.name))
            self.curves_drawn = time.monotonic()

    def _persist(self, write: Callable[[], object]) -> None:
        """Write, and if that fails, try again for a while: disks are emptied, mounts come back."""
        start, failed = time.monotonic(), False
        while True:
            self.folder.check_place()
            try:
                write()
                break
            except OutputError as error:
                stopping = self.signals.stop or self.signals.acknowledged
                minutes = self.options.save_retry_minutes
                if failed and (stopping or time.monotonic() - start > 60 * minutes):
                    mend = "free space" if self.options.out.exists() else "bring the folder back"
                    fix = f"{mend}, then resume with: {self.options.resume_command}"
                    raise OutputError(error.what, fix) from error
                if not failed:
                    logger.warning("%s; retrying every second for up to %g minutes", error.what, minutes)
                failed = True
                time.sleep(1)
        self.save_seconds += time.monotonic() - start

    def _schedule(self) -> None:
        self.next_save = time.monotonic() + 60 * self.options.save_minutes

    def _write_results(self) -> None:
        """Write the rows of metrics.jsonl as a table."""
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in fields(Epoch)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        with replacing(self.options.out / RESULTS) as file:
            file.write(table.getvalue().encode())

    def _show(self, write: Callable[[], object]) -> None:
        """Write what only shows the logs; a failure to do so stops no training, and is told once."""
        try:
            write()
        except OutputError as error:
            if not self.warned:
                logger.warning("%s", error.what)
            self.warned = True


@contextlib.contextmanager
def open_run(options: TrainOptions, world: World, signals: Signals) -> Iterator[NoRun]:
    """The run in `options.out`, locked while this lasts. OutputError if it is held, or holds a run to resume."""
    if not world.is_main:
        yield NoRun()
        return
    folder = RunFolder(options.out)
    try:
        check_run_folder(options.out, resume=options.resume)  # again: the first time it was not locked
        yield Run(folder, options, signals)
    finally:
        folder.close()
