"""Starting the processes of a training on this machine, with torch.distributed's elastic agent.

The agent runs the same command once for each process, with the variables that torchrun sets. In a private folder each
process leaves signs of life and, if it fails, the reason, so that one line can name the first cause.
"""

import contextlib
import glob
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lsag.errors import LsagError, UnavailableError, WorkerError, first_line
from lsag.machine import available_cores

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

T = TypeVar("T")
LAUNCH_FOLDER, LAUNCHER = "LSAG_LAUNCH_FOLDER", "LSAG_LAUNCHER"
SILENT_SECONDS = 60
"""A process that gives no sign of life for this long counts as dead, and is killed."""
GRACE_SECONDS = 12
MEETING_SECONDS = 600
"""Time for all ranks to arrive."""
FOLDER_PREFIX = f"lsag-launch-{socket.gethostname()}-"
"""Of the private folder's name; the launcher's process number comes next. Machines may share a temporary folder."""


def launch(
    command: Sequence[str],
    *,
    processes: int,
    nodes: int = 1,
    endpoint: str | None = None,
    run_id: str = "lsag",
    meeting_seconds: int = MEETING_SECONDS,
    max_restarts: int = 0,
    fix: str = "",
) -> None:
    """Run `command` as `processes` ranks here, beside those of `nodes` - 1 other machines, and wait until they end.

    Several machines meet at `endpoint`, HOST:PORT on one of them, under the name `run_id`, within `meeting_seconds`.
    After a failure all ranks are restarted, up to `max_restarts` times. Raises the error of the first rank to fail, or
    WorkerError with `fix` for one that was killed. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent logs everything it does
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
    os.environ |= {LAUNCH_FOLDER: str(folder), LAUNCHER: str(os.getpid())}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    if nodes == 1:
        # Nothing listens beyond this machine: agent and ranks meet in files, gloo and NCCL use the loopback.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
        meeting: dict[str, Any] = {"rdzv_endpoint": str(folder / "agents"), "rdzv_configs": {"store_type": "file"}}
    else:
        meeting = {"rdzv_endpoint": endpoint, "rdzv_configs": {"join_timeout": meeting_seconds}}
    hangup_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        run_id=run_id,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        signals_to_handle="SIGTERM,SIGINT" if hangup_ignored else "SIGTERM,SIGINT,SIGHUP",
        max_restarts=max_restarts,
        **meeting,
    )
    over = threading.Event()
    threading.Thread(target=_kill_silent, args=(folder, over), daemon=True).start()
    signal.signal(signal.SIGUSR1, lambda *_: _signal_ranks(folder, signal.SIGUSR1))
    stopped_by, failures = 0, {}
    try:
        if nodes > 1:
            _store = in_time(meeting_seconds, lambda: _reach(config, meeting_seconds))  # kept: it may be the server
        # torch replaces ${local_rank} in the arguments, and takes $$ for $.
        elastic_launch(config, command[0])(*(word.replace("$", "$$") for word in command[1:]))
    except SignalException as error:
        stopped_by = error.sigval
    except ChildFailedError as error:
        failures = error.failures
    except Exception as error:
        late = isinstance(error, RendezvousTimeoutError)
        reason = f"not all came within {meeting_seconds} s" if late else first_line(error.__cause__ or error)
        raise UnavailableError(
            f"the processes could not be started, or did not meet{f' at {endpoint}' if endpoint else ''}: {reason}",
            "see docs/cluster.md",
        ) from error
    finally:
        over.set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _wait_for_ranks(folder)
        reports = _reports(folder)
        shutil.rmtree(folder, ignore_errors=True)
    _raise_first_cause(reports, failures, stopped_by, fix)


def _reach(config: "LaunchConfig", seconds: int) -> object:
    """The store at which the agents will meet, or a connection to it."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

    return rendezvous_handler_registry.create_handler(
        RendezvousParameters(
            config.rdzv_backend,
            config.rdzv_endpoint,
            config.run_id,
            config.min_nodes,
            config.max_nodes,
            read_timeout=seconds,
        )
    )


def in_time(seconds: float, connect: Callable[[], T]) -> T:
    """What `connect` returns or raises, or TimeoutError after `seconds`.

    torch has no timeout for a program that accepts a connection where a store should be, and then says nothing.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(connect())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds} s, or it is another program's port") from None


def _raise_first_cause(reports: list[dict[str, Any]], failures: Mapping[int, Any], stopped_by: int, fix: str) -> None:
    """Raise what ended the ranks first, by their `reports` and by what the agent saw; nothing if all went well."""
    causes = [report for report in reports if not report["consequence"]]
    if failures:
        # When a rank fails, the agent ends the others with SIGTERM: that is not the cause.
        causes = [report for report in causes if report["code"] != 128 + signal.SIGTERM]
    if causes:
        raise _with_code(causes[0]["what"], causes[0]["fix"], causes[0]["code"])
    if stopped_by and not reports:
        raise _with_code(f"stopped by {signal.Signals(stopped_by).name} before it started", "", 128 + stopped_by)
    told = {report["rank"] for report in reports}
    silent = {rank: failure for rank, failure in failures.items() if str(rank) not in told}
    if silent:
        ended_by_agent = (-signal.SIGTERM, 128 + signal.SIGTERM)  # while they were starting
        others = (rank for rank, failure in silent.items() if failure.exitcode not in ended_by_agent)
        rank = next(others, next(iter(silent)))
        code = silent[rank].exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no message"
        )
        hint = ", probably because memory ran out" if code == -signal.SIGKILL else ""
        raise WorkerError(f"rank {rank} (process {silent[rank].pid}) {how}{hint}", fix)
    if reports:
        raise _with_code(reports[0]["what"], fix, reports[0]["code"])


def _with_code(what: str, fix: str, code: int) -> LsagError:
    error = LsagError(what, fix)
    error.exit_code = code
    return error


def _remove_abandoned() -> None:
    """Remove what launchers of this user on this machine left behind when they were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{glob.escape(FOLDER_PREFIX)}*"):
        with contextlib.suppress(OSError, ValueError):
            launcher = int(folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0])
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                if folder.lstat().st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)


