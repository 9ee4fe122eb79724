"""Fine-tuning: which rows of a head are kept, what is frozen, and one's own photographs in one command."""

import csv
import json
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lsag import LSAG, load_checkpoint, load_preset
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.errors import UsageError
from lsag.model.build import build_model, freeze
from lsag.presets import for_fine_tuning
from lsag.training.begin import data_parallel, initialise_from
from lsag.training.events import Epoch
from lsag.training.optim import make_optimizer
from lsag_cli.app import app
from lsag_cli.train import checkpoint_preset
from tests.conftest import ABLATIONS, assert_equal, assert_refused, changed, newest, run, small_config, stop_after

STAGES = "model.stages=[{embed_dim=8,depth=2,num_heads=2},{embed_dim=8,depth=1,num_heads=2}]"


@pytest.fixture
def preset():
    """A small network for colour images of three classes, as if trained for 20 epochs in batches of 128."""
    stages = [{"embed_dim": 8, "depth": 2, "num_heads": 2}, {"embed_dim": 8, "depth": 1, "num_heads": 2}]
    changes = {"model.stages": stages, "model.num_classes": 3, "train.epochs": 2, "train.warmup_epochs": 1}
    return load_preset("cifar-nano", changes, dataset="folder")


def save(path, preset, classes):
    """A checkpoint of random weights with these class names."""
    torch.manual_seed(1)
    checkpoint = random_checkpoint(preset.with_classes(len(classes)))
    with torch.no_grad():
        for weight in checkpoint.model.parameters():
            weight.normal_()
    save_checkpoint(path, replace(checkpoint, classes=tuple(classes)))
    return checkpoint.model.state_dict()


@pytest.fixture
def photos(tmp_path):
    """Eight images of each of three classes, without train/ and val/."""
    rng = np.random.default_rng(0)
    for name in ("bird", "cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("timm", [None, "test_vit,patch_size=4", "test_efficientnet"])
def test_rows_of_the_head_follow_the_names_of_their_classes(tmp_path, preset, timm):
    if timm:
        preset = load_preset(preset, {"model.drop_path": 0.0}, dataset="folder", timm=timm)
    old = save(tmp_path / "old.pt", preset, ("cat", "dog", "frog"))
    model = build_model(preset.model)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    notes = initialise_from(model, tmp_path / "old.pt", classes=("bird", "cat", "dog"))
    assert notes == ["head: rows of cat, dog kept, of bird new"]
    new, heads = model.state_dict(), []
    for key, value in new.items():
        if torch.equal(value, old[key]):
            continue
        assert torch.equal(value[1:], old[key][:2]) and torch.equal(value[0], fresh[key][0]), key
        heads.append(key)
    assert [key.rpartition(".")[2] for key in heads] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("classes", "reset_head", "note"),
    [
        (("cat", "dog", "frog"), False, None),
        (("frog", "dog", "cat"), False, "head: rows of frog, dog, cat kept"),
        (("frog", "cat"), False, "head: rows of frog, cat kept"),
        (("cat", "dog", "frog"), True, "a new head for 3 classes"),
        (("ant", "bee"), False, "a new head for 2 classes"),
        (("cat", *"abcdefg"), False, "head: rows of cat kept, of a, b, c, d, e and 2 more new"),
    ],
)
def test_any_classes_can_be_fine_tuned(tmp_path, preset, classes, reset_head, note):
    save(tmp_path / "old.pt", preset, ("cat", "dog", "frog"))
    model = build_model(preset.with_classes(len(classes)).model)
    notes = initialise_from(model, tmp_path / "old.pt", classes=classes, reset_head=reset_head)
    assert notes == ([note] if note else [])


