"""Starting the processes of a training on this machine, with torch.distributed's elastic agent.

The agent runs the same command once for each process, with the variables that torchrun sets. In a private folder each
process leaves signs of life and, if it fails, the reason, so that one line can name the first cause.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lsag.errors import LsagError, UnavailableError, WorkerError, first_line
from lsag.machine import available_cores

LAUNCH_FOLDER, LAUNCHER = "LSAG_LAUNCH_FOLDER", "LSAG_LAUNCHER"
SILENT_SECONDS = 60
"""A process that gives no sign of life for this long counts as dead, and is killed."""
GRACE_SECONDS = 12


def launch(
    command: Sequence[str],
    *,
    processes: int,
    nodes: int = 1,
    endpoint: str | None = None,
    run_id: str = "lsag",
    max_restarts: int = 0,
    fix: str = "",
) -> None:
    """Run `command` as `processes` ranks here, beside those of `nodes` - 1 other machines, and wait until they end.

    Several machines meet at `endpoint`, HOST:PORT on one of them, under the name `run_id`. After a failure all ranks
    are restarted, up to `max_restarts` times. Raises the error of the first rank to fail, or WorkerError with `fix` for
    one that was killed. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to the ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent logs everything it does
    folder = Path(tempfile.mkdtemp(prefix="lsag-launch-"))
    os.environ |= {LAUNCH_FOLDER: str(folder), LAUNCHER: str(os.getpid())}
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    if nodes == 1:
        # Nothing listens beyond this machine: agent and ranks meet in files, gloo and NCCL use the loopback.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
        meeting: dict[str, Any] = {"rdzv_endpoint": str(folder / "agents"), "rdzv_configs": {"store_type": "file"}}
    else:
        meeting = {"rdzv_endpoint": endpoint}
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
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as error:
        stopped_by = error.sigval
    except ChildFailedError as error:
        failures = error.failures
    except Exception as error:
        raise UnavailableError(
            f"the processes could not be started, or did not meet: {first_line(error)}", "see docs/cluster.md"
        ) from error
    finally:
        over.set()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _wait_for_ranks(folder)
        reports = _reports(folder)
        shutil.rmtree(folder, ignore_errors=True)
    _raise_first_cause(reports, failures, stopped_by, fix)


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
    killed = {rank: failure for rank, failure in failures.items() if failure.exitcode < 0}
    if killed:
        # The agent ends the others with SIGTERM; whatever came before is the cause.
        own = {rank: failure for rank, failure in killed.items() if failure.exitcode != -signal.SIGTERM}
        rank, failure = next(iter((own or killed).items()))
        name = signal.Signals(-failure.exitcode).name
        hint = ", probably because memory ran out" if name == "SIGKILL" else ""
        raise WorkerError(f"rank {rank} (process {failure.pid}) was killed by {name}{hint}", fix)
    if reports:
        raise _with_code(reports[0]["what"], fix, reports[0]["code"])
    if failures:
        rank, failure = next(iter(failures.items()))
        raise WorkerError(f"rank {rank} ended with exit code {failure.exitcode} without a message", fix)


def _with_code(what: str, fix: str, code: int) -> LsagError:
    error = LsagError(what, fix)
    error.exit_code = code
    return error


def launched() -> bool:
    """Whether this process is a rank that `launch` started, which reports its errors to the launcher."""
    return os.environ.get(LAUNCHER) == str(os.getppid()) and Path(os.environ.get(LAUNCH_FOLDER, "")).is_dir()


def report(what: str, fix: str, code: int, *, consequence: bool) -> None:
    """Tell the launcher why this rank fails; `consequence` marks a failure that another rank caused."""
    entry = {"what": what, "fix": fix, "code": code, "consequence": consequence, "time": time.time()}
    with contextlib.suppress(OSError):
        _file("report").write_text(json.dumps(entry))


@contextlib.contextmanager
def keep_alive() -> Iterator[None]:
    """Give signs of life to the launcher, if there is one, and end when it ends."""
    if not launched():
        if Path(os.environ.get(LAUNCH_FOLDER, "/dev/null")).is_dir():
            what = f"the launcher that {LAUNCHER} names is gone, or did not start this process"
            raise WorkerError(what, f"start again with --resume; or unset {LAUNCHER} and {LAUNCH_FOLDER}")
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
