"""What the commands print: results on stdout, progress and errors on stderr."""

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
    """The reader of stdout is gone. Not an OSError, for which rich and typer would exit with 1."""


def say(text: str) -> None:
    """Print a result on stdout."""
    try:
        print(text)
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def visible(name: str) -> str:
    """A name with its control characters escaped, which a terminal would obey."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in name)


def say_table(table: Table) -> None:
    """Print a table on stdout at its full width: a narrow terminal may wrap it, but nothing is cut off."""
    drawn = io.StringIO()
    Console(file=drawn, width=10_000, markup=False, emoji=False, highlight=False).print(table)
    say("\n".join(line.rstrip() for line in drawn.getvalue().splitlines()))


def stderr() -> Console:
    """The console of progress bars."""
    return Console(stderr=True, force_terminal=is_terminal(sys.stderr), markup=False, emoji=False, highlight=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads the stream; progress and colours are for terminals only."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; columns of names are aligned left, columns of figures right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column in NAMES else "right")
    return made


def note(line: str) -> None:
    """Print a line on stderr; a closed stderr is no error."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Tell a terminal what takes a while, on a line that is erased afterwards."""
    show_status(f"{text} ...")
    try:
        yield
    finally:
        erase_status()


def show_status(text: str) -> None:
    """Replace the line of `status`; also from a signal handler."""
    if is_terminal(sys.stderr):
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"\x1b[2K{text}\r".encode())


def erase_status() -> None:
    """Erase the line of `status`; also from a signal handler."""
    show_status("")


def print_json(command: str, **result: Any) -> None:
    """Print the JSON object of `--json`."""
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