def test_classes_without_names_are_taken_in_order_if_there_are_as_many(tmp_path, preset):
    save_checkpoint(tmp_path / "old.pt", random_checkpoint(preset))
    old, model = load_checkpoint(tmp_path / "old.pt").model.state_dict(), build_model(preset.model)
    (note,) = initialise_from(model, tmp_path / "old.pt", classes=("bird", "cat", "dog"))
    assert note == "head: kept, as the checkpoint has as many classes, without names"
    assert_equal(model.state_dict(), old)
    model = build_model(preset.with_classes(2).model)
    assert initialise_from(model, tmp_path / "old.pt", classes=("cat", "dog")) == ["a new head for 2 classes"]


def test_the_recipe_of_a_checkpoint_is_fitted_to_few_images():
    trained = load_preset("cifar-tiny")  # batches of 736 with mixup, a peak of 7.2e-4
    preset, notes = for_fine_tuning(trained, trained.train, given=(), num_images=1_000, num_slices=3)
    assert preset.train.batch_size == 96  # ten steps, cut into 3 slices of even size
    rates = preset.train.learning_rates
    assert rates == pytest.approx([rate / 10 for rate in trained.train.learning_rates])
    assert notes[0] == "epochs: 300, as the checkpoint was trained; change it with --epochs"
    assert notes[1] == "batches of 96 instead of 736, because there are 1,000 images"
    assert notes[2].startswith("peak learning rate 7.19e-05, a tenth of the checkpoint's")
    many, notes = for_fine_tuning(trained, trained.train, given=(), num_images=50_000, num_slices=1)
    assert many.train.batch_size == 736 and many.train.lr == pytest.approx(5e-5) and len(notes) == 2
    constant = load_preset("cifar-tiny", {"train.min_lr": 0.0})
    kept, _ = for_fine_tuning(constant, trained.train, given=("train.min_lr",), num_images=1_000, num_slices=1)
    assert kept.train.learning_rates == pytest.approx((1e-7, 5e-5 * 736 / 512, 0.0))
    mine = load_preset("cifar-tiny", {"train.lr": 1e-3, "train.batch_size": 64})
    given = ("train.lr", "train.batch_size", "train.epochs")
    assert for_fine_tuning(mine, trained.train, given=given, num_images=100, num_slices=1) == (mine, [])


def test_what_concerned_the_images_of_a_checkpoint_is_not_taken_over(tmp_path, preset):
    own = {"data.val_split": 0.2, "data.balance": 0.5, "train.freeze": 1, "train.patience": 3, "train.ema_decay": 0.9}
    for changes in (own, {"data.shuffle": "shards:4", "train.class_weights": "inverse"}):
        save(tmp_path / "old.pt", changed(preset, changes), ("cat", "dog", "frog"))
        assert checkpoint_preset(tmp_path / "old.pt") == preset


def test_a_short_training_has_a_short_warm_up(lsag, tmp_path):
    notes = []
    short = load_preset("cifar-tiny", {"train.epochs": 2}, notes=notes)
    assert short.train.warmup_epochs == 0.4
    assert notes == ["the warm-up takes 0.4 instead of 5 epochs"]
    assert load_preset("cifar-tiny", {"train.epochs": 5}).train.warmup_epochs == 1
    assert load_preset("cifar-tiny", {"train.epochs": 6}).train.warmup_epochs == 5
    with pytest.raises(UsageError, match="warmup_epochs 3 is more than epochs 2"):
        load_preset("cifar-tiny", {"train.epochs": 2, "train.warmup_epochs": 3})
    done = lsag("train", f"--set={STAGES}", "--epochs", 1, "--out", "run")
    assert done.returncode == 0 and "the warm-up takes 0.2 instead of 3 epochs" in done.stderr
    assert json.loads((tmp_path / "run/preset.json").read_text())["train"]["warmup_epochs"] == 0.2


def test_images_that_have_to_be_counted_are_downloaded(tmp_path, preset, monkeypatch):
    save(tmp_path / "best.pt", preset, ("cat", "dog", "frog"))
    asked = ["train", "--init-from", str(tmp_path / "best.pt"), "--dataset", "hf:someone/something", "--device", "cpu"]
    count = Mock(side_effect=UsageError("enough"))
    monkeypatch.setattr("lsag_cli.train.count_images", count)
    for options, expected in (([], True), (["--no-download"], False), (["--dry-run"], False)):
        CliRunner().invoke(app, [*asked, *options])
        assert count.call_args.kwargs == {"download": expected}


