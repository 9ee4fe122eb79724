import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lsag import LSAG, load_checkpoint, load_preset
from lsag.data.arrays import ArraySource
from lsag.data.splits import open_split
from lsag.distributed.world import World
from lsag.errors import (
    CheckError,
    InputError,
    InterruptedByUserError,
    OutputError,
    UnavailableError,
    UsageError,
    WorkerError,
)
from lsag.inference.evaluate import evaluate_file
from lsag.training.begin import data_parallel
from lsag.training.data import class_weights
from lsag.training.events import Epoch, Started, Step
from lsag.training.loop import train
from lsag.training.options import TrainOptions
from lsag.training.step import TrainStep, make_mixup
from tests.conftest import ABLATIONS, changed, losses, newest, run, small_config, table


@pytest.fixture
def two_epochs(tiny_preset):
    return tiny_preset.model_copy(update={"train": tiny_preset.train.model_copy(update={"epochs": 2})})


def test_a_run_leaves_what_it_promises(tmp_path, two_epochs):
    events = run(two_epochs, tmp_path / "run")
    assert isinstance(events[0], Started) and events[0].steps_per_epoch == 1437 // 64
    epochs = [event for event in events if isinstance(event, Epoch)]
    assert any(isinstance(event, Step) for event in events)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "best.pt",
        "curves.png",
        "metrics.jsonl",
        "options.json",
        "preset.json",
        "results.csv",
        "step-0000000000.pt",
        "step-0000000044.pt",
        "steps.jsonl",
    ]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] == [event.epoch for event in epochs]
    assert table(tmp_path / "run") == rows
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["step"] == 2 * (1437 // 64)
    assert load_preset(tmp_path / "run/preset.json") == two_epochs
    with Image.open(tmp_path / "run/curves.png") as image:
        assert image.size == (1200, 480) and len(np.unique(np.asarray(image))) > 10
    steps = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 45))
    assert rows[1]["train_loss"] == pytest.approx(np.mean([row["loss"] for row in steps[22:]]))
    last = load_checkpoint(newest(tmp_path / "run"))
    assert last.epoch == 2 and last.metrics["top1"] == rows[1]["top1"]
    # The checkpoint alone gives back the figures of the run.
    again = evaluate_file(newest(tmp_path / "run"), data_dir=tmp_path, device="cpu")
    assert again.metrics.top1 == rows[1]["top1"] and again.metrics.loss == pytest.approx(rows[1]["eval_loss"], rel=1e-5)


def test_a_table_that_cannot_be_written_stops_nothing(tmp_path, two_epochs, caplog):
    going = train(two_epochs, TrainOptions(data_dir=tmp_path, out=tmp_path / "run", device="cpu", precision="fp32"))
    next(going)
    (tmp_path / "run/results.csv").unlink()
    (tmp_path / "run/results.csv").mkdir()
    assert list(going)[-1].epochs == 2
    assert caplog.text.count("results.csv") == 1 and len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, tmp_path, tiny_preset, native, precision):
    monkeypatch.setattr("lsag.device.multiplies_bf16", lambda: native)
    started = run(tiny_preset, tmp_path / "run", precision="auto")[0]
    (note,) = started.notes
    assert note.startswith(f"precision {precision}: this processor {'' if native else 'does not '}multipl")
    assert load_checkpoint(newest(tmp_path / "run")).training["numerics"]["precision"] == precision


def test_timm_s_networks_are_trained_in_fp32_on_a_cpu(monkeypatch, tmp_path, tiny_preset):
    monkeypatch.setattr("lsag.device.multiplies_bf16", lambda: True)
    preset = load_preset(
        "digits-nano",
        {"train.epochs": 1, "train.warmup_epochs": 0, "model.drop_path": 0.0},
        timm="test_vit,patch_size=2",
    )
    started = run(preset, tmp_path / "run", precision="auto")[0]
    assert started.notes == ("precision fp32: bf16 on a CPU is for LSAG",)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_evaluated_in_the_precision_of_the_run(tmp_path, tiny_preset, precision):
    run(tiny_preset, tmp_path / "run", precision=precision)
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    loss = {
        each: evaluate_file(tmp_path / "run/best.pt", data_dir=tmp_path, device="cpu", precision=each).metrics.loss
        for each in ("fp32", "bf16")
    }
    assert loss["fp32"] != loss["bf16"] == pytest.approx(loss["fp32"], rel=0.01)
    assert row["eval_loss"] == pytest.approx(loss[precision], rel=1e-6)


