"""A training that is killed at any moment goes on as if it had not been: every loss, every weight, to the bit."""

import contextlib
import os
import random
import signal
import time

import pytest

from lsag import load_checkpoint
from tests.faults.conftest import undisturbed_run
from tests.faults.driver import assert_same, result, steps_logged, wait_for_step
from tests.layouts import LAYOUTS
from tests.processes import gone


def checkpoints_are_whole(out):
    for path in [*out.glob("step-*.pt"), *out.glob("best.pt")]:
        load_checkpoint(path)
    return len(list(out.glob("step-*.pt")))


def kill_and_resume(server, arguments, cwd, seed):
    """Kill a run after random times, over and over, until it gets to its end; gives the number of kills."""
    moments, kills = random.Random(seed), 0
    while True:
        run = server.start([*arguments, "--accum", "2"], cwd)
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


@pytest.mark.faults
@pytest.mark.parametrize("times", [20, pytest.param(50, marks=pytest.mark.full_size)])
def test_killed_at_random_many_times(server, arguments, undisturbed, tmp_path, times):
    kills, runs = 0, 0
    while kills < times:
        runs += 1
        cwd = tmp_path / str(runs)
        cwd.mkdir()
        kills += kill_and_resume(server, arguments, cwd, seed=100 + runs)
        assert_same(result(cwd / "run"), undisturbed)
    print(f"{kills} kills in {runs} runs, each equal to the undisturbed one to the bit")


POINTS = [
    "epoch_begin:2",
    "fetch:50",
    "after_forward:85",
    "after_backward:30",
    "before_opt:41",
    "after_opt:40",
    "in_eval:2",
    "epoch_end:2",
    "before_save:5",
    "mid_write:4",
    "before_fsync:6",
    "before_rename:6",
    "after_rename:6",
    "mid_prune:3",
]


def sampled(points, default, often=None):
    """All of the points: which run by default, and which `often`, in `.ci/run` (None: all)."""
    for point in points:
        marks = [] if point in default else [pytest.mark.faults]
        if point not in default and often is not None and point not in often:
            marks.append(pytest.mark.full_size)
        yield pytest.param(*(point if isinstance(point, tuple) else (point,)), marks=marks)


@pytest.mark.parametrize("point", sampled(POINTS, {"before_rename:6"}))
def test_killed_at_a_point(server, arguments, undisturbed, tmp_path, point):
    accum = ["--accum", "2"]
    run = server.start([*arguments, *accum], tmp_path, {"LSAG_FAILPOINT": f"{point}:kill"})
    assert run.wait() == -signal.SIGKILL, f"{point} was not reached: {run.stderr}"
    assert checkpoints_are_whole(tmp_path / "run") >= 1
    run = server.start([*arguments, *accum], tmp_path)
    assert run.wait() == 0, run.stderr
    assert "resumed after step" in run.stderr
    assert not list((tmp_path / "run").glob(".step*"))  # what the interrupted write left is gone
    assert_same(result(tmp_path / "run"), undisturbed)


def learnt(out):
    """The result of a run, without what names its data."""
    found = result(out)
    state = {key: value for key, value in found["state"].items() if isinstance(value, bytes)}
    assert len(state) > 50
    return found | {"state": state}


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [["--accum", "2", "--workers", "2"], ["--procs", "2"]], ids=["workers", "ranks"])
def test_killed_while_images_are_read_from_any_layout(server, arguments, material, tmp_path, layout, cut):
    if layout == "parquet":
        pytest.importorskip("datasets")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache")}
    dataset = ["--dataset", LAYOUTS[layout](material / "data", tmp_path)]
    run = server.start([*arguments, *dataset, *cut], tmp_path, env | {"LSAG_FAILPOINT": "after_opt:40:kill"})
    assert run.wait() != 0 and steps_logged(tmp_path / "run") > 0, run.stderr
    run = server.start([*arguments, *dataset, *cut], tmp_path, env)
    assert run.wait() == 0 and "resumed after step" in run.stderr, run.stderr
    (tmp_path / "folder").mkdir()
    plain = server.start([*undisturbed_run(material), *cut], tmp_path / "folder")
    assert plain.wait() == 0, plain.stderr
    assert_same(learnt(tmp_path / "run"), learnt(tmp_path / "folder/run"))


