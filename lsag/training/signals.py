"""Signals as wishes that the training loop looks at: it finishes its step and saves before it stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from lsag.errors import InterruptedByUserError, LsagError, TerminatedError

if TYPE_CHECKING:
    from lsag.training.options import TrainOptions


class StopRequestedError(BaseException):
    """A wish to stop. Not an Exception, so that no library's error handling swallows it."""

    def __init__(self, signal: int = signal.SIGTERM) -> None:
        self.signal = signal


class Signals:
    """SIGTERM, SIGINT and SIGHUP set `stop`, SIGUSR1 sets `save`; a second SIGINT is a KeyboardInterrupt.

    In effect while entered, and in the main thread only: Python handles signals nowhere else.
    """

    def __init__(self) -> None:
        self.lasting = False
        """Whether the handlers stay on exit: one process of several then ends undisturbed."""
        self.stop = 0
        """The number of the first signal that asked to stop, 0 if there is none."""
        self.save = False
        self.acknowledged = False
        """Whether the loop has seen the wish to stop and is saving."""
        self._interruptible = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._interruptible = False
        if not self.lasting:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        if number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = self.stop or number
        if self._interruptible:
            raise StopRequestedError(self.stop)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a wish to stop is raised at once as StopRequestedError: for waits of unknown length."""
        self._interruptible = True
        try:
            if self.stop:
                raise StopRequestedError(self.stop)
            yield
        finally:
            self._interruptible = False


def wish_to_stop(own: int) -> dict[str, float]:
    """What a rank that signal `own` asked to stop (0: none did) tells the others."""
    return {"interrupt": own == signal.SIGINT, "terminate": own not in (0, signal.SIGINT)}


def agreed_stop(own: int, agreed: Mapping[str, float]) -> int:
    """The signal for which this rank stops with all others: its own, or one like that of another rank; 0 for none.

    Once all have agreed, a rank that leaves first gets the others a SIGTERM, which is then no cause.
    """
    asked = signal.SIGTERM if agreed["terminate"] else signal.SIGINT if agreed["interrupt"] else 0
    return (own or asked) if asked else 0


def stopped(number: int, step: int, options: "TrainOptions") -> LsagError:
    """The error that ends a training which signal `number` stopped after `step`."""
    interrupted = number == signal.SIGINT
    kind = InterruptedByUserError if interrupted else TerminatedError
    cause = "interrupted" if interrupted else f"stopped by {signal.Signals(number).name}"
    return kind(f"{cause}; step {step} is saved in {options.out}", f"resume with: {options.resume_command}")
