"""While a command imports, a signal just ends it: an exception could surface anywhere, or nowhere."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stopping_at_once(erase: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the process with one line on stderr, after `erase` has cleared the line there."""

    def leave(number: int, frame: FrameType | None) -> None:
        if os.environ.get("RANK", "0") == "0" and "LSAG_LAUNCHER" not in os.environ:  # the launcher reports it
            erase()
            os.write(2, f"lsag: error: stopped by {signal.Signals(number).name} before it started\n".encode())
        os._exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
