"""A run keeps the options that it was started with: its name alone is enough to resume it."""

import json

import pytest

from lsag.errors import DamagedError, UsageError
from lsag.training.options import TrainOptions
from tests.conftest import TINY, assert_refused


def test_a_killed_run_is_resumed_by_its_name_alone(lsag, folder, tmp_path):
    """With its data folder, accumulation and workers, from another folder, and again after that."""
    options = ["--preset", "cifar-nano", "--dataset", "folder", "--data-dir", ".", "--accum", "2", "--workers", "0"]
    small = ["--set=train.batch_size=4", "--set=model.stages=[{embed_dim=8,depth=2,num_heads=2}]", TINY[1]]
    killed = {"LSAG_FAILPOINT": "after_opt:3:kill"}
    assert lsag("train", *options, *small, "--epochs=2", "--out", "run", env=killed).returncode == -9
    (tmp_path / "elsewhere").mkdir()
    for words in ("resumed after step", "../run is already finished (epoch 2 of 2): nothing is left to train"):
        done = lsag("train", "--resume", "../run", cwd=tmp_path / "elsewhere")
        assert done.returncode == 0, done.stderr
        assert words in done.stderr and "changed from" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_an_option_that_is_given_wins(lsag, tmp_path):
    stopped = {"LSAG_FAILPOINT": "after_opt:3:term"}
    started = lsag("train", *TINY, "--accum", "2", "--device", "cpu", "--procs", "1", "--out", "run", env=stopped)
    assert started.returncode == 143
    assert started.stderr.splitlines()[-1].endswith(
        "stopped by SIGTERM; step 3 is saved in run — resume with: lsag train --resume run"
    )
    done = lsag("train", "--resume", "run", "--accum", "1")
    assert done.returncode == 0, done.stderr
    assert "slices changed from 2 to 1: results may differ in rounding" in done.stderr
    kept = TrainOptions.kept_in(tmp_path / "run")
    assert kept["accum"] == 1 and kept["device"] == "cpu" and kept["data_dir"].is_absolute()


@pytest.mark.parametrize(
    "content", ['{"accum": "x"}', '{"accum": 0}', "[1]", "{", "\0", '{"data_dir": 5}', "[" * 100_000]
)
def test_damaged_options_are_refused(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(DamagedError, match=r"options.json is damaged: .* — remove it"):
        TrainOptions.kept_in(tmp_path)


def test_damaged_options_are_one_line(lsag, tmp_path):
    assert lsag("train", *TINY, "--out", "run").returncode == 0
    (tmp_path / "run/options.json").write_text('{"accum": "x"}')
    assert_refused(lsag("train", "--resume", "run"), 3, "options.json is damaged: accum", "remove it")
    (tmp_path / "run/options.json").unlink()  # as a run of an earlier version has none
    assert lsag("train", "--resume", "run").returncode == 0


def test_every_option_is_kept_or_concerns_one_start_alone(tmp_path):
    options = TrainOptions(out=tmp_path, data_dir="data", workers=3, precision="bf16", save_minutes=1)
    (tmp_path / "options.json").write_bytes(options.to_keep())
    kept = TrainOptions.kept_in(tmp_path)
    assert kept.keys() | TrainOptions.NOT_KEPT == TrainOptions.model_fields.keys()
    assert (kept["workers"], kept["precision"], kept["save_minutes"]) == (3, "bf16", 1.0)


def test_options_that_are_not_possible_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"^accum: Input should be .* 1; worker: Extra inputs .* — see [^\n]+$"):
        TrainOptions(out=tmp_path, data_dir="data", accum=0, worker=1)


def test_what_a_dead_start_left_is_not_kept(lsag, tmp_path):
    """Options without a checkpoint are nobody's: a start that also resumes does not take them."""
    killed = {"LSAG_FAILPOINT": "before_save:1:kill"}
    assert lsag("train", *TINY, "--accum", "4", "--out", "run", env=killed).returncode == -9
    assert TrainOptions.kept_in(tmp_path / "run")["accum"] == 4
    done = lsag("train", *TINY, "--preset", "digits-nano", "--resume", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert TrainOptions.kept_in(tmp_path / "run")["accum"] == 1


@pytest.mark.parametrize("change", [{"procs": 0}, {"gpus": "9" * 5000}, {"max_restarts": -1}])
def test_options_that_the_command_line_would_refuse_are_damage(lsag, tmp_path, change):
    assert lsag("train", *TINY, "--out", "run").returncode == 0
    kept = json.loads((tmp_path / "run/options.json").read_text())
    (tmp_path / "run/options.json").write_text(json.dumps(kept | change))
    assert_refused(lsag("train", "--resume", "run"), 3, "options.json is damaged", next(iter(change)))


def test_options_that_are_no_file_are_refused(lsag, tmp_path):
    assert lsag("train", *TINY, "--out", "run").returncode == 0
    (tmp_path / "run/options.json").unlink()
    (tmp_path / "run/options.json").mkdir()
    assert_refused(lsag("train", "--resume", "run"), 3, "cannot read options run/options.json", "it is a folder")


def test_the_environment_says_where_data_has_moved_and_who_the_ranks_are(lsag, folder, tmp_path):
    small = ["--preset", "cifar-nano", "--dataset", "folder", "--set=train.batch_size=4", "--epochs=1", TINY[1]]
    small.append("--set=model.stages=[{embed_dim=8,depth=2,num_heads=2}]")
    (tmp_path / "old").mkdir()
    for split in ("train", "val"):
        (folder / split).rename(tmp_path / "old" / split)
    started = lsag("train", *small, "--out", "run", "--max-restarts", "1", env={"LSAG_DATA": "old"})
    assert started.returncode == 0, started.stderr
    (tmp_path / "old").rename(tmp_path / "new")
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = lsag("train", "--resume", "run", env={"LSAG_DATA": str(tmp_path / "new")} | world)
    assert done.returncode == 0, done.stderr


def test_an_option_and_its_old_name_are_refused_together(lsag):
    assert_refused(lsag("bench", "digits-nano", "--batch", "2", "--batch-size", "3"), 2, "--batch is now --batch-size")
