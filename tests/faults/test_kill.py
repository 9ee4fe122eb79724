"""A training that is killed at any moment goes on as if it had not been: every loss, every weight, to the bit."""

import contextlib
import os
import random
import signal
import time

import pytest

from lsag import load_checkpoint
from tests.faults.driver import assert_same, result


def checkpoints_are_whole(out):
    for path in [*out.glob("step-*.pt"), *out.glob("best.pt")]:
        load_checkpoint(path)
    return len(list(out.glob("step-*.pt")))


def kill_and_resume(server, arguments, cwd, seed):
    """Kill a run after random times, over and over, until it gets to its end; gives the number of kills."""
    moments, kills = random.Random(seed), 0
    while True:
        run = server.start([*arguments, "--accum", "2"], cwd, {})
        # Short lives mostly, so that a run dies often, and long ones so that it gets on.
        time.sleep(moments.uniform(0.05, 3.0 if kills % 3 else 1.0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGKILL)
        code = run.wait()
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, run.stderr
        kills += 1
        if (cwd / "run").exists():
            assert checkpoints_are_whole(cwd / "run") <= 4
            assert len(list((cwd / "run").iterdir())) < 14


def test_killed_at_random(server, arguments, undisturbed, tmp_path):
    kills = kill_and_resume(server, arguments, tmp_path, seed=1)
    assert kills >= 1
    assert_same(result(tmp_path / "run"), undisturbed)


@pytest.mark.faults
def test_killed_at_random_fifty_times(server, arguments, undisturbed, tmp_path):
    kills, runs = 0, 0
    while kills < 50:
        runs += 1
        cwd = tmp_path / str(runs)
        cwd.mkdir()
        kills += kill_and_resume(server, arguments, cwd, seed=100 + runs)
        assert_same(result(cwd / "run"), undisturbed)
    print(f"{kills} kills in {runs} runs, each equal to the undisturbed one to the bit")
