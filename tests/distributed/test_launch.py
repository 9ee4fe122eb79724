"""Why a launch ended, and what its launcher leaves; real ranks that die are in tests/faults/."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lsag.distributed import launch
from lsag.errors import LsagError
from tests.conftest import assert_refused


def failed(pid, exitcode):
    return SimpleNamespace(pid=pid, exitcode=exitcode)


def told(rank, code, *, consequence=False):
    return {"rank": rank, "what": f"rank {rank} told", "fix": "", "code": code, "consequence": consequence}


@pytest.mark.parametrize(
    ("reports", "failures", "words", "code"),
    [
        (
            [],
            {0: failed(5, -signal.SIGTERM), 1: failed(6, 9)},
            r"rank 1 \(process 6\) ended with exit code 9 and no message",
            7,
        ),
        ([], {0: failed(5, 143), 1: failed(6, 9)}, r"rank 1 \(process 6\) ended with exit code 9 and no message", 7),
        (
            [],
            {0: failed(5, -signal.SIGTERM), 1: failed(6, -signal.SIGKILL)},
            "rank 1 .* killed by SIGKILL, probably",
            7,
        ),
        ([], {0: failed(5, -signal.SIGTERM)}, r"rank 0 \(process 5\) was killed by SIGTERM", 7),
        ([told("0", 7, consequence=True)], {0: failed(5, 7), 1: failed(6, 9)}, "rank 1 .* exit code 9", 7),
        ([told("0", 3)], {0: failed(5, 3), 1: failed(6, -signal.SIGTERM)}, "rank 0 told", 3),
        ([told("0", 7, consequence=True)], {0: failed(5, 7)}, "rank 0 told", 7),
    ],
)
def test_the_first_cause_is_named(reports, failures, words, code):
    with pytest.raises(LsagError, match=words) as raised:
        launch._raise_first_cause(reports, failures, 0, "resume")
    assert raised.value.exit_code == code


def test_what_a_killed_launcher_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f"{launch.FOLDER_PREFIX}{os.getpid()}-a", "lsag-launch-elsewhere-1-b", f"{launch.FOLDER_PREFIX}x"]
    for name in [*kept, f"{launch.FOLDER_PREFIX}{dead.pid}-c"]:
        (tmp_path / name / "0").mkdir(parents=True)
    launch._remove_abandoned()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)


def test_no_answer_is_waited_for_longer_than_asked():
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        launch.in_time(0.1, lambda: time.sleep(60))
    with pytest.raises(ZeroDivisionError):
        launch.in_time(60, lambda: 1 / 0)
    assert launch.in_time(60, lambda: 5) == 5


def test_a_launch_begins_by_removing_what_a_killed_launcher_left(lsag):
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = Path(tempfile.mkdtemp(prefix=f"{launch.FOLDER_PREFIX}{dead.pid}-"))
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            meeting = ["--nodes", "2", "--rdzv-endpoint", f"127.0.0.1:{silent.getsockname()[1]}", "--rdzv-timeout", "1"]
            lsag("train", "--device", "cpu", "--out", "run", *meeting)
        assert not left.exists()
    finally:
        shutil.rmtree(left, ignore_errors=True)


@pytest.mark.parametrize("joined", [False, True])
def test_a_port_where_another_program_listens_is_one_line(lsag, joined):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        ask, env = ["--nodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"], {}
        if joined:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            ask, env = [], dict(zip(names, ("1", "2", "1", "127.0.0.1", port), strict=True))
        done = lsag("train", "--device", "cpu", "--out", "run", "--rdzv-timeout", "1", *ask, env=env)
    assert_refused(done, 4, "meet", "no answer within 1 s, or it is another program's port", "docs/cluster.md")


def test_machines_that_do_not_come_are_waited_for_no_longer_than_asked(lsag):
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    meeting = ["--nodes", "2", "--rdzv-endpoint", endpoint, "--rdzv-timeout", "2"]
    done = lsag("train", "--device", "cpu", "--out", "run", *meeting)
    assert_refused(done, 4, f"did not meet at {endpoint}: not all came within 2 s", "docs/cluster.md")
    assert time.monotonic() - start < 30  # three seconds where nothing else runs
