"""What the commands show: results on stdout, progress and errors on stderr."""

import json
import sys
from typing import Any

from rich.console import Console

SCHEMA_VERSION = 1

json_printed = False


def stdout() -> Console:
    """For results. Off a terminal nothing is cut to its width, and there is no colour."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """For progress and notes."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def note(line: str) -> None:
    """A plain line on stderr."""
    stderr().print(line, markup=False)


def print_json(command: str, **result: Any) -> None:
    """The one JSON object that `--json` promises."""
    global json_printed
    json_printed = True
    print(json.dumps({"schema_version": SCHEMA_VERSION, "command": command, "ok": "error" not in result, **result}))


def mega(number: float) -> str:
    """12345678 -> '12.35 M'."""
    return f"{number / 1e6:.2f} M"


def giga(number: float) -> str:
    """1234567890 -> '1.235 G'."""
    return f"{number / 1e9:.3f} G"


def percent(share: float | None) -> str:
    """0.97 -> '97.00 %'."""
    return "-" if share is None else f"{100 * share:.2f} %"
