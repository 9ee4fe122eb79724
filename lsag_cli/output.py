"""What the commands show: results on stdout, progress and errors on stderr."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1
NAMES = ("preset", "stage", "dataset", "class", "model", "image", "next")

debug = False
json_printed = False


class ReaderGoneError(Exception):
    """Nobody reads stdout any more. Not an OSError: rich and typer would end the program with 1 for that."""


def say(text: str) -> None:
    """A result, on stdout."""
    try:
        print(text)
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def visible(name: str) -> str:
    """A name with what a terminal would obey or break at written out."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in name)


def say_table(table: Table) -> None:
    """A table on stdout, as wide as its figures need: a narrow terminal may wrap it, but nothing is cut off."""
    drawn = io.StringIO()
    Console(file=drawn, width=10_000, markup=False, emoji=False, highlight=False).print(table)
    say("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))


def stderr() -> Console:
    """For progress bars."""
    return Console(stderr=True, force_terminal=is_terminal(sys.stderr), markup=False, emoji=False, highlight=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at it: bars and colours are for terminals only."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns of names stand left, columns of figures right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column in NAMES else "right")
    return made


def note(line: str) -> None:
    """A plain line on stderr; nobody reading it is no error."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Tell a terminal what takes a while, on a line that is erased afterwards."""
    _to_terminal(f"{text} ...\r")
    try:
        yield
    finally:
        erase_status()


def erase_status() -> None:
    """Erase the line of `status`; also from a signal handler."""
    _to_terminal("\x1b[2K\r")


def _to_terminal(text: str) -> None:
    if is_terminal(sys.stderr):
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), text.encode())


def print_json(command: str, **result: Any) -> None:
    """The one JSON object that `--json` promises."""
    global json_printed
    json_printed = True
    say(
        json.dumps(
            {"schema_version": SCHEMA_VERSION, "command": command, "ok": "error" not in result, **result},
            allow_nan=False,
        )
    )


def mega(number: float) -> str:
    """12345678 -> '12.35 M'."""
    return f"{number / 1e6:.2f} M"


def giga(number: float) -> str:
    """1234567890 -> '1.235 G'."""
    return f"{number / 1e9:.3f} G"


def percent(share: float | None) -> str:
    """0.97 -> '97.00 %'."""
    return "-" if share is None else f"{100 * share:.2f} %"
