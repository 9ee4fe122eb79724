"""What a training does when it is told to stop: it finishes its step and saves, as the loop looks at these wishes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from lsag.errors import InterruptedByUserError, LsagError, TerminatedError


class StopRequestedError(BaseException):
    """A wish to stop that came while nothing is to be saved. No Exception, lest a library's error handling eat it."""


class Signals:
    """SIGTERM, SIGINT and SIGHUP become `stop`, SIGUSR1 becomes `save`; a second SIGINT is a KeyboardInterrupt.

    In effect while entered, and in the main thread only: elsewhere Python lets nobody handle signals.
    """

    def __init__(self) -> None:
        self.lasting = False
        """Whether the handlers stay when this is left: one process of several is about to end then, undisturbed."""
        self.stop = 0
        """The number of the signal that asked to stop, 0 while none has."""
        self.save = False
        self.acknowledged = False
        """Whether the loop has seen the wish to stop, and is saving."""
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
            raise StopRequestedError

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """While this lasts, a wish to stop is raised at once as StopRequestedError: for waits of unknown length."""
        self._interruptible = True
        try:
            if self.stop:
                raise StopRequestedError
            yield
        finally:
            self._interruptible = False


def stopped(number: int, what: str, fix: str) -> LsagError:
    """The error that ends a training which signal `number` stopped."""
    kind = InterruptedByUserError if number == signal.SIGINT else TerminatedError
    return kind(f"stopped by {signal.Signals(number).name}: {what}", fix)
