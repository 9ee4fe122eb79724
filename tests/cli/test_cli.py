"""The command line as a user runs it: in its own process."""

import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lsag import __version__, load_checkpoint, load_preset
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.presets import preset_names
from lsag_cli.app import app, lack
from lsag_cli.output import operations
from lsag_cli.train import own_folder
from tests.conftest import ROOT, TINY, assert_refused
from tests.processes import Spawned


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """A run folder of a tiny training, made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    done = server.start(["train", *TINY, "--out", "runs/first"], folder).completed()
    assert done.returncode == 0, done.stderr
    return folder, done


def test_help_and_version(lsag):
    for arguments, code in ((["--help"], 0), ([], 2)):
        done = lsag(*arguments)
        assert done.returncode == code and not done.stderr
        for command in ("train", "eval", "flops", "export", "convert", "presets"):
            assert f" {command} " in done.stdout
    assert lsag("--version").stdout == f"lsag {__version__}\n"


def test_help_imports_no_torch(lsag):
    code = (
        "import sys; sys.argv[1:] = ['train', '--help']\nfrom lsag_cli.app import main\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("False\n")


def test_train_says_where_everything_is_and_what_comes_next(trained):
    folder, done = trained
    assert re.search(r"best top-1  \d+\.\d\d %", done.stdout)
    assert "everything is in runs/first: best.pt, curves.png, results.csv, metrics.jsonl" in done.stdout
    assert "next: lsag eval runs/first/best.pt\n" in done.stdout
    assert "epoch 1/1  loss" in done.stderr and "\r" not in done.stderr and "\x1b" not in done.stderr
    assert (folder / "runs/first/curves.png").exists()


def test_eval_export_and_eval_of_the_export_agree(trained, lsag):
    folder, _ = trained
    best = folder / "runs/first/best.pt"
    first = lsag("eval", best, "--predictions", "a.csv", cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "digits-nano on digits, 360 images, cpu, fp32" in first.stdout
    with Image.open(folder / "runs/first/best-pt-digits-confusion.png") as image:
        assert image.width > 500
    exported = lsag("export", "--onnx", cwd=folder)  # the newest run's best
    assert (
        exported.returncode == 0 and "runs/first/best.onnx: digits-nano, uint8 images, opset 23" in exported.stdout
    ), exported.stderr
    second = lsag("eval", folder / "runs/first/best.onnx", "--json", "--predictions", "b.csv", cwd=folder)
    result = json.loads(second.stdout)
    assert result["images"] == 360 and result["device"].startswith("OpenVINO")
    rows, others = (list(csv.reader((folder / name).open())) for name in ("a.csv", "b.csv"))
    assert [row[:3] for row in rows] == [row[:3] for row in others] and len(rows) == 361
    assert rows[0] == ["image", "label", "predicted", "probability", "probability_of_label"]
    for row, other in zip(rows[1:], others[1:], strict=True):
        assert [*map(float, row[3:])] == pytest.approx([*map(float, other[3:])], abs=1e-5)
    assert result["top1"] == sum(label == guess for _, label, guess, *_ in rows[1:]) / 360
    assert np.trace(result["confusion"]) == round(result["top1"] * 360)
    assert_refused(lsag("export", "--onnx", cwd=folder), 6, "best.onnx exists", "--force")


def test_train_json_is_one_object(lsag):
    done = lsag("train", *TINY, "--out", "run", "--json", "--device", "cpu")
    result = json.loads(done.stdout)
    assert result["ok"] and result["command"] == "train" and 0 < result["best_top1"] < 1


def test_runs_are_named_after_preset_and_time(lsag, tmp_path):
    assert lsag("train", *TINY).returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-nano-\d{8}-\d{6}", run.name)


def test_dry_run_touches_nothing(lsag, tmp_path):
    done = lsag("train", "--preset", "in1k-tiny", "--epochs", "3", "--set", "train.warmup_epochs=1", "--dry-run")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    for words in (
        "9,725,608",
        "3.429 G",
        "3 epochs of 1,740",
        "effective batch  736",
        "0.000719",
        "train.weight_decay = 0.05",
    ):
        assert words in done.stdout
    plan = json.loads(lsag("train", "--preset", "cifar-tiny", "--dataset", "cifar100", "--dry-run", "--json").stdout)
    assert plan["preset"]["model"]["num_classes"] == 100 and plan["steps"] == 67 * 300


def test_a_plan_for_a_machine_that_is_not_here(lsag):
    here = {"CUDA_VISIBLE_DEVICES": ""}
    done = lsag("train", "--preset", "in1k-tiny", "--gpus", "8", "--nodes", "2", "--dry-run", env=here)
    assert done.returncode == 0, done.stderr
    for words in (
        "736 = 16 devices x 1 slice x 46 images",
        "GPUs             16; this machine has 0",
        "1,281,167 training (80,040 an epoch on each device), 50,000 evaluation",
    ):
        assert words in done.stdout
    listed = ["train", "--preset", "cifar-nano", "--gpus", "0,1,2,3", "--dry-run", "--json"]
    plan = json.loads(lsag(*listed, env=here).stdout)
    assert (plan["processes"], plan["slice_size"], plan["gpus_here"]) == (4, 32, 0)
    assert_refused(lsag("train", "--preset", "cifar-nano", "--gpus", "3", "--dry-run"), 2, "cut into 3", "126 or 129")
    assert_refused(lsag("train", "--gpus", "all", "--dry-run", env=here), 4, "asked for all GPUs, found 0")


def test_a_plan_counts_the_images_of_a_folder(lsag, folder):
    asked = ["train", "--preset", "cifar-nano", "--dataset", "folder", "--set", "train.batch_size=4", "--dry-run"]
    plan = json.loads(lsag(*asked, "--data-dir", folder, "--probe", "--device", "cpu", "--json").stdout)
    assert (plan["train_images"], plan["eval_images"], plan["steps"]) == (8, 4, 20)
    assert plan["preset"]["model"]["num_classes"] == 2
    assert plan["total_seconds"] == pytest.approx(plan["step_seconds"] * (20 + 10 / 3))
    shown = lsag(*asked, "--data-dir", folder, "--device", "cpu", "--probe").stdout
    assert "8 training, 4 evaluation" in shown and "10 epochs of 2 steps" in shown
    assert re.search(r"total time +about \d+ s with evaluation, without loading", shown)
    elsewhere = lsag(*asked, "--data-dir", "elsewhere")
    assert elsewhere.returncode == 0 and "as many steps as the images fill batches" in elsewhere.stdout
    assert elsewhere.stderr.startswith("images are not counted: no image folder in elsewhere/")
    for where in (["--data-dir", folder], ["--dataset", "cifar10"]):
        done = lsag(*asked, *where, "--set", "data.shuffle=shards:2")
        assert_refused(done, 2, "shuffle shards:2 is for tar shards")


def test_flops_lists_every_preset_with_the_papers_figures(lsag):
    text = lsag("flops").stdout
    for name in preset_names():
        assert f"\n{name} " in text
    assert re.search(r"cifar-tiny +10,228,298 +2\.820 G +5\.640 G +2\.457 G +10\.2 M", text)
    (only,) = json.loads(lsag("flops", "--preset", "in1k-small", "--json").stdout)["presets"]
    assert (only["params"], only["paper"]["gmacs"]) == (22_145_320, 7.6)
    assert sum(stage["macs"] for stage in only["stages"]) == only["macs"]
    by_stage = lsag("flops", "--preset", "in1k-small", "--by-stage").stdout
    assert "embedding" in by_stage and "stage 3" in by_stage and "22,145,320" in by_stage


def test_presets_are_listed(lsag):
    listed = json.loads(lsag("presets", "--json").stdout)["presets"]
    assert len(listed) == len(preset_names())
    costs = [item["macs_run"] for item in listed]
    assert costs == sorted(costs), "the smallest comes first"
    assert re.search(r"in1k-small +imagenet +224 +22\.15 M +7\.468 G +300", lsag("presets").stdout)


def test_export_with_random_weights(lsag, tmp_path):
    done = lsag("export", "--preset", "digits-nano", "--random-weights", "--onnx", "--json")
    assert (
        json.loads(done.stdout)["path"] == "digits-nano-random.onnx" and (tmp_path / "digits-nano-random.onnx").exists()
    )


def test_eval_of_cifar10_as_torchvision_keeps_it(tmp_path, monkeypatch):
    """`lsag eval ckpt.pt --dataset cifar10`, on files in CIFAR's own format."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    base = tmp_path / "data" / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
    (base / "test_batch").write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", calculate_md5(base / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": calculate_md5(base / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    preset = load_preset("cifar-nano")
    checkpoint = random_checkpoint(preset)
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint.__class__(checkpoint.model, preset, tuple(names)))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["eval", "ckpt.pt", "--dataset", "cifar10", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["images"] == 20 and list(result["per_class"]) == names
    # The images reach the model as they are in the file.
    images = torch.from_numpy(batch["data"]).view(20, 3, 32, 32)
    from lsag.inference.classifier import Classifier

    logits = Classifier(checkpoint)(images)
    hits = (logits.argmax(1) == torch.tensor(batch["labels"])).float().mean().item()
    assert result["top1"] == pytest.approx(hits)


REFUSED = {
    "unknown command": (["trian"], 2, ["trian"]),
    "unknown option": (["train", "--epoch", "3"], 2, ["--epoch"]),
    "unknown preset": (
        ["train", "--preset", "cifar-tiney"],
        2,
        ["cifar-tiney", "did you mean 'cifar-tiny'", "lsag presets"],
    ),
    "unknown key": (["train", "--set", "train.epoch=3"], 2, ["unknown key train.epoch", "did you mean 'train.epochs'"]),
    "wrong type": (["train", "--set", "train.epochs=many"], 2, ["train.epochs", "'many'"]),
    "out of range": (["train", "--epochs", "0"], 2, ["--epochs"]),
    "no value": (["train", "--set", "train.epochs"], 2, ["KEY=VALUE"]),
    "classes of a folder": (
        ["train", "--dataset", "folder", "--set", "model.num_classes=7"],
        2,
        ["have their number of classes"],
    ),
    "set twice": (["train", "--epochs", "5", "--set", "train.epochs=6"], 2, ["train.epochs is set twice"]),
    "a plan that cannot be": (["train", "--dry-run", "--set", "train.batch_size=2000"], 2, ["1,437", "2000"]),
    "a warm-up that is too long": (
        ["train", "--epochs", "2", "--set", "train.warmup_epochs=3"],
        2,
        ["--set train.warmup_epochs=0"],
    ),
    "too many frozen stages": (["train", "--freeze", "3"], 2, ["train.freeze 3 is more than the 2 stages"]),
    "a split of what is split": (
        ["train", "--val-split", "0.2"],
        2,
        ["for images of your own, digits has a split", "--dataset folder"],
    ),
    "all held out": (["train", "--val-split", "1"], 2, ["--val-split", "0.99"]),
    "unknown dataset": (["train", "--dataset", "mnist"], 2, ["data.dataset", "'mnist'"]),
    "a batch that is never filled": (["train", "--set", "train.batch_size=2000"], 2, ["1,437", "2000"]),
    "no data": (
        ["train", "--preset", "in1k-tiny"],
        3,
        ["expected data/train/CLASS/", "--data-dir"],
    ),
    "no data, no download": (["train", "--preset", "cifar-tiny", "--no-download"], 3, ["no cifar10 in"]),
    "eight GPUs": (["train", "--preset", "in1k-tiny", "--gpus", "8"], 4, ["asked for 8 GPUs, found"]),
    "unknown device": (["train", "--device", "tpu"], 4, ["'tpu'", "cpu"]),
    "contradiction": (["train", "--gpus", "1", "--device", "cpu"], 2, ["contradicts"]),
    "no checkpoint": (["eval", "absent.pt"], 3, ["absent.pt", "No such file"]),
    "other classes": (["train", "--set", "model.num_classes=12"], 2, ["digits has 10 classes"]),
    "unknown GPU": (["train", "--device", "cuda:99"], 4, ["cuda:99"]),
    "no argument": (["eval"], 2, ["checkpoint"]),
    "no run": (["export", "--onnx"], 3, ["no best.pt in ./runs", "lsag train"]),
    "no format": (["export"], 2, ["--onnx"]),
    "two models": (["export", "a.pt", "--onnx", "--preset", "cifar-tiny", "--random-weights"], 2, ["no checkpoint"]),
    "a picture over a checkpoint": (["eval", "a.pt", "--plot", "a.pt"], 2, ["--plot a.pt does not end in .png"]),
    "a folder to export": (["export", ".", "--onnx"], 3, ["cannot read checkpoint .", "it is a folder"]),
    "a folder to convert": (
        ["convert", ".", "--preset", "cifar-tiny"],
        3,
        ["cannot read checkpoint .", "it is a folder"],
    ),
    "a name that is too long": (["eval", "x" * 300 + ".onnx"], 3, ["too long"]),
    "a device as checkpoint": (["eval", "/dev/zero"], 3, ["not a regular file"]),
    "a preset beside a checkpoint": (["export", "a.pt", "--onnx", "--preset", "cifar-tiny"], 2, ["own preset"]),
    "nothing to convert": (
        ["convert", "absent.pth", "--preset", "cifar-tiny"],
        3,
        ["cannot read checkpoint"],
    ),
    "unknown provider": (["eval", "absent.onnx", "--provider", "tpu"], 2, ["--provider", "tpu"]),
    "device of a graph": (["eval", "absent.onnx", "--device", "mps"], 2, ["cuda:N"]),
}


@pytest.mark.parametrize(("arguments", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_one_line_and_an_exit_code(lsag, tmp_path, arguments, code, words):
    assert_refused(lsag(*arguments), code, *words)
    assert not list(tmp_path.iterdir()), "nothing was left behind"


def test_files_that_are_no_checkpoint(lsag, tmp_path):
    (tmp_path / "notes.pt").write_text("my notes")
    assert_refused(lsag("eval", "notes.pt"), 3, "notes.pt is not a checkpoint")
    assert_refused(lsag("export", "notes.pt", "--onnx"), 3, "notes.pt is not a checkpoint")


def test_a_checkpoint_on_other_classes(trained, lsag, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "val" / name / "a.png")
    done = lsag("eval", trained[0] / "runs/first/best.pt", "--dataset", "folder", "--data-dir", tmp_path)
    assert_refused(done, 3, f"does not know 'cat', 'dog' of {tmp_path}/val, which lacks '0', '1'", "and 5 more")


def test_eval_of_an_unknown_dataset(trained, lsag):
    done = lsag("eval", trained[0] / "runs/first/best.pt", "--dataset", "digit")
    assert_refused(done, 2, "unknown dataset 'digit'", "did you mean 'digits'")


def test_figures_are_shown_even_if_the_picture_cannot_be_written(trained, lsag):
    best = trained[0] / "runs/first/best.pt"
    full = {"LSAG_FAILPOINT": "before_fsync:1:enospc"}
    done = lsag("eval", best, "--plot", "a.png", env=full)
    assert done.returncode == 6 and "top-1" in done.stdout and "cannot write a.png" in done.stderr
    result = json.loads(lsag("eval", best, "--plot", "a.png", "--json", env=full).stdout)
    assert not result["ok"] and result["error"]["code"] == 6 and result["images"] == 360


def test_files_that_exist_are_not_written_over(lsag, tmp_path):
    """Before anything else happens: none of the inputs is there."""
    writers = {
        "--plot": (["eval", "absent.pt"], ["bench", "digits-nano"]),
        "--predictions": (["eval", "absent.pt"],),
        "--report": (["eval", "absent.pt"],),
        "--csv": (["predict", "absent.pt", "."],),
    }
    for option, commands in writers.items():
        suffix = {"--plot": ".png", "--report": ".html"}.get(option, ".csv")
        old, pipe = tmp_path / f"old{suffix}", tmp_path / f"pipe{suffix}"
        old.write_text("mine")
        os.mkfifo(pipe)
        for command in commands:
            refused = lsag(*command, option, old)
            assert_refused(refused, 6, f"{old} exists", f"add --force, or choose another {option}")
            assert_refused(lsag(*command, option, pipe, "--force"), 6, "not a regular file")
            assert_refused(lsag(*command, option, f"absent/a{suffix}"), 6, "there is no folder absent")
            assert old.read_text() == "mine"
        old.unlink()
        pipe.unlink()


def test_force_writes_over_files(trained, lsag, tmp_path):
    best = trained[0] / "runs/first/best.pt"
    files = ("a.png", "a.csv", "a.html", "b.csv", "c.png", "d.safetensors")
    for name in files:
        (tmp_path / name).write_text("old")
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    bench = ["bench", "digits-nano", "--rounds", "1", "--batch", "1", "--device", "cpu", "--plot", "c.png"]
    for command in (
        ["eval", best, "--plot", "a.png", "--predictions", "a.csv", "--report", "a.html"],
        ["predict", best, "image.png", "--csv", "b.csv"],
        ["export", best, "--safetensors", "--out", "d.safetensors"],
        bench,
    ):
        done = lsag(*command, "--force")
        assert done.returncode == 0, done.stderr
    assert "old" not in [(tmp_path / name).read_text(errors="replace") for name in files]
    # The picture that eval makes unasked is its own to renew.
    assert lsag("eval", best).returncode == lsag("eval", best).returncode == 0


def test_class_names_are_shown_as_they_are(lsag, tmp_path):
    for split in ("train", "val"):
        for name in ("cup [small]", ":cat:", "a$b$", "ü"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / "a.png")
    options = ["--dataset", "folder", "--data-dir", tmp_path, "--set", "train.batch_size=4", "--out", "my run"]
    done = lsag("train", *TINY, *options)
    assert f"next: lsag eval 'my run/best.pt' --data-dir {tmp_path}\n" in done.stdout, done.stderr
    shown = lsag("eval", "my run/best.pt", "--data-dir", tmp_path, "--predictions", "p.csv")
    for name in ("cup [small]", ":cat:", "a$b$", "ü"):
        assert name in shown.stdout, shown.stderr
    assert (tmp_path / "my run/best-pt-folder-confusion.png").exists()


def test_a_broken_image_is_named(lsag, tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (8, 8)).save(tmp_path / split / name / f"{index}.png")
    (tmp_path / "train/dog/2.png").write_text("broken")
    options = ["--dataset", "folder", "--data-dir", ".", "--set", "train.batch_size=8"]
    done = lsag("train", *TINY, *options, "--out", "run")
    assert_refused(done, 3, "dog/2.png: not an image — repair or remove the file, or train with --skip-broken")
    done = lsag("train", *TINY, *options, "--out", "skipped", "--skip-broken")
    assert done.returncode == 0, done.stderr
    assert "lsag: broken training images that others replaced: 1, listed in skipped/broken.txt\n" in done.stderr
    found = (tmp_path / "skipped/broken.txt").read_text()
    assert found == f"{tmp_path}/train/dog/2.png: not an image\n"
    (tmp_path / "val/dog/2.png").write_text("broken")
    done = lsag("train", *TINY, *options, "--out", "other", "--skip-broken")
    assert_refused(done, 3, "val/dog/2.png: not an image — repair or remove the file")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written(lsag):
    assert_refused(lsag("train", *TINY, "--out", "/proc/run"), 6, "cannot write", "/proc/run")


def test_a_file_where_a_folder_should_be(lsag, tmp_path):
    (tmp_path / "file").touch()
    assert_refused(lsag("train", *TINY, "--out", "file/run"), 6, "cannot write", "file")


def test_json_errors_are_one_object_too(lsag):
    done = lsag("eval", "absent.pt", "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)
    assert not error["ok"] and error["command"] == "eval" and error["error"]["code"] == 3
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(lsag):
    assert "Traceback" in lsag("--debug", "eval", "absent.pt").stderr
    assert "Traceback" in lsag("eval", "absent.pt", env={"LSAG_DEBUG": "1"}).stderr


def test_a_bug_is_reported_with_a_log_of_its_traceback(lsag, tmp_path):
    code = (
        "import sys, lsag_cli.flops as f\nsys.argv = ['lsag', 'flops']\n"
        "def broken(*a, **b): raise ZeroDivisionError('oops')\nf.read_preset = broken\n"
        "from lsag_cli.app import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert_refused(done, 70, "a bug in lsag: ZeroDivisionError: oops")
    (log,) = tmp_path.iterdir()
    assert "Traceback" in log.read_text() and str(log) in done.stderr


def test_interrupting_says_what_is_kept(tmp_path):
    training = Spawned(["train", *TINY, "--epochs", "500", "--out", "run"], tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/best.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(training.pid, signal.SIGINT)
    assert training.wait(60) == 130
    errors = training.stderr
    said = re.search(r"interrupted; step (\d+) is saved in run — resume with: lsag train --resume run\n$", errors)
    assert said and load_checkpoint(tmp_path / f"run/step-{int(said[1]):010d}.pt").epoch >= 1
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("redirection", "codes"),
    [
        ("| (exec 0<&-; sleep 1)", [141]),
        ("> /dev/full", [6]),
        (">&-", [0]),
        ("2>&-", [0]),
        ("| head -1", [0, 141]),
    ],
)
@pytest.mark.parametrize("json_flag", ["", "--json"])
def test_closed_and_full_streams(redirection, codes, json_flag):
    shell = f"{sys.executable} -m lsag_cli flops {json_flag} {redirection}; echo ${{PIPESTATUS[0]}} >&9"
    rest = "1>/dev/null" if ">" in redirection else ""
    done = subprocess.run(["bash", "-c", f"{{ {shell}; }} 9>&1 {rest}"], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) in codes, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1


def test_errors_keep_their_code_and_object_when_stderr_is_full():
    shell = f"{sys.executable} -m lsag_cli eval absent.pt --json 2>/dev/full; echo $?"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    printed, code = done.stdout.splitlines()
    assert code == "3" and json.loads(printed)["error"]["code"] == 3


def test_interrupting_anything_is_one_line(trained):
    best = trained[0] / "runs/first/best.pt"
    code = (
        "import signal, sys, lsag.inference.evaluate as e\n"
        "def interrupted(*a, **k): signal.raise_signal(signal.SIGINT)\n"
        "e.evaluate_file = interrupted\n"
        f"sys.argv = ['lsag', 'eval', {str(best)!r}]\n"
        "from lsag_cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert_refused(done, 130, "interrupted")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_figure_is_cut_off_on_a_narrow_terminal(lsag, width):
    shown = lsag("flops", "--by-stage", env={"COLUMNS": str(width)}).stdout
    for preset in json.loads(lsag("flops", "--json").stdout)["presets"]:
        for stage in [preset, *preset["stages"]]:
            assert f"{stage['params']:,} " in shown and operations(stage["macs"], preset["flops"]) in shown


def test_help_names_the_defaults(lsag):
    shown = " ".join(lsag("train", "--help").stdout.replace("│", " ").split())
    for words in ("$LSAG_DATA, or ./data", "runs/PRESET-TIME", "depends on the machine"):
        assert words in shown
    shown = " ".join(lsag("reproduce", "--help").stdout.replace("│", " ").split())
    assert re.search(r"--epochs \S+ [^-]*Number of epochs\.", shown)


def test_ascii_terminals_are_served(lsag_afresh):
    done = lsag_afresh("eval", "absent.pt", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 3 and done.stderr.isascii()
    assert lsag_afresh("flops", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}).returncode == 0


HOSTILE = "b\nb\x1b[31m"
"""Ends a line and turns the rest of it red."""


def test_names_do_not_reach_the_terminal_as_they_are(lsag, tmp_path):
    for split in ("train", "val"):
        for name in ("a", HOSTILE):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / name / "a.png")
    (tmp_path / f"{HOSTILE}.json").write_text(
        json.dumps(load_preset("digits-nano").model_dump(mode="json") | {"name": "red\x9b31m"})
    )
    options = ["--dataset", "folder", "--data-dir", ".", "--set", "train.batch_size=2", "--out", "run"]
    shown = [
        lsag("train", *TINY, "--preset", f"{HOSTILE}.json", *options),
        lsag("eval", "run/best.pt", "--data-dir", "."),
        lsag("predict", "run/best.pt", f"val/{HOSTILE}/a.png"),
        lsag("explain", "run/best.pt", f"val/{HOSTILE}/a.png", "--out", f"{HOSTILE}.png"),
        lsag("train", "--preset", f"{HOSTILE}.json", "--dry-run"),
        lsag("flops", "--preset", f"{HOSTILE}.json"),
        lsag("flops", "--preset", f"{HOSTILE}.json", "--by-stage"),
    ]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines()), done.stdout + done.stderr
    (row,) = (line for line in shown[1].stdout.splitlines() if line.startswith("b"))
    assert row.split() == ["b\\nb\\x1b[31m", "1", row.split()[2], "%"]
    exact = json.loads(lsag("eval", "run/best.pt", "--data-dir", ".", "--json").stdout)
    assert list(exact["per_class"]) == ["a", HOSTILE]
    (tmp_path / f"val/{HOSTILE}/a.png").write_text("broken")
    for command in (["eval", "run/best.pt", "--data-dir", "."], ["flops", "--set", f"train.{HOSTILE}=1"]):
        done = lsag(*command)
        assert len(done.stderr.splitlines()) == 1 and done.stderr.strip().isprintable() and "b" in done.stderr


def test_other_processes_run_as_this_one_does(tmp_path):
    """With the interpreter's flags and path, and without what lies in the current folder."""
    for name in ("queue", "random", "timm", "lsag_cli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    tell = "import json; from lsag_cli.processes import lsag_command; print(json.dumps(lsag_command()))"
    flags = ["-P", "-W", "ignore::ResourceWarning", "-X", "utf8"]
    parent = subprocess.run(
        [sys.executable, *flags, "-c", tell],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    command = json.loads(parent.stdout)
    assert {"-P", "-Wignore::ResourceWarning", "utf8"} <= set(command)
    command.remove("-P")  # which alone would keep the folder out
    done = subprocess.run([*command, "presets", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["ok"], done.stderr


def test_what_libraries_start_does_not_run_what_lies_in_the_current_folder(tmp_path):
    """Multiprocessing, for one, starts Python with a line of code."""
    (tmp_path / "queue.py").write_text("raise SystemExit('executed')")
    code = (
        "import subprocess, sys; from lsag_cli import app\n"
        "app.run = lambda: subprocess.call([sys.executable, '-c', 'import queue'])\n"
        "app.main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_without_a_name_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    import lsag_cli.train as module

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, tzinfo=tz)

    outs = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(module, "follow", lambda preset, options, **others: outs.append(options.out))
    (tmp_path / "runs/digits-nano-20260102-000000").mkdir(parents=True)
    done = CliRunner().invoke(app, ["train", "--device", "cpu"])
    assert done.exit_code == 0 and outs == [Path("runs/digits-nano-20260102-000000-2")], done.output


def test_folders_of_runs_begun_in_the_same_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("runs/a")
    with own_folder(name) as first, own_folder(name) as second, own_folder(name) as third:
        assert [first, second, third] == [name, Path("runs/a-2"), Path("runs/a-3")]
        (second / "preset.json").touch()
    assert [path.name for path in Path("runs").iterdir()] == ["a-2"], "what stays empty is removed"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "TMPDIR"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
        (ImportError("IMPORTANT: PLEASE READ THIS\n\nOriginal error was: libx.so.1: cannot open it"), "libx.so.1"),
        (OSError("libcudart.dylib: cannot open shared object file"), "libcudart.dylib"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(error, words):
    what, fix = lack(error)
    assert words in what + fix and fix


def test_what_the_machine_lacks_is_one_line():
    code = (
        "import sys, lsag_cli.flops as f\nsys.argv = ['lsag', 'flops']\n"
        "def full(*a, **b): raise FileNotFoundError(2, 'No usable temporary directory found')\nf.read_preset = full\n"
        "from lsag_cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert_refused(done, 4, "there is no usable temporary folder", "set TMPDIR")


@pytest.mark.parametrize("error", [ValueError("a.so"), ImportError("no module x"), OSError(5, "Input/output error")])
def test_anything_else_is_a_bug(error):
    assert not lack(error)[0]


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        pytest.param(
            "ulimit -v 3400000; $LSAG train --device cpu --out nowhere",
            "memory to 3.2 GiB (ulimit -v)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses"),
        ),
        ("cd $(mktemp -d) && rmdir $PWD && $LSAG flops", "the current folder has been deleted"),
    ],
)
def test_a_shell_without_memory_or_a_folder_is_told_so(tmp_path, shell, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LSAG": f"{sys.executable} -m lsag_cli"}
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert_refused(done, 4, words)


@pytest.mark.slow
def test_presets_and_pages_travel_in_the_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("lsag-*.whl")
    subprocess.run(
        [*pip, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True, capture_output=True
    )
    assert len(list(tmp_path.glob("site/lsag/report_files/*.html"))) == 3
    done = subprocess.run(
        [sys.executable, "-m", "lsag_cli", "flops", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert {item["name"] for item in json.loads(done.stdout)["presets"]} == set(preset_names()), done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import lsag; print(lsag.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(tmp_path)), "the installed copy was not the one that ran"


def test_no_library_can_take_a_signal_for_a_failure_of_its_own(monkeypatch, capsys):
    """torch's exporter takes any Exception, and goes on."""
    import contextlib

    import typer

    from lsag_cli import app as module

    def go_on(*args, **kwargs):
        with contextlib.suppress(Exception):
            module.terminate(15, None)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(typer.main, "get_command", lambda app: type("Command", (), {"main": go_on}))
    monkeypatch.setattr(module, "leave", leave)
    with pytest.raises(SystemExit) as left:
        module.run()
    assert left.value.code == 143
    assert capsys.readouterr().err == "lsag: error: stopped by SIGTERM\n"
