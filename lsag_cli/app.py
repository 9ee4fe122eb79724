"""The `lsag` command: its subcommands, and how an error becomes one line and an exit code."""

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from lsag import __version__
from lsag.distributed.launch import LAUNCHER, launched, orphaned, report
from lsag.errors import (
    InterruptedByUserError,
    LsagError,
    PeerLostError,
    TerminatedError,
    WorkerError,
    is_out_of_memory,
)
from lsag.training.signals import StopRequestedError
from lsag_cli import output
from lsag_cli.bench import bench
from lsag_cli.doctor import doctor
from lsag_cli.evaluate import evaluate
from lsag_cli.explain import explain
from lsag_cli.export import convert, export
from lsag_cli.flops import flops, presets
from lsag_cli.predict import predict
from lsag_cli.push import push
from lsag_cli.reproduce import reproduce
from lsag_cli.trackers import stuck
from lsag_cli.train import train

MAX_ERROR = 380

app = typer.Typer(
    help="Train, evaluate, profile and export LSAG: Locally Shifted Attention With Early Global Integration.",
    epilog="Start here: lsag train",
    no_args_is_help=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(flops)
app.command()(predict)
app.command()(explain)
app.command()(bench)
app.command()(export)
app.command()(convert)
app.command()(push)
app.command()(reproduce)
app.command()(presets)
app.command()(doctor)
for command in app.registered_commands:
    for annotation in getattr(command.callback, "__annotations__", {}).values():
        for option in getattr(annotation, "__metadata__", ()):
            option.readable = False  # typer would call it a wrong use; the commands say what cannot be read, and why


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LSAG_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    output.debug = debug
    if version:
        print(f"lsag {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")
        raise typer.Exit(2)


def main() -> None:
    """Run the command line: exit codes as in docs/errors.md, and for an error one line on stderr."""
    open_streams()
    # How long an idle OpenMP thread keeps its core busy, read when libgomp is loaded. By default that is milliseconds;
    # with other work on the machine, each product then waits for threads that wait for cores (docs/benchmarks.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # What goes wrong in torch's C++ is also raised, and told in one line. Read when torch is loaded.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # Whatever Python this one starts, such as multiprocessing's, must not import what lies in the current folder.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, terminate)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until a training handles it
    code = 0
    try:
        code = run()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # nothing is left to stop
        sys.stdout.flush()
    except (BrokenPipeError, output.ReaderGoneError):
        code = 128 + signal.SIGPIPE
    except OSError as error:
        code = code or fail(f"cannot write to stdout: {error.strerror}", "free space or choose another place", 6)
    if code in (6, 128 + signal.SIGPIPE):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to flush it again
    if launched() or stuck() or (code and "RANK" in os.environ):
        leave(code)
    sys.exit(code)


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as Ctrl-C does: what it was writing is removed."""
    raise StopRequestedError


def open_streams() -> None:
    """Replace closed streams by the null device, and escape characters that the encoding of a stream lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        else:
            stream.reconfigure(errors="backslashreplace")
    if not output.is_terminal(sys.stderr):
        os.environ.setdefault("TQDM_DISABLE", "1")  # torchvision's downloads


def run() -> int:
    """Run the command in argv; its exit code. An error has been reported by then."""
    logging.basicConfig(level=logging.WARNING, handlers=[output.NoteHandler()])
    try:
        Path.cwd()
    except OSError:
        return fail("the current folder has been deleted", "go to one that exists", 4)
    try:
        code = typer.main.get_command(app).main(prog_name="lsag", standalone_mode=False) or 0
        return fail("interrupted", "", code) if code == 128 + signal.SIGINT else code  # typer handles Ctrl-C itself
    except LsagError as error:
        code = fail(error.what, error.fix, error.exit_code, consequence=isinstance(error, PeerLostError))
        if isinstance(error, WorkerError | InterruptedByUserError | TerminatedError):
            leave(code)
        return code
    except StopRequestedError:
        leave(fail("stopped by SIGTERM", "", 128 + signal.SIGTERM))
    except TyperException as error:
        return fail(error.format_message().rstrip("."), "see --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", "", 128 + signal.SIGINT)
    except output.ReaderGoneError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return fail(f"the path {str(error.filename)[:100]}... is too long", "choose a shorter one", 2)
        what, fix = lack(error)
        return fail(what, fix, 4) if what else bug(error)


def lack(error: Exception) -> tuple[str, str]:
    """What this machine lacks, and how to provide it, if that is the cause of an unforeseen error."""
    text = str(error)
    if is_out_of_memory(error):
        return "out of memory", "train: --accum 2, --recompute all; eval: lower --batch-size"
    if getattr(error, "errno", None) == errno.EMFILE:
        return "too many files are open", "raise the limit with ulimit -n"
    if "temporary directory" in text:
        return (
            "there is no usable temporary folder",
            "free space in /tmp, or set TMPDIR to a folder that can be written",
        )
    if "shared memory" in text:
        return "there is not enough shared memory", "enlarge /dev/shm (docker run --shm-size=1g)"
    if "can't start new thread" in text:
        return "no more threads can be started", "raise the limits on processes and memory: ulimit -u, ulimit -v"
    if isinstance(error, ImportError | OSError) and (
        library := next((line for line in text.splitlines() if ".so" in line or ".dylib" in line), None)
    ):
        return f"a library cannot be loaded: {library}", "raise the limit on memory, ulimit -v; or install it again"
    return "", ""


def leave(code: int) -> NoReturn:
    """Exit at once: a destructor might wait for ever for a data worker or a rank that has died or hangs."""
    from multiprocessing import active_children

    for worker in active_children():
        worker.kill()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def bug(error: Exception) -> int:
    """Report an unforeseen error, with its traceback in a file."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"lsag-crash-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    what = f"a bug in lsag: {type(error).__name__}: {error}"
    try:
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:
        return fail(what, "please report it with the output of lsag --debug", 70)
    return fail(what, f"please report it with {path}", 70)


def fail(what: str, fix: str, code: int, *, consequence: bool = False) -> int:
    """Say in one line what went wrong and what to do, and in the JSON object if one was asked for; returns `code`.

    A rank of a training tells its launcher instead, which speaks for all ranks; stopped by a signal, it returns 0.
    """
    what, fix = " ".join(what.split()), " ".join(fix.split())
    if launched():
        report(what, fix, code, consequence=consequence)
        return 0 if code in (128 + signal.SIGINT, 128 + signal.SIGTERM) else code
    if (consequence or orphaned()) and os.environ.get("RANK", "0") != "0":
        return code
    if orphaned():
        what = f"the launcher (process {os.environ[LAUNCHER]}) is gone: {what}"
    with contextlib.suppress(OSError):
        if output.debug:
            traceback.print_exc()
        print(f"lsag: error: {joined(output.visible(what), output.visible(fix))}", file=sys.stderr, flush=True)
    if "--json" in sys.argv and not output.json_printed:
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        output.print_json(command, error={"code": code, "message": joined(what, fix)})
    return code


def joined(what: str, fix: str) -> str:
    """What went wrong and what to do, in at most about MAX_ERROR characters."""
    room = MAX_ERROR - len(fix)
    return (what if len(what) <= room else what[: room - 3] + "...") + (f" — {fix}" if fix else "")
