"""Going on with a run, and what is refused; real processes that are killed are in tests/faults/."""

import json
import logging
import os
import shutil
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import torch

from lsag import LSAG, load_checkpoint, load_preset
from lsag.data.loading import EpochBatches, batches, train_loader
from lsag.data.splits import open_split
from lsag.errors import CheckError, InputError, OutputError, UnreachableError, UsageError
from lsag.training.events import Epoch, Finished
from tests.conftest import (
    TINY,
    assert_equal,
    assert_refused,
    changed,
    images,
    losses,
    newest,
    run,
    stop_after,
    table,
    weights,
)
from tests.layouts import LAYOUTS, as_table


@pytest.fixture(scope="module")
def preset(tiny_preset):
    changes = {"train.epochs": 2, "augment.cutmix": 1.0, "augment.mixup": 0.8, "model.drop_path": 0.2}
    return changed(tiny_preset, changes)


@pytest.fixture(scope="module")
def whole(preset, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(preset, folder)
    return folder


@pytest.fixture(scope="module")
def stopped_once(preset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(preset, folder, 5)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The folder of a run that was killed in its first epoch."""
    return shutil.copytree(stopped_once, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "ema"),
    [
        pytest.param({}, 0.0, marks=pytest.mark.slow),
        ({"accum": 4}, 0.9),
        ({"workers": 2}, 0.0),  # whose random draws are not this process's
        pytest.param({"precision": "fp16"}, 0.9, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, 0.0, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16", "recompute": "all"}, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, preset, options, ema):
    preset = changed(preset, {"train.ema_decay": ema})
    run(preset, tmp_path / "whole", **options)
    stop_after(preset, tmp_path / "parts", 22, **options)
    events = run(preset, tmp_path / "parts", resume=True, **options)
    assert events[0].first_step >= 22 and "resumed after step" in events[0].notes[0]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    again = run(preset, tmp_path / "parts", resume=True, **options)
    assert isinstance(again[-1], Finished) and again[-1].best_top1 == events[-1].best_top1 and len(again) == 2
    assert "is already finished (epoch 2 of 2): nothing is left to train" in again[0].notes[0]


@pytest.mark.parametrize(
    "changes", [{"data.shuffle": "shards:3", "train.class_weights": "inverse"}, {"data.balance": 0.5}]
)
def test_a_resumed_run_draws_the_images_that_were_left(tmp_path, preset, monkeypatch, changes):
    monkeypatch.setattr("lsag.data.arrays.ArraySource.shards", np.arange(1437, dtype=np.int32) // 90)
    preset = changed(preset, {**changes, "train.epochs": 1})
    run(preset, tmp_path / "whole")
    stop_after(preset, tmp_path / "parts", 9)
    run(preset, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_a_resumed_run_keeps_the_statistics_of_batch_norm(tmp_path, preset):
    changes = {"shifts": ((0, 0),), "local": "cvt", "patch_stride": 2, "patch_kernel": 4, "patch_padding": 1}
    preset = preset.model_copy(update={"model": preset.model.model_copy(update=changes)})
    run(preset, tmp_path / "whole")
    stop_after(preset, tmp_path / "two", 9)
    run(preset, tmp_path / "two", resume=True)
    whole = weights(tmp_path / "whole")
    assert_equal(whole, weights(tmp_path / "two"))
    assert whole["stages.0.blocks.0.attn.convs.0.1.num_batches_tracked"] == len(losses(tmp_path / "whole"))


def test_resuming_depends_on_no_global_random_state(tmp_path, preset, whole):
    stop_after(preset, tmp_path / "parts", 5)
    import random

    import numpy as np

    for poison in (random.seed, np.random.seed, torch.manual_seed):
        poison(12345)
    run(preset, tmp_path / "parts", resume=True)
    assert_equal(weights(whole), weights(tmp_path / "parts"))


def test_checkpoints_hold_the_moving_average(tmp_path, preset):
    preset = changed(preset, {"train.ema_decay": 0.9, "train.epochs": 1})
    run(preset, tmp_path / "run")
    saved = load_checkpoint(newest(tmp_path / "run"))
    raw, average = saved.training["weights"], saved.model.state_dict()
    assert any(not torch.equal(raw[key], average[key]) for key in raw)
    assert saved.training["ema_updates"] == 22
    assert_equal(average, load_checkpoint(tmp_path / "run/best.pt").model.state_dict())
    assert load_checkpoint(tmp_path / "run/best.pt").training is None


def test_a_run_that_skips_broken_images_is_resumed_to_the_same_bits(preset, folder):
    small = changed(preset, {"data.dataset": "folder", "train.batch_size": 4})
    for name in ("cat/1.png", "dog/2.png"):
        (folder / "train" / name).write_bytes(b"broken")
    run(small, folder / "whole", skip_broken=True)
    stop_after(small, folder / "run", 2, skip_broken=True)
    run(small, folder / "run", skip_broken=True, resume=True)
    assert_equal(weights(folder / "run"), weights(folder / "whole"))
    listed = (folder / "whole/broken.txt").read_text()
    assert [line.partition(": ")[0][-9:] for line in listed.splitlines()] == ["cat/1.png", "dog/2.png"]
    assert listed == (folder / "run/broken.txt").read_text()
    for path in (folder / "train/cat").glob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="no training image of cat can be read"):
        run(small, folder / "other", skip_broken=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_resumed_to_the_same_bits_from_every_layout(preset, folder, monkeypatch, layout):
    pytest.importorskip("datasets" if layout == "parquet" else "PIL")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("lsag.data.sources.PACK_BYTES", 0)  # images are read by the workers, when they are needed
    small = changed(preset, {"data.dataset": "folder", "train.batch_size": 4})
    run(small, folder / "plain")
    small = changed(small, {"data.dataset": LAYOUTS[layout](folder, folder)})
    stop_after(small, folder / "run", 2, workers=2)
    run(small, folder / "run", resume=True)
    assert_equal(weights(folder / "run"), weights(folder / "plain"))


def test_a_lost_connection_saves_what_is_done_and_breaks_no_image(preset, folder, monkeypatch):
    as_table(folder, folder)
    memory = fsspec.filesystem("memory")
    for path in [*folder.rglob("*.png"), folder / "images.csv"]:
        memory.pipe_file(f"/lost/{path.relative_to(folder)}", path.read_bytes())
    small = changed(preset, {"data.dataset": "list:memory://lost/images.csv", "train.batch_size": 4})
    run(small, folder / "whole")
    read, left = type(memory).cat_file, 20

    def dying(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionResetError("Connection reset by peer")
        return read(*arguments, **options)

    monkeypatch.setattr("lsag.data.storage.WAITS", (0.0,))
    with monkeypatch.context() as lost:
        lost.setattr(type(memory), "cat_file", dying)
        with pytest.raises(UnreachableError, match=r"cannot reach memory://lost/.*png: Connection reset by peer"):
            run(small, folder / "run", skip_broken=True)
    assert losses(folder / "run") and not (folder / "run/broken.txt").exists()
    assert newest(folder / "run").name == f"step-{len(losses(folder / 'run')):010}.pt"
    run(small, folder / "run", resume=True)
    assert_equal(weights(folder / "run"), weights(folder / "whole"))
    memory.rm("/lost", recursive=True)


def test_broken_images_are_listed_also_when_the_training_is_stopped(lsag, folder):
    (folder / "train/dog/2.png").write_bytes(b"broken")
    options = ["--dataset", "folder", "--data-dir", folder, "--set", "train.batch_size=4", "--skip-broken"]
    done = lsag(
        "train", *TINY, *options, "--device", "cpu", "--out", "run", env={"LSAG_FAILPOINT": "after_forward:2:term"}
    )
    assert done.returncode == 143, done.stderr
    assert (folder / "run/broken.txt").read_text().startswith(f"{folder}/train/dog/2.png: ")


def test_eight_ranks_see_what_one_that_accumulates_sees(preset, tmp_path):
    source = open_split("digits", tmp_path, train=True, mode="L")

    def slices(rank, size, accum):
        order = EpochBatches(len(source), preset, rank=rank, size=size, accum=accum)
        order.epoch, order.first_step = 3, 5
        read = list(batches(train_loader(source, preset, order, workers=0)))
        assert len(read) == (order.num_steps - 5) * accum
        return [read[i : i + accum] for i in range(0, len(read), accum)]

    alone = slices(0, 1, 8)
    for size, accum in ((8, 1), (4, 2), (2, 4)):
        ranks = [slices(rank, size, accum) for rank in range(size)]
        for step, expected in enumerate(alone):
            together = [item for rank in ranks for item in rank[step]]
            for (a, b), (c, d) in zip(together, expected, strict=True):
                assert torch.equal(a, c) and torch.equal(b, d)


def test_a_batch_that_cannot_be_cut_names_the_nearest(preset):
    assert preset.slice_size(8) == 8
    with pytest.raises(UsageError, match=r"64 cannot be cut into 3 equal slices.*batch_size=60 or 66"):
        preset.slice_size(3)
    with pytest.raises(UsageError, match=r"of even size, as mixup and cutmix need.*batch_size=128,"):
        preset.slice_size(64)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, preset, whole, caplog):
    stop_after(preset, tmp_path / "run", 30)
    checkpoint = newest(tmp_path / "run")
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        events = run(preset, tmp_path / "run", resume=True)
    assert len(caplog.messages) == 1 and "truncated or damaged" in caplog.messages[0]
    assert checkpoint.with_suffix(".pt.corrupt").read_bytes() == data
    assert f"step-{events[0].first_step:010d}.pt" != checkpoint.name
    assert_equal(weights(whole), weights(tmp_path / "run"))
    for path in (tmp_path / "run").glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="none of the 3 checkpoints"):
        run(preset, tmp_path / "run", resume=True)


def test_a_checkpoint_of_the_future_is_not_called_damaged(preset, stopped):
    checkpoint = newest(stopped)
    torch.save({**torch.load(checkpoint), "format": 2}, checkpoint)
    with pytest.raises(InputError, match=r"format 2, this lsag reads 1 — upgrade lsag"):
        run(preset, stopped, resume=True)
    assert checkpoint.exists()


def test_a_run_from_before_a_setting_existed_keeps_what_it_did(preset, stopped):
    """It scaled all learning rates."""
    file = newest(stopped)
    contents = torch.load(file)
    for train in (contents["preset"]["train"], listed := json.loads((stopped / "preset.json").read_text())["train"]):
        del train["lr_scaling"]
    torch.save(contents, file)
    old = load_preset(preset, {"train": listed})
    assert old.train.learning_rates == (1e-6 / 8, 8e-3 / 8, 1e-5 / 8)
    with pytest.raises(UsageError, match=r"another train.lr_scaling — .*--allow-change train.lr_scaling"):
        run(preset, stopped, resume=True)
    assert run(old, stopped, resume=True)[-1].epochs == 2


def test_torn_logs_are_repaired(tmp_path, preset, whole):
    stop_after(preset, tmp_path / "run", 30)
    with (tmp_path / "run/steps.jsonl").open("a") as log:
        log.write('{"step": 9999, "loss": 1.0}\n{"step": 10000, "lo')
    run(preset, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_resumed_run_has_the_table_of_its_log(preset, whole, stopped):
    """Both lose the epochs that were not saved before the run was killed in its first one."""
    assert table(whole) == [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name in ("metrics.jsonl", "results.csv"):
        shutil.copy(whole / name, stopped)
    (stopped / ".results.csv.abc").touch()
    stop_after(preset, stopped, 6, resume=True)
    assert table(stopped) == [] and not (stopped / "metrics.jsonl").read_text()
    assert not (stopped / ".results.csv.abc").exists()


def test_a_run_that_moves_to_another_device_says_so(whole, stopped):
    contents = torch.load(newest(stopped))
    assert contents["training"]["numerics"]["device"] == "cpu"
    contents["training"]["numerics"]["device"] = "cuda"
    torch.save(contents, newest(stopped))
    notes = run(load_preset(stopped / "preset.json"), stopped, resume=True)[0].notes
    assert "device changed from cuda to cpu: results may differ in rounding" in notes
    assert losses(whole) == losses(stopped)


def test_resuming_with_other_settings_is_refused(tmp_path, preset, stopped):
    with pytest.raises(OutputError, match=r"holds a run — resume it with --resume"):
        run(preset, stopped)
    slower = changed(preset, {"train.lr": 1e-3, "train.weight_decay": 0.1})
    with pytest.raises(UsageError, match=r"another train.lr, train.weight_decay — .*--allow-change train.lr"):
        run(slower, stopped, resume=True)
    with pytest.raises(UsageError, match=r"another model.drop_path — resume with the original settings$"):
        run(changed(preset, {"model.drop_path": 0.3}), stopped, resume=True)
    for key, value in {"data.balance": 0.5, "train.class_weights": "inverse"}.items():
        with pytest.raises(UsageError, match=f"another {key} — .*--allow-change {key}"):
            run(changed(preset, {key: value}), stopped, resume=True)
    with pytest.raises(UsageError, match="lies outside its epoch"):
        stop_after(preset, tmp_path / "late", 25)
        smaller = changed(preset, {"train.batch_size": 32})
        run(smaller, tmp_path / "late", resume=True, allow_change=["train.batch_size"])
    with pytest.raises(UsageError, match=r"--allow-change train.lrr: no such setting"):
        run(slower, stopped, resume=True, allow_change=["train.lrr"])
    events = run(slower, stopped, resume=True, allow_change=["train.lr", "train.weight_decay"])
    assert isinstance(events[-1], Finished)


def test_a_run_from_before_a_setting_existed_is_resumed(whole, stopped):
    new = {"data": ("shuffle", "balance"), "train": ("class_weights",)}
    contents, written = torch.load(newest(stopped)), json.loads((stopped / "preset.json").read_text())
    for section, names in new.items():
        for name in names:
            del contents["preset"][section][name], written[section][name]
    torch.save(contents, newest(stopped))
    (stopped / "preset.json").write_text(json.dumps(written))
    run(load_preset(stopped / "preset.json"), stopped, resume=True)
    assert losses(whole) == losses(stopped)
    assert_equal(weights(whole), weights(stopped))


def test_resuming_on_other_images_is_refused(preset, stopped, monkeypatch):
    import lsag.data.arrays

    monkeypatch.setattr(lsag.data.arrays.ArraySource, "fingerprint", lambda self: "other")
    with pytest.raises(UsageError, match="run on other images"):
        run(preset, stopped, resume=True)
    run(preset, stopped, resume=True, allow_change=["data"])


def test_what_a_run_leaves_before_its_first_checkpoint_is_no_obstacle(tmp_path, preset):
    (tmp_path / "run").mkdir()
    for name in ("preset.json", "steps.jsonl", ".lock", ".step-0000000000.pt.abc"):
        (tmp_path / "run" / name).write_text("{}\n")
    run(changed(preset, {"train.epochs": 1}), tmp_path / "run")
    assert not (tmp_path / "run/.step-0000000000.pt.abc").exists() and len(losses(tmp_path / "run")) == 22


def test_steps_that_are_not_finite_are_skipped(tmp_path, preset, monkeypatch):
    import lsag.training.step as module

    bad = iter([False] * 4 + [True] * 3 + [False] * 10_000)
    monkeypatch.setattr(module, "failpoint", lambda name: name == "after_forward" and next(bad))
    epochs = [event for event in run(preset, tmp_path / "run") if isinstance(event, Epoch)]
    assert [index for index, loss in enumerate(losses(tmp_path / "run")) if loss is None] == [4, 5, 6]
    assert epochs[0].skipped_steps == 3
    assert epochs[0].train_loss == pytest.approx(sum(filter(None, losses(tmp_path / "run")[:22])) / 19)
    bad = iter([False] * 4 + [True] * 10_000)
    with pytest.raises(CheckError, match=r"in 10 steps in a row.*step-0000000000.pt is the last good checkpoint"):
        run(preset, tmp_path / "lost")


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_keeps_its_names(tmp_path, preset):
    preset = changed(preset, {"train.epochs": 1, "model.stages": [{"embed_dim": 8, "depth": 2, "num_heads": 2}]})
    run(preset, tmp_path / "plain")
    run(preset, tmp_path / "compiled", compile=True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()


def test_fine_tuning(tmp_path, preset):
    """Other size and other classes: positions are resized, the head is new, everything else is the checkpoint's."""
    run(changed(preset, {"train.epochs": 1}), tmp_path / "first")
    start = tmp_path / "first/best.pt"
    larger = changed(preset, {"model.image_size": 12, "train.epochs": 1})
    events = run(larger, tmp_path / "larger", init_from=start, reset_head=True)
    assert events[0].notes == (
        f"weights from {start}",
        "a new head for 10 classes",
        "embed.pos resized from 8 x 8 to 12 x 12 patches",
        "stages.1.pos resized from 4 x 4 to 6 x 6 patches",
    )
    begun = load_checkpoint(start).model.state_dict()
    before = load_checkpoint(tmp_path / "larger/step-0000000000.pt").model.state_dict()
    for key, value in before.items():
        assert torch.equal(value, begun[key]) == (not key.endswith("pos") and not key.startswith("head.")), key
    old = begun["embed.pos"].unflatten(0, (8, 8))
    assert torch.allclose(before["embed.pos"].unflatten(0, (12, 12)).mean(dim=(0, 1)), old.mean(dim=(0, 1)), atol=2e-3)
    with pytest.raises(InputError, match="which is another network"):
        other = load_preset("digits-nano")
        run(other, tmp_path / "wrong", init_from=start)


def test_recomputation_gives_the_same_gradients(preset):
    model = LSAG(preset.model).train()
    batch = images(4, preset.model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(batch).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_equal(*gradients)


RANKS = """
import os, sys
import torch, torch.distributed as dist
from lsag import load_preset
from lsag.checkpoint import random_checkpoint
from lsag.data.loading import eval_loader
from lsag.data.splits import open_split
from lsag.distributed.world import World
from lsag.inference.classifier import Classifier
from lsag.inference.evaluate import evaluate

torch.set_num_threads(1)
preset = load_preset("digits-nano")
source = open_split("digits", None, train=False, mode="L")
for size in (1, 2, 3, 4):
    for rank in range(size):
        if os.fork() == 0:
            if size > 1:
                dist.init_process_group("gloo", store=dist.FileStore(f"store-{size}", size), rank=rank, world_size=size)
            checkpoint = random_checkpoint(preset)
            heard = []
            loader = eval_loader(source, preset, batch_size=50, workers=0, rank=rank, size=size)
            metrics = evaluate(
                Classifier(checkpoint, precision=sys.argv[1]), loader, count=len(source), batch_size=50, num_classes=10,
                world=World(rank, size), on_batch=heard.append,
            )
            line = f"{metrics.count} {metrics.loss.hex()} {metrics.top1} {metrics.top5} {metrics.confusion.tolist()}"
            images = [part.tolist() for part in (metrics.predictions, metrics.confidences, metrics.losses)]
            open(f"rank-{size}-{rank}", "w").write(f"{line} {images}|{len(heard)}")
            os._exit(0)
    for rank in range(size):
        assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_ranks_evaluates_alike(tmp_path, precision):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-c", RANKS, precision], cwd=tmp_path, env=environment, check=True, timeout=120)
    results = {path.name: path.read_text().split("|") for path in tmp_path.glob("rank-*")}
    assert len(results) == 10 and len({figures for figures, _ in results.values()}) == 1
    assert results["rank-1-0"][0].startswith("360 ")
    assert {name[5]: calls for name, (_, calls) in results.items()} == {"1": "8", "2": "4", "3": "3", "4": "2"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--resume"], 3, ["no run to resume in ./runs"]),
        (["--resume", "nowhere"], 3, ["no run to resume in nowhere", "no such folder"]),
        (["runs/x"], 2, ["unexpected argument runs/x", "--resume RUN"]),
        (["--procs", "2"], 2, ["--procs is for the CPU"]),
        (["--procs", "3", "--device", "cpu"], 2, ["64 cannot be cut into 3", "60 or 66"]),
        (["--gpus", "many"], 2, ["not a number of GPUs"]),
        (["--gpus", "0,99"], 4, ["asked for GPUs 0,99, found"]),
        (["--nodes", "2", "--device", "cpu"], 2, ["--nodes, --rdzv-endpoint and --out"]),
        (["--rdzv-endpoint", "localhost:1", "--out", "x"], 2, ["--nodes, --rdzv-endpoint and --out"]),
        (["--reset-head"], 2, ["--init-from"]),
        (["--allow-change", "train.lr"], 2, ["--resume"]),
        (["--probe"], 2, ["--dry-run"]),
        (["--init-from", "absent.pt"], 3, ["absent.pt"]),
        (["--accum", "5"], 2, ["cannot be cut into 5"]),
    ],
)
def test_wrong_uses_of_train_are_refused(lsag, arguments, code, words):
    assert_refused(lsag("train", *arguments), code, *words)


def test_a_launcher_inside_a_launched_rank_is_refused(lsag):
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    asked = ["train", "--device", "cpu", "--procs", "4"]
    assert_refused(lsag(*asked, env=world), 2, "this is one of 2 processes, 1 of them here", "remove --gpus, --procs")


def test_half_an_environment_is_refused(lsag):
    assert_refused(lsag("train", env={"RANK": "0", "MASTER_ADDR": "x"}), 2, "has RANK, but not WORLD_SIZE, LOCAL_RANK")
    done = lsag("train", env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert_refused(done, 2, "MASTER_ADDR, MASTER_PORT", "docs/cluster.md")


def test_the_plan_with_a_probe(lsag):
    done = lsag("train", "--dry-run", "--probe", "--device", "cpu", "--accum", "2")
    assert done.returncode == 0, done.stderr
    assert "64 = 1 device x 2 slices x 32 images" in done.stdout
    assert "measured on one device" in done.stdout and "GiB at its peak" in done.stdout
    plan = json.loads(lsag("train", "--dry-run", "--probe", "--device", "cpu", "--json").stdout)
    assert plan["training_seconds"] == pytest.approx(plan["steps"] * plan["step_seconds"])


NAN = float("nan")


def not_finite(weights):
    return {name: torch.full_like(weight, NAN) for name, weight in weights.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["training"].update(epoch=NAN),
        lambda c: c["training"].update(epoch=-1),
        lambda c: c["training"].update(best_top1="a"),
        lambda c: c["training"].update(loss_sum=None),
        lambda c: c["training"].update(numerics=[1, 2]),
        lambda c: c["training"].update(scaler={"scale": NAN}),
        lambda c: c["training"].update(weights={}),
        lambda c: c["training"].update(weights=not_finite(c["model"])),
        lambda c: c["training"].update(optimizer={}),
        lambda c: c["training"]["optimizer"][0].update(step=3),
        lambda c: c["training"]["optimizer"][0].update(step=torch.tensor(NAN)),
        lambda c: c["training"]["optimizer"][0].update(step=torch.tensor(0.0)),
        lambda c: c["training"]["optimizer"][0]["exp_avg"].fill_(NAN),
        lambda c: c["training"]["optimizer"][0]["exp_avg_sq"].fill_(-1),
        lambda c: c["training"]["optimizer"][0].pop("exp_avg_sq"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(preset, stopped, change):
    contents = torch.load(newest(stopped))
    change(contents)
    torch.save(contents, newest(stopped))
    with pytest.raises(InputError, match="cannot be resumed"):
        run(preset, stopped, resume=True)


def test_a_step_of_another_kind_is_passed_over(preset, stopped, caplog):
    contents = torch.load(newest(stopped))
    contents["training"]["step"] = torch.zeros(3)
    torch.save(contents, newest(stopped))
    run(preset, stopped, resume=True)
    assert "holds another step than its name says" in caplog.text


def test_a_checkpoint_under_another_s_name_is_passed_over(preset, stopped, caplog):
    min(stopped.glob("step-*.pt")).rename(stopped / "step-0000009999.pt")
    events = run(preset, stopped, resume=True)
    assert "holds another step than its name says" in caplog.text and events[0].first_step < 100


def test_logs_that_are_no_files_are_refused(preset, stopped):
    (stopped / "metrics.jsonl").unlink()
    os.mkfifo(stopped / "metrics.jsonl")
    with pytest.raises(OutputError, match="not a regular file"):
        run(preset, stopped, resume=True)


def test_logs_that_cannot_be_read_are_started_afresh(preset, whole, stopped, caplog):
    deep = b"[" * 100_000
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0]) | {"epoch": 0, "top1": "abc"}
    (stopped / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": 3}\n' + deep + b"\n" + json.dumps(row).encode() + b"\n"
    )
    steps = (stopped / "steps.jsonl").read_bytes()
    bad = json.dumps(json.loads(steps.splitlines()[0]) | {"loss": "abc"}).encode()
    (stopped / "steps.jsonl").write_bytes(b'\x00\x00\n{"step": "a"}\n{"epoch": 1}\n' + deep + b"\n" + bad + b"\n")
    run(preset, stopped, resume=True)
    for name in ("metrics", "steps"):
        assert f"5 damaged rows of {stopped / name}.jsonl were removed" in caplog.text
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(losses(stopped)) > 20


def test_nonsense_in_the_environment_is_refused(lsag):
    assert_refused(lsag("train", env={"SLURM_STEP_NUM_TASKS": "x"}), 2, "SLURM_STEP_NUM_TASKS")
    assert_refused(lsag("train", env={"LSAG_FAILPOINT": "garbage"}), 2, "name:count:kind")
    assert_refused(lsag("train", "--gpus", "9" * 30), 4, "found")
    assert_refused(lsag("train", "--gpus", "x", env={"LSAG_LAUNCHER": "1"}), 2, "not a number of GPUs")
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    inherited = {"LSAG_LAUNCHER": "1", "LSAG_LAUNCH_FOLDER": "/tmp"}
    assert_refused(lsag("train", env=world | inherited), 7, "unset LSAG_LAUNCHER")


@pytest.mark.slow
def test_ranks_train_into_any_folder_and_from_any_folder(tmp_path):
    """The launcher makes a folder named after the run, torch replaces $-names, and Python likes to import queue.py."""
    for name in ("queue", "random", "timm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    out = tmp_path / ("deep" * 30) / ("$$${local_rank}" * 9)
    start = "import sys; sys.path.pop(0); from lsag_cli.__main__ import main; main()"  # as the script of a wheel does
    train = ["train", *TINY, "--device", "cpu", "--procs", "2", "--workers", "0", "--out", out]
    subprocess.run([sys.executable, "-c", start, *train], cwd=tmp_path, check=True)
    assert (out / "best.pt").is_file()


@pytest.mark.slow
def test_ranks_skip_the_same_broken_images(lsag, folder):
    (folder / "train/dog/2.png").write_bytes(b"broken")
    options = ["--dataset", "folder", "--data-dir", folder, "--set", "train.batch_size=4", "--skip-broken"]
    for out, ranks in (("one", ["--accum", "2"]), ("two", ["--procs", "2"])):
        done = lsag("train", *TINY, *options, "--device", "cpu", *ranks, "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("broken training images that others replaced: 1") == 1
    assert (folder / "one/broken.txt").read_text() == (folder / "two/broken.txt").read_text()
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)
