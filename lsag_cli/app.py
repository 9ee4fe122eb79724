"""The `lsag` command: its subcommands, and the one line and exit code that any error becomes."""

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

MAX_ERROR = 400

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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = typer.main.get_command(app).main(prog_name="lsag", standalone_mode=False) or 0
        sys.stdout.flush()
    except LsagError as error:
        code = fail(str(error), error.exit_code)
    except TyperException as error:
        code = fail(f"{error.format_message().rstrip('.')} — see --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        code = fail(f"a bug in lsag: {type(error).__name__}: {error} — please report it with {crash_log()}", 70)
    sys.exit(code)


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line; in the JSON object too where one was asked for."""
    line = " ".join(message.split())
    if len(line) > MAX_ERROR:
        line = line[: MAX_ERROR - 3] + "..."
    if "--debug" in sys.argv or os.environ.get("LSAG_DEBUG"):
        traceback.print_exc()
    if "--json" in sys.argv and not output.json_printed:
        output.print_json(
            next((word for word in sys.argv[1:] if not word.startswith("-")), ""), error={"code": code, "message": line}
        )
    print(f"lsag: error: {line}", file=sys.stderr)
    return code


def crash_log() -> Path:
    """The full traceback, in a file of its own."""
    path = Path(tempfile.gettempdir()) / f"lsag-crash-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    path.write_text(traceback.format_exc())
    return path