def test_photographs_of_ones_own_in_one_command(lsag, tmp_path, preset, photos):
    save(tmp_path / "best.pt", preset, ("cat", "dog", "frog"))
    asked = ["train", "--init-from", "best.pt", "--dataset", "folder", "--data-dir", "photos", "--val-split", "0.25"]
    plan = lsag(*asked, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "18 training, 6 evaluation" in plan.stdout and "2 epochs of 9 steps" in plan.stdout
    done = lsag(*asked, "--out", "run")
    assert done.returncode == 0, done.stderr
    for line in (
        "batches of 2 instead of 128, because there are 18 images",
        "peak learning rate 0.000125, a tenth of the checkpoint's; change it with --set train.lr",
        "weights from best.pt",
        "head: rows of cat, dog kept, of bird new",
    ):
        assert line in done.stderr.splitlines()
    held_out = []
    for file in ("run/best.pt", newest(tmp_path / "run")):
        done = lsag("eval", file, "--data-dir", photos, "--predictions", "images.csv", "--force", "--json")
        figures = json.loads(done.stdout)
        with (tmp_path / "images.csv").open() as rows:
            held_out.append([row["image"] for row in csv.DictReader(rows)])
        assert figures["images"] == 6 and {sum(row) for row in figures["confusion"]} == {2}
    assert held_out[0] == held_out[1]
    done = lsag("train", "--resume", "run")
    assert done.returncode == 0 and "run is already finished (epoch 2 of 2)" in done.stderr
    assert_refused(lsag(*asked, "--out", "other", "--freeze", "3"), 2, "train.freeze 3 is more than the 2 stages")
    assert_refused(lsag(*asked[:-2], "--out", "other"), 3, "no image folder in photos/", "--val-split 0.2")


@pytest.mark.parametrize(
    ("timm", "frozen"),
    [
        (None, ("embed", "stages.0")),
        ("test_resnet", ("conv1", "bn1", "layer1")),
        (
            "deit_tiny_patch16_224,patch_size=8,depth=2,embed_dim=24",
            ("patch_embed", "cls_token", "pos_embed", "blocks.0"),
        ),
    ],
)
def test_what_is_frozen_keeps_its_weights_and_statistics(preset, photos, timm, frozen):
    changes = {"train.freeze": 1, "train.batch_size": 6, "train.ema_decay": 0.5, "data.val_split": 0.25}
    preset = load_preset(preset, {**changes, "train.weight_decay": 0.5}, timm=timm)
    events = run(preset, photos / "run", accum=2)  # its data are in the folder above
    assert (
        events[0].notes[0] == f"train.freeze = 1 keeps {freeze(build_model(preset.model), 1):,} parameters as they are"
    )
    begun = load_checkpoint(photos / "run/step-0000000000.pt").model.state_dict()
    end = load_checkpoint(newest(photos / "run"))
    for key, value in end.training["weights"].items():
        assert torch.equal(value, begun[key]) == key.startswith(frozen), key
        assert torch.equal(end.model.state_dict()[key], begun[key]) == key.startswith(frozen), key


def test_frozen_stages_drop_no_paths(tmp_path, preset):
    from lsag.training.state import State

    preset = changed(preset, {"model.drop_path": 0.5, "train.freeze": 1})
    model = build_model(preset.model)
    freeze(model, 1)
    State(model, None, None, None, preset, (), "").train()
    assert not model.stages[0].training and not model.stages[0].blocks[1].drop_path.training
    assert model.training and model.stages[1].training and model.stages[1].blocks[0].drop_path.training


def test_ranks_train_a_frozen_model(tmp_path):
    """DDP wants gradients of the rest only."""
    model = LSAG(small_config(**ABLATIONS["ii"])).train()
    freeze(model, 3)  # all but norm and head
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = data_parallel(model, torch.device("cpu"), torch.float32, shape=(2, 3, 12, 12))
        ddp.zero_grad()
        ddp(torch.randn(2, 3, 12, 12)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_lower_layers_learn_more_slowly():
    model = LSAG(small_config())
    optimizer = make_optimizer(model, changed(load_preset("cifar-tiny"), {"train.layer_decay": 0.5}).train)
    names = {id(weight): name for name, weight in model.named_parameters()}
    scale = {names[id(w)]: group["lr_scale"] for group in optimizer.param_groups for w in group["params"]}
    decay = {names[id(w)]: group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}
    blocks = ["embed.conv", "stages.0.blocks.0.mlp.0", "stages.0.blocks.1.mlp.0", "stages.1.blocks.0.mlp.0"]
    assert [scale[f"{name}.weight"] for name in (*blocks, "head")] == [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1]
    assert scale.keys() == set(names.values())
    assert {name for name, value in decay.items() if value} == {
        name for name, weight in model.named_parameters() if weight.dim() > 1 and "pos" not in name
    }


def test_layers_learn_at_their_rates_and_resume_exactly(tmp_path, tiny_preset):
    preset = changed(tiny_preset, {"train.layer_decay": 0.1, "train.epochs": 2})
    run(preset, tmp_path / "whole")
    stop_after(preset, tmp_path / "parts", 22)
    run(preset, tmp_path / "parts", resume=True)
    begun, end, parts = (
        load_checkpoint(path).model.state_dict()
        for path in (tmp_path / "whole/step-0000000000.pt", newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    )
    assert_equal(end, parts)
    moved = [(end[key] - begun[key]).abs().max() for key in ("embed.conv.weight", "head.weight")]
    assert 0 < moved[0] < 1e-4 and moved[1] > 1e-2


@pytest.mark.parametrize(
    ("key", "value"), [("train.layer_decay", 0.5), ("train.freeze", 1), ("train.decay_positions", True)]
)
def test_what_orders_the_weights_cannot_change_in_a_run(tmp_path, tiny_preset, key, value):
    stop_after(tiny_preset, tmp_path / "run", 3)
    with pytest.raises(UsageError, match=f"another {key} — resume with the original settings$"):
        run(changed(tiny_preset, {key: value}), tmp_path / "run", resume=True, allow_change=[key])


def test_a_run_that_no_longer_improves_ends(tmp_path, tiny_preset, monkeypatch):
    """And ends at the same epoch if it was stopped on the way."""
    import lsag.training.loop as module

    real, scores = module.evaluate, {}

    def scored(*args, **kwargs):
        return replace(real(*args, **kwargs), top1=next(scores["left"]))

    monkeypatch.setattr(module, "evaluate", scored)
    preset = changed(tiny_preset, {"train.patience": 2, "train.epochs": 9, "train.batch_size": 512})
    for name, stop in (("whole", None), ("parts", 6)):
        scores["left"] = iter([0.2, 0.5, 0.5, 0.4, 0.9])
        if stop:
            stop_after(preset, tmp_path / name, stop)
        events = run(preset, tmp_path / name, resume=bool(stop))
        assert (events[-1].epochs, events[-1].best_epoch, events[-1].best_top1) == (4, 2, 0.5)
        assert load_checkpoint(newest(tmp_path / name)).epoch == 4 and (tmp_path / name / "curves.png").is_file()
    assert sum(isinstance(event, Epoch) for event in events) == 1
    whole, parts = (load_checkpoint(newest(tmp_path / name)).model.state_dict() for name in ("whole", "parts"))
    assert_equal(whole, parts)
    assert "is already finished (epoch 4 of 9)" in run(preset, tmp_path / "whole", resume=True)[0].notes[0]


def test_a_run_that_ends_early_says_so(lsag):
    done = lsag("train", f"--set={STAGES}", "--set=train.lr=1e-30", "--patience", 1, "--epochs", 4, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "ended after epoch 2: no better top-1 in 1 epoch\n" in done.stdout
