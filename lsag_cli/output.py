"""What the commands show: results on stdout, progress and errors on stderr."""

import contextlib
import json
import os
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1

json_printed = False


class ReaderGoneError(Exception):
    """Nobody reads stdout any more. Not an OSError: rich and typer would end the program with 1 for that."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise ReaderGoneError


def stdout() -> Console:
    """For results: plain text, in full length where it is not a terminal."""
    return _console(sys.stdout)


def stderr() -> Console:
    """For progress and notes."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    terminal = is_terminal(stream)
    return _Console(
        file=stream,
        force_terminal=terminal,
        width=None if terminal else 200,
        soft_wrap=not terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at it: bars and colours are for terminals only."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def table(*columns: str, title: str | None = None, wrapping: str | None = None) -> Table:
    """A table that never loses a figure; only the column `wrapping` gives way on a narrow terminal."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        text = column in ("preset", "stage", "what", "dataset", "class")
        made.add_column(column, justify="left" if text else "right", no_wrap=column != wrapping, overflow="fold")
    return made


def note(line: str) -> None:
    """A plain line on stderr; nobody reading it is no error."""
    with contextlib.suppress(OSError, ReaderGoneError):
        stderr().print(line)


def print_json(command: str, **result: Any) -> None:
    """The one JSON object that `--json` promises."""
    global json_printed
    json_printed = True
    try:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "command": command, "ok": "error" not in result, **result}))
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def mega(number: float) -> str:
    """12345678 -> '12.35 M'."""
    return f"{number / 1e6:.2f} M"


def giga(number: float) -> str:
    """1234567890 -> '1.235 G'."""
    return f"{number / 1e9:.3f} G"


def percent(share: float | None) -> str:
    """0.97 -> '97.00 %'."""
    return "-" if share is None else f"{100 * share:.2f} %"
