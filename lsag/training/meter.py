"""The clocks of a training."""

import contextlib
import math
import time
from collections.abc import Iterator

from lsag.device import peak_memory
from lsag.training.events import Step
from lsag.training.state import State

REPORT_SECONDS = 0.5
"""Time between two reports of a Step."""


class Meter:
    """How long a training, its epoch and its waiting take, and what it achieved since the last report."""

    def __init__(self, state: State, *, began: float) -> None:
        """`began` is the time.monotonic() at which this sitting began; the state knows how long earlier ones took."""
        self.state, self.position, self.batch_size = state, state.position, state.preset.train.batch_size
        self.origin = began - self.position.seconds
        self.save_seconds = 0.0
        self.begin_epoch()

    @property
    def seconds(self) -> float:
        """Time that this training has taken, over all sittings."""
        return time.monotonic() - self.origin

    def begin_epoch(self) -> None:
        """An epoch begins, or is resumed, at the position."""
        self.first_step = self.state.step_in_epoch
        self.epoch_start = self.epoch_end = time.monotonic()
        self.waited = 0.0
        self._begin_window(self.epoch_start)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in here as waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def step(self, lr: float) -> Step | None:
        """A report after a step with that learning rate, None if the last one was just now."""
        now, done = time.monotonic(), self.state.step_in_epoch
        self.epoch_end = now
        if now - self._time <= REPORT_SECONDS and done < self.state.steps_per_epoch:
            return None
        seconds, losses = now - self._time, self.position.loss_steps - self._loss_steps
        report = Step(
            epoch=self.position.epoch + 1,
            step=done,
            loss=(self.position.loss_sum - self._loss_sum) / losses if losses else math.nan,
            lr=lr,
            images_per_second=(done - self._step) * self.batch_size / seconds,
            data_wait=(self.waited - self._waited) / seconds,
            memory=peak_memory(self.state.device),
        )
        self._begin_window(now)
        return report

    def epoch(self, save_seconds: float) -> dict[str, float]:
        """The rates of the epoch's training, its evaluation aside; `save_seconds` are those of the sitting so far."""
        seconds = max(self.epoch_end - self.epoch_start, 1e-9)
        saving, self.save_seconds = save_seconds - self.save_seconds, save_seconds
        return {
            "images_per_second": (self.state.steps_per_epoch - self.first_step) * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "save_share": saving / seconds,
        }

    def _begin_window(self, now: float) -> None:
        """What the next report compares with."""
        self._time, self._step, self._waited = now, self.state.step_in_epoch, self.waited
        self._loss_sum, self._loss_steps = self.position.loss_sum, self.position.loss_steps
