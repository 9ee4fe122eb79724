"""What several processes compute, and what they do when one of them meets something bad."""

import json
import os
import shutil
import signal

import pytest

from lsag import load_checkpoint
from tests.faults.driver import STEPS, result, wait_for_step
from tests.processes import Spawned, children, gone


def rows(out):
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


@pytest.mark.faults
def test_four_ranks_learn_what_one_that_accumulates_learns(server, arguments, undisturbed_4, tmp_path):
    """The same slices with the same random draws: only the order of floating-point sums differs."""
    run = server.start([*arguments, "--accum", "8"], tmp_path)
    assert run.wait() == 0, run.stderr
    for ours, theirs in zip(rows(tmp_path / "run"), undisturbed_4["steps"], strict=True):
        assert ours["lr"] == theirs["lr"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    for ours, theirs in zip(result(tmp_path / "run")["epochs"], undisturbed_4["epochs"], strict=True):
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)


@pytest.mark.faults
def test_a_run_resumes_with_another_number_of_ranks(server, arguments, undisturbed_4, tmp_path):
    run = server.start([*arguments, "--accum", "8"], tmp_path, {"LSAG_FAILPOINT": "fetch:400:term"})
    assert run.wait() == 143, run.stderr
    run = server.start([*arguments, "--procs", "2", "--accum", "4"], tmp_path)
    assert run.wait() == 0, run.stderr
    assert "resumed after step 50" in run.stderr
    for ours, theirs in zip(rows(tmp_path / "run"), undisturbed_4["steps"], strict=True):
        assert ours["lr"] == theirs["lr"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.faults
def test_all_ranks_skip_together_and_stop_together(server, arguments, tmp_path):
    once, ever = tmp_path / "once", tmp_path / "ever"
    once.mkdir()
    ever.mkdir()
    run = server.start([*arguments, "--procs", "2"], once, {"LSAG_FAILPOINT": "after_forward:50:nan@1"})
    assert run.wait() == 0, run.stderr
    assert [row["step"] for row in rows(once / "run") if row["loss"] is None] == [50]
    run = server.start([*arguments, "--procs", "2"], ever, {"LSAG_FAILPOINT": "after_forward:50+:nan@1"})
    assert run.wait() == 5, run.stderr
    errors = [line for line in run.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "in 10 steps in a row" in errors[0] and "is the last good checkpoint" in errors[0]
    assert load_checkpoint(max((ever / "run").glob("step-*.pt"))).training["step"] <= STEPS


@pytest.mark.faults
def test_an_error_of_all_ranks_is_told_once(server, arguments, material, tmp_path):
    shutil.copytree(material / "data", tmp_path / "data")
    (tmp_path / "data/train/class-2/7.png").write_bytes(b"no image")
    where = arguments.index("--data-dir") + 1
    run = server.start([*arguments[:where], "data", *arguments[where + 1 :], "--procs", "4"], tmp_path)
    assert run.wait() == 3
    assert len(run.stderr.splitlines()) == 1 and "class-2/7.png: not an image" in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_rank_that_ends_without_a_word_while_the_other_starts_is_the_cause(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1': os._exit(9)")
    environment = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    run = Spawned([*arguments, "--procs", "2"], tmp_path, environment)
    assert run.wait() == 7
    (line,) = run.stderr.splitlines()
    assert line.startswith("lsag: error: rank 1 (process") and "exit code 9" in line


@pytest.mark.faults
def test_a_killed_launcher_is_named_once(server, arguments, tmp_path):
    run = server.start([*arguments, "--procs", "2", "--epochs", "5000"], tmp_path)
    wait_for_step(tmp_path / "run", 20)
    ranks = run.ranks()
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and gone(ranks, within=15)
    (line,) = (line for line in run.stderr.splitlines() if "error" in line)
    assert line.startswith(f"lsag: error: the launcher (process {run.pid}) is gone: stopped by SIGTERM; step")


@pytest.mark.faults
def test_a_dead_worker_loses_no_step(server, arguments, tmp_path):
    workers = arguments.index("--workers") + 1
    options = [*arguments[:workers], "2", *arguments[workers + 1 :], "--save-minutes", "5", "--epochs", "500"]
    run = server.start(options, tmp_path, {})
    wait_for_step(tmp_path / "run", 50)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    assert run.wait() == 7
    assert "a process that prepares images has died" in run.stderr.splitlines()[-1]
    saved = load_checkpoint(max((tmp_path / "run").glob("step-*.pt"))).training["step"]
    assert saved >= 50 and rows(tmp_path / "run")[-1]["step"] == saved