def orphaned() -> bool:
    """Whether the launcher of this process has died, or the environment names one that did not start it."""
    return os.environ.get(LAUNCHER) not in (None, str(os.getppid()), str(os.getpid()))


def launched() -> bool:
    """Whether this process is a rank that `launch` started, which reports its errors to the launcher."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and Path(os.environ.get(LAUNCH_FOLDER, "")).is_dir()


def report(what: str, fix: str, code: int, *, consequence: bool) -> None:
    """Tell the launcher why this rank fails; `consequence` marks a failure that another rank caused."""
    rank = os.environ.get("RANK", "0")
    entry = {"rank": rank, "what": what, "fix": fix, "code": code, "consequence": consequence, "time": time.time()}
    with contextlib.suppress(OSError):
        _file("report").write_text(json.dumps(entry))


@contextlib.contextmanager
def keep_alive() -> Iterator[None]:
    """Give signs of life to the launcher, if there is one, and end when it ends."""
    if not launched():
        if orphaned():
            raise WorkerError("nothing was trained", f"start again with --resume; or unset {LAUNCHER}")
        yield
        return
    launcher = int(os.environ[LAUNCHER])
    for old in _file("report").parent.glob("report-*"):
        if old.name.split("-")[1] != os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"):
            old.unlink(missing_ok=True)  # from an earlier attempt
    alive, over = _file("alive"), threading.Event()
    alive.write_text(str(os.getpid()))

    def beat() -> None:
        told = False
        while not over.wait(1):
            with contextlib.suppress(OSError):
                alive.touch()
            if os.getppid() != launcher and not told:
                told = True
                os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        alive.unlink(missing_ok=True)


def _file(kind: str) -> Path:
    rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Path(os.environ[LAUNCH_FOLDER], f"{kind}-{attempt}-{rank}")


def _ranks(folder: Path) -> dict[Path, int]:
    """Process numbers of the ranks that have given a sign of life and still run, by their file."""
    found = {}
    for path in folder.glob("alive-*"):
        with contextlib.suppress(OSError, ValueError):
            process = int(path.read_text())
            # An error for a number that is not a child of this process: by now it may belong to anyone.
            if not hasattr(os, "waitid"):
                os.kill(process, 0)
            elif os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                continue
            found[path] = process
    return found


def _signal_ranks(folder: Path, number: int) -> None:
    for process in _ranks(folder).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _kill_silent(folder: Path, over: threading.Event) -> None:
    """Kill ranks that give no more signs of life. It counts its own ticks, as a machine may have slept."""
    silent: dict[Path, tuple[float, int]] = {}
    while not over.wait(1):
        for path, process in _ranks(folder).items():
            with contextlib.suppress(OSError):
                beat, ticks = path.stat().st_mtime, silent.get(path, (0.0, 0))
                silent[path] = (beat, ticks[1] + 1 if ticks[0] == beat else 0)
                if silent[path][1] == SILENT_SECONDS:
                    os.kill(process, signal.SIGKILL)


def _wait_for_ranks(folder: Path) -> None:
    """Ranks do not outlive their launcher: they get GRACE_SECONDS, then SIGKILL."""
    end = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < end and _ranks(folder):
        time.sleep(0.1)
    _signal_ranks(folder, signal.SIGKILL)


def _reports(folder: Path) -> list[dict[str, Any]]:
    """What the ranks reported, earliest first."""
    found = []
    for path in folder.glob("report-*"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return sorted(found, key=lambda report: report["time"])


STUCK_SECONDS = 10
"""How long one process of several may take to finish its step after SIGTERM. If its peers are gone, it never does."""


@contextlib.contextmanager
def leaving_when_stuck(acknowledged: Callable[[], bool], *, last_words: Callable[[], object]) -> Iterator[None]:
    """Exit the process, after `last_words`, STUCK_SECONDS after a SIGTERM that is not acknowledged by then.

    If a peer has died, the main thread may wait in a collective that never ends, where Python cannot handle a signal.
    The C level still writes the signal to a pipe, which a thread reads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM and not over.wait(STUCK_SECONDS) and not acknowledged():
                last_words()
                os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(previous)
        os.close(writer)
