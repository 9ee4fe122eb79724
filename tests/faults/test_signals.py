"""Whoever is told to stop finishes the step, saves, and names the command that resumes; no step is lost."""

import os
import signal
import time
from itertools import cycle, product

import pytest

from lsag import load_checkpoint
from tests.faults.driver import assert_same, result, steps_logged, wait_for_step, wait_until_idle
from tests.faults.test_kill import POINTS, sampled
from tests.processes import Spawned, alive, gone

ACCUM = ["--accum", "2"]
SLOW = ["--save-minutes", "5"]


KINDS = ["term", "int"]
IN_TURN = list(zip(POINTS, cycle(KINDS), strict=False))


@pytest.mark.parametrize(
    ("point", "kind"), sampled(product(POINTS, KINDS), {("after_forward:85", "term")}, often=IN_TURN)
)
def test_stopped_in_every_phase(server, arguments, undisturbed, tmp_path, point, kind):
    run = server.start([*arguments, *ACCUM], tmp_path, {"LSAG_FAILPOINT": f"{point}:{kind}"})
    start = time.monotonic()
    assert run.wait() == {"term": 143, "int": 130}[kind], run.stderr
    assert time.monotonic() - start < 30
    done = steps_logged(tmp_path / "run")
    last = run.stderr.splitlines()[-1]
    name = {"term": "SIGTERM", "int": "SIGINT"}[kind]
    cause = "interrupted" if name == "SIGINT" else f"stopped by {name}"
    assert last == f"lsag: error: {cause}; step {done} is saved in run — resume with: lsag train --resume run"
    assert load_checkpoint(tmp_path / f"run/step-{done:010d}.pt").training["step"] == done
    run = server.start(["train", "--resume", "run"], tmp_path)
    assert run.wait() == 0, run.stderr
    assert_same(result(tmp_path / "run"), undisturbed)


def test_usr1_saves_and_hup_stops(server, arguments, undisturbed, tmp_path):
    # Without a timed save, so that what appears was asked for.
    run = server.start([*arguments, *ACCUM, *SLOW], tmp_path)
    wait_for_step(tmp_path / "run", 20)
    os.kill(run.pid, signal.SIGUSR1)
    end = time.monotonic() + 10
    while len(list((tmp_path / "run").glob("step-*.pt"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(list((tmp_path / "run").glob("step-*.pt"))) == 2 and alive(run.pid)
    os.kill(run.pid, signal.SIGHUP)
    os.kill(run.pid, signal.SIGTERM)  # a second one changes nothing
    start = time.monotonic()
    assert run.wait() == 143, run.stderr
    assert time.monotonic() - start < 10
    # Nothing orders two signals that come at once.
    assert "is saved in run" in run.stderr and ("stopped by SIGHUP" in run.stderr or "stopped by SIGTERM" in run.stderr)
    run = server.start([*arguments, *ACCUM], tmp_path)
    assert run.wait() == 0, run.stderr
    assert_same(result(tmp_path / "run"), undisturbed)


def test_a_second_interrupt_leaves_at_once(server, arguments, tmp_path):
    run = server.start([*arguments, *ACCUM], tmp_path, {"LSAG_FAILPOINT": "before_opt:30:hang"})
    wait_for_step(tmp_path / "run", 1)
    wait_until_idle(run.pid)  # at the failpoint
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130
    assert run.stderr.splitlines()[-1].startswith("lsag: error: interrupted twice")
    for path in (tmp_path / "run").glob("step-*.pt"):
        load_checkpoint(path)


@pytest.mark.faults
def test_a_signal_in_the_first_seconds_ends_the_command(arguments, tmp_path):
    """While Python, torch and the data are loaded there is nothing to save, and nothing to wait for."""
    for index, delay in enumerate((0.2, 0.4, 0.8, 1.5, 2.5, 4)):
        for number in (signal.SIGTERM, signal.SIGINT):
            cwd = tmp_path / f"{index}-{number}"
            cwd.mkdir()
            run = Spawned([*arguments, "--epochs", "5000"], cwd)
            time.sleep(delay)
            os.kill(run.pid, number)
            assert run.wait(15) == 128 + number, run.stderr
            said = [line for line in run.stderr.splitlines() if not line.startswith(("small: ", "epoch "))]
            assert len(said) == 1 and said[0].startswith("lsag: error: "), run.stderr


LAUNCHED = [
    ("launcher", signal.SIGTERM, 143),
    ("launcher", signal.SIGINT, 130),
    ("launcher", signal.SIGHUP, 143),
    ("rank 0", signal.SIGTERM, 143),
    ("rank 1", signal.SIGTERM, 143),
    ("rank 1", signal.SIGINT, 130),
]


@pytest.mark.faults
@pytest.mark.parametrize(("to", "number", "code"), LAUNCHED)
def test_stopping_several_processes(server, arguments, tmp_path, to, number, code):
    run = server.start([*arguments, *SLOW, "--procs", "2", "--epochs", "5000"], tmp_path)  # it does not end by itself
    wait_for_step(tmp_path / "run", 45)
    ranks = run.ranks()
    if to == "launcher":
        # USR1 saves and goes on; for any rank, and for the launcher.
        os.kill(run.pid, signal.SIGUSR1)
        wait_for_step(tmp_path / "run", steps_logged(tmp_path / "run") + 10)
        assert len(list((tmp_path / "run").glob("step-*.pt"))) == 2
    start = time.monotonic()
    os.kill(run.pid if to == "launcher" else ranks[int(to[-1])], number)
    assert run.wait(30) == code, run.stderr
    assert time.monotonic() - start < 10 and gone(ranks, 1)
    done = steps_logged(tmp_path / "run")
    assert done >= 45
    said = [line for line in run.stderr.splitlines() if not line.startswith(("small: ", "epoch ", "lsag: step "))]
    assert len(said) == 1 and f"step {done} is saved in run" in said[0], run.stderr
    assert load_checkpoint(tmp_path / f"run/step-{done:010d}.pt").training["step"] == done