FOUR = ["--procs", "4", "--accum", "2"]


def kill_one_of_four(server, arguments, cwd, step, victim):
    """Kill rank `victim`, or the launcher for -1, after `step`; the others must go. Gives what stderr says."""
    run = server.start([*arguments, *FOUR], cwd)
    wait_for_step(cwd / "run", step)
    ranks = run.ranks()
    assert len(ranks) == 4
    os.kill(ranks[victim] if victim >= 0 else run.pid, signal.SIGKILL)
    start = time.monotonic()
    code = run.wait()
    assert gone(ranks, within=15 - (time.monotonic() - start)), "a rank outlived the failure by 15 s"
    assert code == (7 if victim >= 0 else -signal.SIGKILL), run.stderr
    assert checkpoints_are_whole(cwd / "run") >= 1
    if victim > 0:  # rank 0 lives, and saves what is done
        newest = max((cwd / "run").glob("step-*.pt"))
        assert load_checkpoint(newest).training["step"] == steps_logged(cwd / "run")
    return run.stderr


@pytest.mark.faults
def test_each_of_four_ranks_and_their_launcher_killed_in_turn(server, arguments, undisturbed_4, tmp_path):
    moments, step = random.Random(4), 0
    for victim in range(-1, 4):
        step += moments.randint(4, 13)
        said = kill_one_of_four(server, arguments, tmp_path, step, victim)
        (error,) = [line for line in said.splitlines() if "error" in line]
        assert f"{f'rank {victim}' if victim >= 0 else 'the launcher'} (process" in error, said
        assert ("was killed by SIGKILL" if victim >= 0 else "is gone") in error, said
        assert "resume with: lsag train --resume run" in error and "Traceback" not in said, said
        step = steps_logged(tmp_path / "run")
    run = server.start([*arguments, *FOUR], tmp_path)
    assert run.wait() == 0, run.stderr
    assert_same(result(tmp_path / "run"), undisturbed_4)


@pytest.mark.faults
def test_restarts_resume_automatically(server, arguments, undisturbed_4, tmp_path):
    run = server.start([*arguments, *FOUR, "--max-restarts", "2"], tmp_path)
    for step, victim in ((20, 1), (45, 0)):
        wait_for_step(tmp_path / "run", step)
        os.kill(run.ranks()[victim], signal.SIGKILL)
        time.sleep(3)
    assert run.wait() == 0, run.stderr
    assert_same(result(tmp_path / "run"), undisturbed_4)


@pytest.mark.faults
def test_a_rank_that_stands_still_is_named(server, arguments, tmp_path):
    run = server.start([*arguments, *FOUR], tmp_path)
    wait_for_step(tmp_path / "run", 20)
    ranks = run.ranks()
    os.kill(ranks[3], signal.SIGSTOP)
    assert run.wait(120) == 7, run.stderr
    assert "rank 3 (process" in run.stderr and gone(ranks, 1)


def test_only_one_run_at_a_time(server, arguments, tmp_path):
    first = server.start([*arguments, "--epochs", "5000"], tmp_path)
    wait_for_step(tmp_path / "run", 3)
    (tmp_path / "second").mkdir()
    second = server.start([*arguments[:-7], str(tmp_path / "run"), *arguments[-6:]], tmp_path / "second")
    assert arguments[-7] == "run" and second.wait() == 6
    assert f"is in use by process {first.pid} on " in second.stderr and len(second.stderr.splitlines()) == 1
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == 143, first.stderr  # unharmed
