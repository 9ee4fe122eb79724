"""Places where a test can make a training fail: `LSAG_FAILPOINT=name:count:kind[@rank]`, comma-separated.

The `count`-th time that `name` is reached, the process is killed (kind `kill`), gets a signal (`term`, `int`), an error
of the disk (`enospc`, `eio`), stands still (`hang`), or continues with a value of NaN (`nan`). Without the
variable a failpoint does nothing. Where they are and what they prove: docs/reliability.md.
"""

import errno
import os
import re
import signal
import time
from collections import Counter

from lsag.errors import UsageError

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}

_armed = [point for point in os.environ.get("LSAG_FAILPOINT", "").split(",") if point]
_reached: Counter[str] = Counter()


def failpoint(name: str) -> bool:
    """Fail here if a test asks for it; True if it asks for a value that is not a number."""
    if not _armed:
        return False
    _reached[name] += 1
    for point in _armed:
        form = re.fullmatch(r"(\w+):(\d+)(\+?):(kill|term|int|enospc|eio|hang|nan)(?:@(\d+))?", point)
        if form is None:
            raise UsageError(f"LSAG_FAILPOINT {point!r} is not of the form name:count:kind", "unset it")
        wanted, count, lasting, kind, rank = form.groups()
        # "3" is the third time only, "3+" the third and every later one.
        hit = _reached[name] >= int(count) if lasting else _reached[name] == int(count)
        if wanted != name or not hit or (rank and rank != os.environ.get("RANK", "0")):
            continue
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        elif kind == "hang":
            time.sleep(3600)
        return kind == "nan"
    return False
