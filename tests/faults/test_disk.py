"""A disk that is full or failing costs time, but no checkpoint."""

import os
import shutil
import subprocess
import sys
from itertools import cycle, product

import pytest

from tests.faults.driver import assert_same, result, wait_for_step
from tests.faults.test_kill import checkpoints_are_whole, sampled

ACCUM = ["--accum", "2"]
POINTS = ["mid_write:4", "before_fsync:5", "before_rename:5", "after_rename:5"]


ERRORS = ["enospc", "eio"]
IN_TURN = list(zip(POINTS, cycle(ERRORS[::-1]), strict=False))


@pytest.mark.parametrize(
    ("point", "error"), sampled(product(POINTS, ERRORS), {("mid_write:4", "enospc")}, often=IN_TURN)
)
def test_one_failure_is_survived(server, arguments, undisturbed, tmp_path, point, error):
    run = server.start([*arguments, *ACCUM], tmp_path, {"LSAG_FAILPOINT": f"{point}:{error}"})
    assert run.wait() == 0, run.stderr
    assert "retrying every second" in run.stderr
    assert_same(result(tmp_path / "run"), undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("error", ERRORS)
def test_a_disk_that_stays_full_ends_the_run(server, arguments, undisturbed, tmp_path, error):
    environment = {"LSAG_FAILPOINT": f"mid_write:4+:{error}"}
    run = server.start([*arguments, *ACCUM, "--save-retry", "0.03"], tmp_path, environment)
    assert run.wait() == 6, run.stderr
    reason = {"enospc": "No space left on device", "eio": "Input/output error"}[error]
    last = run.stderr.splitlines()[-1]  # it depends on the time which checkpoint is the fourth to be written
    assert last.startswith(("lsag: error: cannot write run/step-", "lsag: error: cannot write run/best.pt")), last
    assert reason in last
    assert checkpoints_are_whole(tmp_path / "run") >= 1
    assert not list((tmp_path / "run").glob(".step*"))
    run = server.start([*arguments, *ACCUM], tmp_path)
    assert run.wait() == 0, run.stderr
    assert_same(result(tmp_path / "run"), undisturbed)


@pytest.mark.faults
def test_a_real_limit_on_file_sizes(arguments, tmp_path):
    """Not a failpoint: the kernel refuses what is larger than 600 KB, which the first checkpoint is not."""
    run = [sys.executable, "-m", "lsag_cli", *arguments, *ACCUM, "--save-retry", "0.03"]
    done = subprocess.run(["prlimit", "--fsize=600000", *run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert checkpoints_are_whole(tmp_path / "run") == 1


@pytest.mark.faults
def test_a_real_full_disk(material, arguments, undisturbed, tmp_path):
    """A small tmpfs, in a mount namespace of our own: too small at the start; filled up on the way."""
    if subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("no user namespaces here")
    train = " ".join(["python", "-m", "lsag_cli", *arguments, *ACCUM])
    script = f"""
        set -e; mkdir -p disk; mount -t tmpfs -o size=$SIZE tmpfs disk; cd disk
        if [ $SIZE = 8m ]; then
            (until [ -e run/step-0000000000.pt ]; do sleep 0.05; done; sleep 1
             dd if=/dev/zero of=filler bs=1k 2>/dev/null || true; sleep 5; rm filler) &
        fi
        code=0; {train} --save-retry $RETRY || code=$?
        cp -r run ../run-$SIZE-$RETRY; exit $code
    """
    for size, retry, code, words in (
        ("1m", "1", 6, "the run needs"),
        ("8m", "0.02", 6, "No space left on device"),
        ("8m", "1", 0, "retrying every second"),
    ):
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "SIZE": size, "RETRY": retry},
        )
        assert done.returncode == code and words in done.stderr, done.stderr
        assert checkpoints_are_whole(tmp_path / f"run-{size}-{retry}") >= (size == "8m")
    assert_same(result(tmp_path / "run-8m-1"), undisturbed)


@pytest.mark.faults
def test_shared_memory_that_is_too_small(arguments, tmp_path):
    """Not a failpoint: 64 KiB of it, too little for the batches of two workers."""
    if subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("no user namespaces here")
    train = " ".join(["python", "-m", "lsag_cli", *arguments, "--workers", "2"])
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", f"{mount}; {train}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 7 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert (
        last.startswith("lsag: error: ") and "shared memory" in last and "--shm-size" in last and "--workers 0" in last
    )


def test_a_folder_that_vanishes_is_not_made_again(server, arguments, tmp_path):
    run = server.start([*arguments, *ACCUM, "--save-retry", "0.03"], tmp_path)
    wait_for_step(tmp_path / "run", 20)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert run.wait() == 6, run.stderr
    assert not (tmp_path / "run").exists()
    assert checkpoints_are_whole(tmp_path / "elsewhere") >= 1


def test_a_folder_that_was_replaced_is_left_alone(server, arguments, undisturbed, tmp_path):
    """Another run takes the place of one that still trains, and neither its files nor its result change."""
    first = server.start([*arguments, *ACCUM, "--epochs", "5000"], tmp_path)
    wait_for_step(tmp_path / "run", 20)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    second = server.start([*arguments, *ACCUM], tmp_path)
    assert first.wait() == 6 and second.wait() == 0, first.stderr + second.stderr
    assert first.stderr.splitlines()[-1].startswith("lsag: error: run has been replaced: ")
    assert_same(result(tmp_path / "run"), undisturbed)
    assert checkpoints_are_whole(tmp_path / "elsewhere") >= 1


@pytest.mark.faults
def test_order_of_the_writes(arguments, tmp_path):
    """A power loss keeps only what was synced: the file before its name, the name before it is relied on."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    log = tmp_path / "log"
    calls = "trace=openat,fsync,rename,unlink"
    traced = ["strace", "-f", "-y", "-o", str(log), "-e", calls, sys.executable, "-m", "lsag_cli"]
    done = subprocess.run([*traced, *arguments, "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines() if "/run" in line or '"run' in line]
    renames = [i for i, event in enumerate(events) if event.startswith("rename(") and "step-" in event]
    assert len(renames) >= 3
    for i in renames:
        temporary = events[i].split('"')[1].rsplit("/", 1)[1]
        synced = [j for j in range(i) if events[j].startswith("fsync(") and temporary in events[j]]
        assert synced, "the file is synced before it gets its name"
        assert events[i + 1].startswith("openat(") and events[i + 2].startswith("fsync("), events[i : i + 3]
        assert events[i + 2].rstrip().endswith("= 0") and "/run>" in events[i + 2], "then its folder is"
        removed = next(
            (j for j in range(i, len(events)) if events[j].startswith("unlink(") and "step-" in events[j]), None
        )
        assert removed is None or removed > i + 2, "only then an old one goes"
