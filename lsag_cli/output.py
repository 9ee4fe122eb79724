"""What the commands print: results on stdout, progress and errors on stderr.

All text goes through `visible`, since names of classes, presets and files may contain what a terminal would obey.
"""

import contextlib
import io
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

SCHEMA_VERSION = 1
NAMES = ("preset", "stage", "dataset", "class", "model", "image")
"""Columns of names."""
MIN_NAME = 12
"""Characters of a name that a narrow terminal still shows."""

debug = False
json_printed = False


class ReaderGoneError(Exception):
    """The reader of stdout is gone. Not an OSError, for which rich and typer would exit with 1."""


class NoteHandler(logging.Handler):
    """Shows a warning of the library as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("lsag"):
            note(f"lsag: {record.getMessage()}")


def say(*lines: str) -> None:
    """Print lines of a result on stdout."""
    try:
        for line in lines:
            print(visible(line))
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def say_prose(text: str) -> None:
    """Print sentences on stdout, broken between words where a terminal ends."""
    wrapped = textwrap.wrap(text, Console().width, break_long_words=False, break_on_hyphens=False)
    say(*(wrapped if is_terminal(sys.stdout) else [text]))


def visible(text: str) -> str:
    """The text on one line: line ends and other control characters, which a terminal would obey, are escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)


def say_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, drop: Sequence[str] = ()
) -> None:
    """Print a table on stdout: columns of names aligned left, columns of figures right.

    On a terminal that is too narrow, columns leave in the order of `drop`, and then the names in the first column lose
    their beginning. Elsewhere every column is shown in full.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    room = Console().width if is_terminal(sys.stdout) else sys.maxsize
    hidden = 0
    while hidden < len(drop) and _width(columns, rows, drop[:hidden]) > room:
        hidden += 1
    shown = [index for index, column in enumerate(columns) if column not in drop[:hidden]]
    excess = max(0, _width(columns, rows, drop[:hidden]) - room)
    longest = max(MIN_NAME, _column_width(columns, rows, 0) - excess)
    if title:
        say_prose(title)
    table = Table(box=None, pad_edge=False)
    for index in shown:
        table.add_column(columns[index], justify="left" if columns[index] in NAMES else "right")
    for row in rows:
        first = row[0] if cell_len(row[0]) <= longest else f"...{set_cell_size(row[0][::-1], longest - 3)[::-1]}"
        table.add_row(*(row[index] if index else first for index in shown))
    drawn = io.StringIO()
    Console(file=drawn, width=10_000, markup=False, emoji=False, highlight=False).print(table)
    say(*(line.rstrip() for line in drawn.getvalue().split("\n")[:-1]))
    if hidden:
        left_out = ", ".join(" ".join(column.split()) for column in columns if column in drop[:hidden])
        note(f"no room for: {left_out}; widen the terminal, or see --json")


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]], without: Sequence[str]) -> int:
    """The width of a table in cells of a terminal."""
    widths = [_column_width(columns, rows, index) for index, name in enumerate(columns) if name not in without]
    return sum(widths) + 2 * (len(widths) - 1)


def _column_width(columns: Sequence[str], rows: Sequence[Sequence[str]], index: int) -> int:
    return max(cell_len(line) for text in (columns[index], *(row[index] for row in rows)) for line in text.split("\n"))


def stderr() -> Console:
    """The console of progress bars."""
    return Console(stderr=True, force_terminal=is_terminal(sys.stderr), markup=False, emoji=False, highlight=False)


def is_terminal(stream: TextIO) -> bool:
    """Whether a person reads the stream; progress and colours are for terminals only."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def note(line: str) -> None:
    """Print a line on stderr; a closed stderr is no error."""
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr)


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


def operations(number: float, largest: float | None = None) -> str:
    """1234567890 -> '1.235 G', 1234567 -> '1.235 M'; in the unit of the `largest` of the numbers beside it."""
    return f"{number / 1e9:.3f} G" if (largest or number) >= 1e8 else f"{number / 1e6:.3f} M"


def percent(share: float | None) -> str:
    """0.97 -> '97.00 %'."""
    return "-" if share is None else f"{100 * share:.2f} %"