def test_the_best_epoch_is_kept(tmp_path, two_epochs, monkeypatch):
    import lsag.training.loop as module

    real, scores = module.evaluate, iter([0.9, 0.3])

    def scored(*args, **kwargs):
        from dataclasses import replace

        return replace(real(*args, **kwargs), top1=next(scores))

    monkeypatch.setattr(module, "evaluate", scored)
    epochs = [event for event in run(two_epochs, tmp_path / "run") if isinstance(event, Epoch)]
    assert [event.best_top1 for event in epochs] == [0.9, 0.9]
    assert load_checkpoint(tmp_path / "run/best.pt").epoch == 1
    assert load_checkpoint(newest(tmp_path / "run")).epoch == 2


def test_equal_seeds_give_equal_weights(tmp_path, tiny_preset):
    preset = load_preset(_write(tmp_path, tiny_preset), {"augment.mixup": 0.8, "augment.cutmix": 1.0})
    for name, options in {"a": {}, "b": {"workers": 2}}.items():
        run(preset, tmp_path / name, **options)
    run(load_preset(_write(tmp_path, preset), {"train.seed": 1}), tmp_path / "c")
    a, b, c = (load_checkpoint(newest(tmp_path / name)).model.state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def _write(folder, preset):
    path = folder / "written.json"
    path.write_text(preset.model_dump_json())
    return path


# Losses of three epochs of a network that learns. A change that should not alter numbers leaves them equal.
GOLDEN = {
    "peak": ((2.27566, 2.20891), (2.15857, 1.96152), (1.99088, 1.85115)),
    "all": ((2.27568, 2.20906), (2.15923, 1.96517), (1.99382, 1.85596)),
}
if torch.__version__.startswith("2.11."):  # draws other initial weights
    GOLDEN = {
        "peak": ((2.28203, 2.21495), (2.16586, 1.98226), (2.00698, 1.86466)),
        "all": ((2.28205, 2.21470), (2.16589, 1.98240), (2.00914, 1.87360)),
    }


@pytest.mark.parametrize(
    ("scaling", "precision", "tolerance"), [("peak", "fp32", 2e-4), ("peak", "bf16", 2e-2), ("all", "fp32", 2e-4)]
)
def test_golden_losses(tmp_path, scaling, precision, tolerance):
    preset = load_preset(
        "digits-nano",
        {
            "model.stages": [{"embed_dim": 32, "depth": 2, "num_heads": 2, "num_kv_heads": 1}] * 2,
            "train.epochs": 3,
            "train.warmup_epochs": 1,
            "train.lr_scaling": scaling,
        },
    )
    epochs = [event for event in run(preset, tmp_path / "run", precision=precision) if isinstance(event, Epoch)]
    for epoch, expected in zip(epochs, GOLDEN[scaling], strict=True):
        assert (epoch.train_loss, epoch.eval_loss) == pytest.approx(expected, rel=tolerance)


def test_folders_bring_their_classes(tmp_path, tiny_preset):
    source = open_split("digits", tmp_path, train=True, mode="L")
    for index in range(300):
        image, label = source.load(index)
        if label < 3:
            for split in ("train", "val"):
                place = tmp_path / "data" / split / f"digit-{label}"
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{index}.png")
    preset = load_preset(_write(tmp_path, tiny_preset), {"train.batch_size": 32}, dataset="folder")
    list(train(preset, TrainOptions(data_dir=tmp_path / "data", out=tmp_path / "run", device="cpu")))
    checkpoint = load_checkpoint(tmp_path / "run/best.pt")
    assert checkpoint.classes == ("digit-0", "digit-1", "digit-2") and checkpoint.preset.model.num_classes == 3
    (tmp_path / "data/val/digit-1").rename(tmp_path / "data/val/digit-9")
    words = (
        "does not know 'digit-9' of the evaluation split, which lacks 'digit-1' — give both splits images of the same"
    )
    with pytest.raises(InputError, match=words):
        list(train(preset, TrainOptions(data_dir=tmp_path / "data", out=tmp_path / "again", device="cpu")))
    assert not (tmp_path / "again").exists()


def test_diverging_training_stops(tmp_path, tiny_preset):
    preset = load_preset(_write(tmp_path, tiny_preset), {"train.lr": 1e30, "train.clip_grad": 1e30})
    with pytest.raises(CheckError, match="diverged"):
        run(preset, tmp_path / "run")


def test_gradients_that_are_not_clipped_have_their_norm_logged(tmp_path, tiny_preset):
    for name, norm in {"off": 0, "far": 1e30, "near": 0.1}.items():
        run(load_preset(tiny_preset, {"train.clip_grad": norm}), tmp_path / name)
    off, far, near = ((tmp_path / name / "steps.jsonl").read_text() for name in ("off", "far", "near"))
    assert off == far != near
    assert all(json.loads(line)["grad_norm"] > 0.1 for line in off.splitlines())


def test_a_used_folder_and_an_absent_device_are_refused(tmp_path, tiny_preset):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("important")
    with pytest.raises(OutputError, match="used is not empty"):
        run(tiny_preset, tmp_path / "used")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write to|Not a directory"):
        run(tiny_preset, tmp_path / "file")
    with pytest.raises(UnavailableError, match="device 'tpu'"):
        list(train(tiny_preset, TrainOptions(data_dir=tmp_path, out=tmp_path / "x", device="tpu")))


def test_a_run_that_another_has_begun_meanwhile_is_not_continued(tmp_path, tiny_preset, monkeypatch):
    """Between the first look at the folder and its lock, the data are read, which takes minutes for ImageNet."""
    import lsag.training.loop as module

    real, begun = module.open_data, []

    def slowly(*arguments):
        if not begun:
            begun.append(1)
            run(tiny_preset, tmp_path / "run")
        return real(*arguments)

    monkeypatch.setattr(module, "open_data", slowly)
    with pytest.raises(OutputError, match="run holds a run"):
        run(tiny_preset, tmp_path / "run")


def test_one_process_trains_a_folder_once_at_a_time(tmp_path, tiny_preset):
    first = train(tiny_preset, TrainOptions(data_dir=tmp_path, out=tmp_path / "run", device="cpu"))
    next(first)
    with pytest.raises(OutputError, match="is in use by this process"):
        run(tiny_preset, tmp_path / "run", resume=True)
    assert len(list(first)) > 1
    run(tiny_preset, tmp_path / "run", resume=True)


def test_a_deterministic_training_leaves_torch_as_it_was(tmp_path, tiny_preset):
    def settings():
        filled = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, filled

    torch.backends.cudnn.benchmark = True
    training = train(
        tiny_preset, TrainOptions(data_dir=tmp_path, out=tmp_path / "run", device="cpu", deterministic=True)
    )
    next(training)
    assert settings() == (True, False, False)
    training.close()
    assert settings() == (False, True, True)
    torch.backends.cudnn.benchmark = False


def test_weights_that_break_in_the_last_step_are_not_saved(tmp_path, two_epochs, monkeypatch):
    import lsag.training.loop as module

    real, calls = module.evaluate, []

    def broken_second_time(*args, **kwargs):
        from dataclasses import replace

        calls.append(1)
        return replace(real(*args, **kwargs), loss=float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(module, "evaluate", broken_second_time)
    with pytest.raises(CheckError, match=r"evaluation after epoch 2.*step-0000000044.pt is the last good checkpoint"):
        run(two_epochs, tmp_path / "run", save_minutes=0)
    assert load_checkpoint(newest(tmp_path / "run")).epoch == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("classes", [9, 12])
def test_another_number_of_classes_than_the_data_has_is_refused(tmp_path, tiny_preset, classes):
    preset = load_preset(_write(tmp_path, tiny_preset), {"model.num_classes": classes})
    with pytest.raises(UsageError, match=f"digits has 10 classes, model.num_classes is {classes}"):
        run(preset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_names_the_file(tmp_path, tiny_preset, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot write .*preset.json: No space left"):
        run(tiny_preset, tmp_path / "run")


def test_a_dead_worker_is_named(tmp_path, tiny_preset, monkeypatch):
    import lsag.data.loading

    parent = os.getpid()

    def die(self, position):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(lsag.data.loading.TrainSet, "__getitem__", die)
    with pytest.raises(WorkerError, match="DataLoader worker"):
        run(tiny_preset, tmp_path / "run", workers=1)


def test_mixup_follows_the_preset():
    mix = make_mixup(load_preset("cifar-tiny"))
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mix.label_smoothing, mix.num_classes, mix.mode) == (0.1, 10, "batch")
    assert make_mixup(load_preset("cifar-tiny", {"augment.mixup": 0, "augment.cutmix": 0})) is None
    assert make_mixup(load_preset("cifar-tiny", {"augment.mixup_prob": 0})) is None


def test_the_loss_weighs_each_class_in_the_target():
    weights = torch.tensor([0.0, 0.5, 3.0, 1.0])
    logits, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 3] * 2)
    logs = logits.log_softmax(dim=1)
    for smoothing, mixup in ((0.0, 0), (0.1, 0), (0.1, 0.8)):
        changes = {"augment.label_smoothing": smoothing, "augment.mixup": mixup, "model.num_classes": 4}
        state = SimpleNamespace(preset=load_preset("cifar-nano", changes))
        step = TrainStep(state, range(1), *[None] * 3, class_weights=weights)
        targets = F.one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
        given = labels
        if mixup:
            _, given = step.mixup(torch.zeros(8, 1, 2, 2), labels)
            targets = given
        expected = torch.tensor([-sum(weights * targets[image] * logs[image]) for image in range(8)]).mean()
        torch.testing.assert_close(step.loss(logits, given), expected)
        halves = [step.loss(logits[part], given[part]) for part in (slice(4), slice(4, 8))]
        torch.testing.assert_close(sum(halves) / 2, expected)
        step.class_weights = None
        plain = F.cross_entropy(logits, given, label_smoothing=0.0 if mixup else smoothing)
        assert torch.equal(step.loss(logits, given), plain)


def test_classes_are_weighted_by_their_images_however_a_batch_is_cut(lsag, tmp_path, tiny_preset):
    source = open_split("digits", tmp_path, train=True, mode="L")
    assert class_weights(source)[source.labels].mean().item() == pytest.approx(1)
    few = ArraySource(np.zeros((4, 8, 8), dtype=np.uint8), [2, 0, 2, 2], ["a", "none", "c"], "L")
    assert class_weights(few).tolist() == pytest.approx([4 / 2, 0, 4 / (2 * 3)])
    for label, count in ((0, 24), (1, 6), (2, 2)):
        for index in np.flatnonzero(np.array(source.labels) == label)[:count]:
            for split in ("train", "val"):
                (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
                source.load(index)[0].save(tmp_path / split / str(label) / f"{index}.png")
    changes = {"augment.mixup": 0, "train.batch_size": 16, "train.class_weights": "inverse", "model.drop_path": 0.0}
    preset = load_preset(_write(tmp_path, tiny_preset), changes, dataset="folder")
    run(preset, tmp_path / "run")
    run(preset, tmp_path / "accumulated", accum=4)
    path = _write(tmp_path, preset)
    options = ["--preset", path, "--data-dir", tmp_path, "--precision", "fp32"]
    done = lsag("train", *options, "--procs", 2, "--device", "cpu", "--out", "ranks")
    assert done.returncode == 0, done.stderr
    for name in ("accumulated", "ranks"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    run(changed(preset, {"train.class_weights": "none"}), tmp_path / "plain")
    assert losses(tmp_path / "plain")[0] != pytest.approx(losses(tmp_path / "run")[0], rel=1e-3)


def test_the_warm_up_of_ddp_is_not_counted_by_batch_norm():
    """Else a continued run would not be the uninterrupted one."""
    model = LSAG(small_config(**ABLATIONS["ii"])).train()
    before = [buffer.clone() for buffer in model.buffers()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = data_parallel(model, torch.device("cpu"), torch.float32, shape=(2, 3, 12, 12))
        after = [buffer.clone() for buffer in model.buffers()]
        ddp(torch.randn(2, 3, 12, 12))
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(before, model.buffers(), strict=True))


def test_a_signal_after_the_ranks_have_agreed_to_stop_changes_nothing(tmp_path, tiny_preset, monkeypatch):
    total = World.total
    monkeypatch.setattr(World, "total", lambda self, **values: total(self, **values) | {"interrupt": 1.0})
    monkeypatch.setattr(
        "lsag.training.step.failpoint",
        lambda name: signal.raise_signal(signal.SIGTERM) if name == "after_opt" else None,
    )
    with pytest.raises(InterruptedByUserError, match="interrupted; step 1 is saved"):
        run(tiny_preset, tmp_path / "run")
