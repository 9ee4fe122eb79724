"""Experiment trackers: what they get, and that they can neither stop nor delay a training."""

import importlib.util
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lsag import load_preset
from lsag.errors import UnavailableError, UsageError
from lsag.training.events import Epoch, Finished, Started, Step
from lsag_cli import trackers
from lsag_cli.app import app
from lsag_cli.trackers import Tracker, chosen, close, stuck
from tests.conftest import TINY, assert_refused, table
from tests.processes import alive, gone

NAMES = ("train_loss", "eval_loss", "top1", "top5")


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """The user has no settings of trackers."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there


def mlflow_figures(out):
    """Of the only run in mlruns: steps and values by name."""
    (metrics,) = out.glob("mlruns/*/*/metrics")
    found = {}
    for path in metrics.glob("*/*"):
        rows = [line.split() for line in path.read_text().splitlines()]
        found[str(path.relative_to(metrics))] = {int(step): float(value) for _, value, step in rows}
        assert len(found[str(path.relative_to(metrics))]) == len(rows), "no step twice"
    return found


@needs("mlflow", "tensorboard")
def test_a_resumed_run_is_one_run_of_each_tracker(lsag, tmp_path, nobody):
    asked = ["--log-to", "mlflow", "--log-to=tensorboard", "--log-to", "mlflow", "--epochs", "2", "--out", "run"]
    for stop in ({"LSAG_FAILPOINT": "after_opt:30:term"}, None):
        done = lsag("train", *([*TINY, *asked] if stop else ["--resume", "run"]), env=stop)
        assert done.returncode == (143 if stop else 0), done.stderr
        assert all(
            line.startswith(("digits-nano: ", "epoch ", "resumed ", "lsag: error: "))
            for line in done.stderr.splitlines()
        )
    rows, logged = table(tmp_path / "run"), mlflow_figures(tmp_path / "run")
    for name in NAMES:
        assert logged[f"epoch/{name}"] == {row["epoch"]: row[name] for row in rows}
    assert {22, 44} <= logged["train/loss"].keys() == logged["train/data_wait"].keys() and max(logged["train/lr"]) == 44
    (run,) = (tmp_path / "run").glob("mlruns/*/*/params")
    assert (run / "train.epochs").read_text() == "2" and (run.parent / "tags/mlflow.runName").read_text() == "run"
    assert "status: 3" in (run.parent / "meta.yaml").read_text()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for name in NAMES:
        for event, row in zip(events.Scalars(f"epoch/{name}"), rows, strict=True):
            assert (event.step, event.value) == (row["epoch"], pytest.approx(row[name]))
    assert [event.step for event in events.Scalars("train/loss")] == sorted(logged["train/loss"])


@needs("wandb")
def test_a_signal_ends_wandb_with_the_training(server, tmp_path, nobody):
    settings = {"WANDB_MODE": "offline", "LSAG_FAILPOINT": "after_opt:30:term"}
    run = server.start(["train", *TINY, "--epochs=2", "--log-to", "wandb", "--out", "mine"], tmp_path, settings)
    done = run.completed()
    assert done.returncode == 143 and done.stderr.splitlines()[-1].startswith(
        "lsag: error: stopped by SIGTERM; step 30"
    )
    assert len(done.stderr.splitlines()) == 3 and not done.stdout, done.stderr
    assert not wandb_processes(run.pid)
    (log,) = (tmp_path / "mine/wandb").glob("offline-run-*/run-*.wandb")
    (row,), content = table(tmp_path / "mine"), log.read_bytes()
    for part in ("mine", "train/loss", "train/images_per_second", "warmup_epochs", *(str(row[name]) for name in NAMES)):
        assert part.encode() in content, part


def wandb_processes(parent):
    """The services that the process `parent` has started."""
    asked = f"--pid\0{parent}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] if asked in path.read_bytes() else []
        except OSError:
            continue
    return [process for process in found if alive(process)]


@pytest.mark.slow
@needs("wandb")
def test_a_kill_leaves_no_process_and_the_run_keeps_its_id(server, tmp_path, nobody):
    for failure, code in (("after_opt:30:kill", -9), ("", 0)):
        settings = {"WANDB_MODE": "offline", "LSAG_FAILPOINT": failure}
        run = server.start(
            ["train", *TINY, "--epochs=2", "--log-to", "wandb", "--resume", "--preset=digits-nano", "--out", "run"],
            tmp_path,
            settings,
        )
        assert run.wait() == code, run.stderr
        assert gone(wandb_processes(run.pid), within=15)
        time.sleep(1)  # the parts are named after the second in which they begin
    first, second = (tmp_path / "run/wandb").glob("offline-run-*")
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]


@pytest.mark.slow
@needs("wandb")
def test_wandb_without_login_is_refused(lsag, nobody, tmp_path):
    assert_refused(lsag("train", *TINY, "--log-to", "wandb"), 4, "wandb is not logged in", "WANDB_MODE=offline")
    done = lsag("train", *TINY, "--log-to", "wandb", env={"WANDB_API_KEY": "short"})
    assert_refused(done, 4, "wandb cannot be used: WANDB_API_KEY", "--log-to wandb")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@needs("wandb")
def test_a_server_that_does_not_answer_keeps_nobody_waiting(server, tmp_path, nobody):
    settings = {"WANDB_API_KEY": "0" * 40, "LSAG_FAILPOINT": "after_opt:5:term"}
    run = server.start(["train", *TINY, "--log-to", "wandb", "--out", "run"], tmp_path, settings)
    assert run.wait(60) == 143  # its library waits for 90 s
    _, note, error = run.stderr.splitlines()
    assert note == "lsag: wandb did not end within 5 s, and may lack the last figures" and "step 5 is saved" in error
    assert gone(wandb_processes(run.pid), within=15)


@pytest.mark.slow
@needs("mlflow")
def test_one_of_several_ranks_logs_also_after_a_restart(lsag, tmp_path, nobody):
    done = lsag(
        *["train", *TINY, "--device=cpu", "--procs=2", "--workers=0", "--max-restarts=1", "--log-to=mlflow"],
        *["--out", "run", "--save-minutes", "0"],
        env={"LSAG_FAILPOINT": "after_opt:12:kill@1"},
    )
    assert done.returncode == 0, done.stderr
    (row,) = table(tmp_path / "run")
    assert mlflow_figures(tmp_path / "run")["epoch/top1"] == {1: row["top1"]}


@needs("tensorboard")
def test_the_old_option_and_its_end(lsag, tmp_path):
    for old, kept in (("--tensorboard", ["tensorboard"]), ("--no-tensorboard", [])):
        done = lsag("train", *TINY, old, "--resume", "--preset=digits-nano", "--out", "run")
        assert done.returncode == 0, done.stderr
        new = "tensorboard" if kept else "none"
        assert done.stderr.startswith(f"{old} is now --log-to {new}\n")
        assert json.loads((tmp_path / "run/options.json").read_text())["log_to"] == kept
    assert_refused(lsag("train", "--tensorboard", "--log-to", "mlflow"), 2, "both were given")


@pytest.mark.parametrize("names", [["none", "wandb"], ["tensorbord"], [""]])
def test_trackers_that_are_not_there_are_refused(names):
    with pytest.raises(UsageError, match="choose from wandb, mlflow, tensorboard; or none, alone"):
        chosen(names)


@pytest.mark.parametrize("name", trackers.LOGS)
@pytest.mark.parametrize("found", [None, importlib.util.spec_from_loader("a_folder", None)])
def test_a_missing_package_is_told_before_anything_starts(tmp_path, monkeypatch, name, found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(app, ["train", "--log-to", name, *more])
        assert isinstance(done.exception, UnavailableError)
        assert str(done.exception) == f"the package {name} is not installed — pip install 'lsag[{name}]'"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def started(tmp_path):
    """A training that is resumed after step 12."""
    return Started(
        preset=load_preset("digits-nano"),
        out=tmp_path / "mine",
        device="cpu",
        parameters=1,
        train_images=1,
        eval_images=1,
        steps_per_epoch=10,
        first_step=12,
        ranks=1,
        slice_size=1,
        notes=(),
    )


def step(epoch, step):
    return Step(epoch=epoch, step=step, loss=1.0, lr=0.1, images_per_second=5.0, data_wait=0.0, memory=1)


def test_what_is_logged_already_is_left_out(started, monkeypatch):
    seen = []

    def keep(tracker):
        seen.extend((kind, x) for kind, x, _ in tracker.figures(after_step=14, after_epoch=1))
        seen.append(tracker.finished)

    monkeypatch.setitem(trackers.LOGS, "wandb", keep)
    summary = Epoch(2, 20, 0.1, 1.0, 1.0, 0.5, 0.9, 0.5, 5.0, 0.0, 0.0, 0, 1.0)
    finished = Finished(started.out, 2, 0.5, 2, 0.5, 1.0)
    for last, end in ((step(3, 1), False), (finished, True)):
        tracker = Tracker("wandb", started, "0")
        for event in (started, step(2, 3), step(2, 4), step(2, 5), replace(summary, epoch=1), summary, last):
            tracker.add(event)
        close([tracker], finished=end)
        assert seen[:2] == [("train", 15), ("epoch", 2)] and seen[-1] == end
        seen.clear()


def test_a_tracker_that_fails_is_told_once(started, monkeypatch, caplog):
    def fail(tracker):
        next(tracker.figures())
        raise SystemExit("no network\nat all")

    monkeypatch.setitem(trackers.LOGS, "mlflow", fail)
    tracker = Tracker("mlflow", started, "0")
    for number in range(100):
        tracker.add(step(2, number))
    close([tracker], finished=True)
    assert caplog.messages == ["mlflow: no network; nothing more is logged there"] and not stuck()


def test_a_tracker_that_hangs_is_left_behind(started, monkeypatch, caplog):
    over = threading.Event()
    monkeypatch.setitem(trackers.LOGS, "mlflow", lambda tracker: over.wait())
    monkeypatch.setattr(trackers, "STOP_SECONDS", 0.1)
    tracker = Tracker("mlflow", started, "0")
    close([tracker], finished=False)
    assert caplog.messages == ["mlflow did not end within 0 s, and may lack the last figures"] and stuck()
    over.set()
    tracker.join()
    assert not stuck()


def test_a_copy_under_another_name_is_another_run(started, tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.LOGS, "wandb", lambda tracker: None)
    same, moved = tmp_path / "elsewhere/mine", tmp_path / "no UTF-8: \udcff"
    ids = [Tracker("wandb", replace(started, out=out), "0").id for out in (started.out, same, moved)]
    assert ids[0] == ids[1] != ids[2] and Tracker("wandb", started, "1").id not in ids
