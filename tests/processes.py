"""Commands in processes of their own: forked from one that has imported everything, or started as a user starts them.

A forked command starts in tenths of a second instead of seconds. It is a process like any other: it has its own folder,
environment, signals, streams and exit code. Only what Python and its libraries decide while they are loaded is shared.
"""

import abc
import contextlib
import ctypes
import importlib
import inspect
import json
import logging
import os
import pkgutil
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SLOW_IMPORTS = (
    "torch.export",
    "torch.onnx",
    "torch.distributed.elastic.multiprocessing.api",
    "onnxruntime",
    "onnxscript",
    "timm.data",
    "torchvision.datasets",
    "sklearn.datasets",
    "matplotlib.pyplot",
    "PIL.PngImagePlugin",
)


def serve() -> None:
    """Fork a command for each line of stdin; its process number and then its exit code go to the pipe named there.

    Nothing is computed here: a process whose OpenMP threads have started cannot be forked.
    """
    import lsag
    import lsag_cli

    for package in (lsag, lsag_cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        if os.fork() == 0:
            _end_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            job = json.loads(line)
            command = os.fork()
            if command == 0:
                _end_with_parent()
                _become(job)
            with Path(job["reply"]).open("w") as reply:
                print(command, file=reply, flush=True)
                print(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]), file=reply, flush=True)
            os._exit(0)


def _end_with_parent() -> None:
    """On Linux, leave nothing behind where the tests themselves are killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _reap(*_: object) -> None:
    """Let the processes go that waited for commands; so the time of all of them counts as that of the tests."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(job: dict) -> None:
    """The command itself, in its folder, environment and streams; ends the process."""
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for descriptor, path, flags in (
        (0, os.devnull, 0),
        (1, job["stdout"], os.O_WRONLY),
        (2, job["stderr"], os.O_WRONLY),
    ):
        os.dup2(os.open(path, flags | os.O_CREAT, 0o600), descriptor)
    subprocess.Popen._execute_child = _forked  # type: ignore[attr-defined]
    _run(job["argv"])


def _run(argv: list[str]) -> None:
    """The command in this process, and its end."""
    import torch

    import lsag.failpoints
    import lsag_cli.app

    # What the environment said when these were imported.
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    lsag.failpoints._armed = [point for point in os.environ.get("LSAG_FAILPOINT", "").split(",") if point]
    sys.argv = ["lsag", *argv]
    try:
        lsag_cli.app.main()
    except SystemExit as end:
        os._exit(end.code)  # type: ignore[arg-type]


_spawned: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_GIVEN = list(inspect.signature(_spawned).parameters)
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
RANK = "lsag rank "
"""Begins the name of a process that is a rank."""


def _forked(popen: Any, command: list[str], *others: Any) -> None:
    """What Popen does for a program, for the ranks and trainings that a command starts as `lsag_command()`: a fork."""
    from lsag_cli.processes import lsag_command

    start = lsag_command()
    if list(command[: len(start)]) != start:
        return _spawned(popen, command, *others)
    given = dict(zip(_GIVEN[2:], others, strict=True))
    streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    popen.pid = os.fork()
    if popen.pid == 0:
        if given["start_new_session"]:
            os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor, stream in enumerate(streams):
            if stream != -1:
                os.dup2(stream, descriptor)
        os.closerange(3, 1024)
        logging.disable(logging.NOTSET)  # the launcher silences torch's agent
        os.environ.clear()
        os.environ.update(given["env"])
        if "RANK" in os.environ and sys.platform == "linux":
            Path("/proc/self/comm").write_text(RANK + os.environ["RANK"])
        _run(command[len(start) :])
    popen._child_created = True
    popen._close_pipe_fds(*(given[name] for name in _GIVEN if name in PIPES))


class Server:
    """Starts commands in forked processes, any number at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GOMP_SPINCOUNT": "10000"},  # as lsag_cli.app.main() sets it before torch is imported
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def start(self, argv: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> "Forked":
        return Forked(self, argv, cwd, {**os.environ, **(env or {})})

    def close(self) -> None:
        """End the server and whatever a test that failed has left behind."""
        kill_all(self.process.pid)
        self.process.wait(30)


def kill_all(process: int) -> None:
    """Kill a process and its descendants; some of them may have just ended."""
    for one in [*descendants(process), process]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


class Running(abc.ABC):
    """A command and what it has written so far."""

    pid: int

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self._folder = tempfile.TemporaryDirectory(prefix="lsag-test-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        for name in ("stdout", "stderr"):
            (self.folder / name).touch()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @abc.abstractmethod
    def wait(self, timeout: float = 180) -> int:
        """The exit code, negative for a signal."""

    def completed(self) -> subprocess.CompletedProcess[str]:
        code = self.wait()
        return subprocess.CompletedProcess(self.argv, code, self.stdout, self.stderr)

    def _kill(self) -> None:
        kill_all(self.pid)


class Forked(Running):
    """A command that the server has forked."""

    def __init__(self, server: Server, argv: list[str], cwd: Path, env: dict[str, str]) -> None:
        super().__init__(argv)
        streams = {name: str(self.folder / name) for name in ("stdout", "stderr", "reply")}
        os.mkfifo(streams["reply"])
        assert server.process.stdin
        job = {"argv": argv, "cwd": str(cwd), "env": env, **streams}
        print(json.dumps(job), file=server.process.stdin, flush=True)
        self.reply = (self.folder / "reply").open()
        self.pid = int(self.reply.readline())

    def ranks(self) -> list[int]:
        """Process numbers of the ranks that run, in the order of their rank."""
        names = {Path(f"/proc/{process}/comm").read_text().strip(): process for process in children(self.pid)}
        return [names[name] for name in sorted(names) if name.startswith(RANK)]

    def wait(self, timeout: float = 180) -> int:
        if not select.select([self.reply], [], [], timeout)[0]:
            self._kill()
            raise TimeoutError(f"still running after {timeout} seconds: {self.stderr}")
        with self.reply:
            return int(self.reply.readline())


class Spawned(Running):
    """`python -m lsag_cli` as a user starts it; several processes if it launches them."""

    def __init__(self, argv: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        super().__init__(argv)
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lsag_cli", *argv],
                cwd=cwd,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.pid = self.process.pid

    def wait(self, timeout: float = 180) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self._kill()
            raise TimeoutError(f"still running after {timeout} seconds: {self.stderr}") from error


def children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def descendants(parent: int) -> list[int]:
    return [one for child in children(parent) for one in (child, *descendants(child))]


def gone(processes: list[int], within: float) -> bool:
    """Whether none of the processes is left `within` seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.05)
    return False


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    serve()
