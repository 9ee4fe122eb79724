"""The `lsag` command: its subcommands, and the one line and exit code that any error becomes."""

import errno
import os
import signal
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from lsag import __version__
from lsag.errors import LsagError
from lsag_cli import output
from lsag_cli.evaluate import evaluate
from lsag_cli.export import convert, export
from lsag_cli.flops import flops, presets
from lsag_cli.train import train

MAX_ERROR = 380

app = typer.Typer(
    help="Train, evaluate, count and export LSAG: Locally Shifted Attention With Early Global Integration.",
    epilog="Start here: lsag train",
    no_args_is_help=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(flops)
app.command()(export)
app.command()(convert)
app.command()(presets)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LSAG_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    if version:
        print(f"lsag {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit(2)


def main() -> None:
    """Run the command line: exit codes as in docs/errors.md, and for an error one line on stderr."""
    open_streams()
    try:
        code = run()
        sys.stdout.flush()
    except (BrokenPipeError, output.ReaderGoneError):
        code = 128 + signal.SIGPIPE
    except OSError as error:
        code = fail(f"cannot write to stdout: {error.strerror}", "free space or choose another place", 6)
    if code in (6, 128 + signal.SIGPIPE):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to flush it once more
    sys.exit(code)


def open_streams() -> None:
    """Give a closed stream a place to write to, and let no character be too much for a narrow encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")
    if not output.is_terminal(sys.stderr):
        os.environ.setdefault("TQDM_DISABLE", "1")  # torchvision's downloads


def run() -> int:
    """The exit code of the command in argv; an error has been told."""
    try:
        return typer.main.get_command(app).main(prog_name="lsag", standalone_mode=False) or 0
    except LsagError as error:
        return fail(error.what, error.fix, error.exit_code)
    except TyperException as error:
        return fail(error.format_message().rstrip("."), "see --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", "", 128 + signal.SIGINT)
    except output.ReaderGoneError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
            return fail("the device is out of memory", "lower --set train.batch_size, or eval --batch-size", 4)
        return bug(error)


def bug(error: Exception) -> int:
    """An error that nobody foresaw, with the traceback in a file."""
    path = Path(tempfile.gettempdir()) / f"lsag-crash-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return fail(f"a bug in lsag: {type(error).__name__}: {error}", f"please report it with {path}", 70)


def fail(what: str, fix: str, code: int) -> int:
    """Say in one line what went wrong and what to do; in the JSON object too where one was asked for."""
    what, fix = " ".join(what.split()), " ".join(fix.split())
    room = MAX_ERROR - len(fix)
    line = (what if len(what) <= room else what[: room - 3] + "...") + (f" — {fix}" if fix else "")
    if "--debug" in sys.argv or os.environ.get("LSAG_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print(f"lsag: error: {line}", file=sys.stderr)
    if "--json" in sys.argv and not output.json_printed:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        output.print_json(command, error={"code": code, "message": line})
    return code
