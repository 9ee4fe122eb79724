"""timm's classifiers in the network's place: built, trained, stopped, exported and counted as ours are."""

import json
import re
import shlex
from functools import partial

import pytest
import timm
import torch
from typer.testing import CliRunner

from lsag import load_preset
from lsag.checkpoint import load_checkpoint, random_checkpoint, save_checkpoint, save_safetensors
from lsag.config import parse_spec
from lsag.errors import CheckError, InputError, UsageError
from lsag.hub import Classifier
from lsag.inference import classifier
from lsag.inference.explain import explain
from lsag.inference.export import export_onnx
from lsag.model.build import build_model, check_training, count_model, set_recompute, timm_model
from lsag.paper.tables import TABLES
from lsag.training.begin import data_parallel
from lsag.training.loop import train
from lsag.training.optim import make_optimizer, moving_average
from lsag.training.options import TrainOptions
from lsag_cli.app import app
from tests.conftest import ROOT, assert_equal, assert_refused, changed, losses, run, stop_after, weights

SWIN = "swin_tiny_patch4_window7_224,patch_size=1,window_size=4,embed_dim=12,depths=(2,1),num_heads=(2,2)"
DEIT = "deit_tiny_patch16_224,patch_size=4,depth=2,embed_dim=24"


def cifar(spec, **overrides):
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_preset("cifar-tiny", changes, timm=spec)


@pytest.fixture
def preset():
    """BatchNorm on digits: 22 steps an epoch."""
    changes = {"train.epochs": 2, "train.warmup_epochs": 0, "train.lr": 1e-3, "model.drop_path": 0.2}
    return load_preset("digits-nano", changes, timm="test_resnet")


@pytest.mark.parametrize("spec", ["resnet10t", SWIN, DEIT, "test_efficientnet"])
def test_sizes_are_the_preset_s(spec):
    preset = cifar(spec, model__image_size=24 if spec == DEIT else 32, model__num_classes=7)
    size = preset.model.image_size
    model = build_model(preset.model).train()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    check_training(preset.model, slice_size=2, recompute="all")


def test_drop_path_is_the_preset_s_even_where_timm_has_another():
    """Swin's own is 0.1."""
    for rate in (0.0, 0.3):
        rates = [getattr(m, "drop_prob", 0.0) for m in build_model(cifar(SWIN, model__drop_path=rate).model).modules()]
        assert max(rates) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        ("resnet10", {}, "timm has no model 'resnet10' — use one of: .*resnet10t"),
        ("resnet10t,colour=3", {}, "unexpected keyword argument 'colour'"),
        ("resnet10t,num_classes=3", {}, "num_classes is a setting of the preset — --set model.num_classes="),
        (
            "resnet10t,pretrained=True",
            {},
            "pretrained=True is not supported — remove it; .* random weights",
        ),
        ("resnet10t,checkpoint_path='x'", {}, "random weights"),
        ("resnet10t,stem_width=x", {}, "resnet10t"),
        ("resnet10t,stem_width=8,stem_width=9", {}, "twice"),
        (
            "inception_v3",
            {"model.drop_path": 0.0},
            "cannot be used with images of 32 x 32 pixels: .*(Kernel|Output) size",
        ),
        ("crossvit_tiny_240", {}, "cannot be used with images of 32 x 32"),
        ("vgg11", {}, "has no drop-path — --set model.drop_path=0.0"),
        ("vit_tiny_patch16_224,patch_size=8,global_pool=''", {}, r"gives \(1, 17, 10\), not logits \(1, 10\)"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read_or_written(tmp_path, spec, changes, words):
    with pytest.raises(UsageError, match=words):
        preset = load_preset("cifar-tiny", changes, timm=spec)
        next(train(preset, TrainOptions(data_dir=tmp_path / "absent", out=tmp_path / "run", download=False)))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_trained_in_this_way_is_refused():
    with pytest.raises(UsageError, match=r"is for LSAG only.* — use --recompute all"):
        check_training(cifar("resnet10t").model, slice_size=2, recompute="local")
    with pytest.raises(UsageError, match="cannot recompute"):
        check_training(cifar("vgg11", model__drop_path=0.0).model, slice_size=2, recompute="all")
    with pytest.raises(UsageError, match=r"cannot be trained on 1 at a time .*more than 1 value per channel"):
        check_training(cifar("resnet10t").model, slice_size=1)


def test_what_timm_spares_from_decay_is_spared():
    model = build_model(cifar(SWIN).model)
    optimizer = make_optimizer(model, load_preset("cifar-tiny").train)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = [names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed and not [name for name in decayed if "bias" in name or "norm" in name]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("spec", ["resnet10t", SWIN])
def test_checkpoints_describe_themselves(tmp_path, spec, suffix):
    """Swin has buffers that are in no file."""
    original = random_checkpoint(cifar(spec))
    original.model.train()(torch.randn(4, 3, 32, 32))
    path = tmp_path / f"a{suffix}"
    (save_checkpoint if suffix == ".pt" else save_safetensors)(path, original)
    loaded, images = load_checkpoint(path), torch.randn(2, 3, 32, 32)
    assert loaded.preset == original.preset and not loaded.model.training
    with torch.no_grad():
        assert torch.equal(loaded.model(images), original.model.eval()(images))
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_weights_of_another_network_are_refused(tmp_path):
    save_checkpoint(tmp_path / "a.pt", random_checkpoint(cifar("resnet10t")))
    contents = torch.load(tmp_path / "a.pt")
    contents["preset"]["model"]["timm"] = "resnet14t"
    torch.save(contents, tmp_path / "a.pt")
    with pytest.raises(InputError, match="weights do not fit"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "spec", [pytest.param("resnet10t", marks=pytest.mark.slow), SWIN, pytest.param(DEIT, marks=pytest.mark.slow)]
)
def test_graphs_agree_with_pytorch(tmp_path, spec):
    checkpoint = random_checkpoint(cifar(spec))
    checkpoint.model.train()(torch.randn(8, 3, 32, 32))  # running statistics that are not those of the beginning
    checkpoint.model.eval()
    done = export_onnx(checkpoint, tmp_path / "a.onnx")
    assert done.opset == 23 and done.max_difference < 1e-4 and max(done.batches) == 64


def test_a_model_without_measure_is_refused_before_it_is_built():
    for config in (
        load_preset("digits-nano", {"model.stages.0": {"embed_dim": 16_384, "depth": 900, "num_heads": 1}}).model,
        cifar("vit_tiny_patch16_224,depth=20000").model,
        cifar("vit_tiny_patch16_224,embed_dim=98304").model,
    ):
        for check in (build_model, partial(check_training, slice_size=2)):
            with pytest.raises(UsageError, match=r"a model of .* is too large"):
                check(config)


def test_what_torch_cannot_export_is_said(tmp_path):
    with pytest.raises(CheckError, match=r"torch cannot export .*a\.onnx was not written"):
        export_onnx(random_checkpoint(cifar("test_vit_relpos")), tmp_path / "a.onnx")


def test_counts_are_those_of_timm_s_model():
    total = count_model(cifar("resnet18").model)
    model = timm.create_model("resnet18", num_classes=10)
    assert total.params == sum(p.numel() for p in model.parameters()) == 11_181_642
    assert total.macs == total.macs_run == 37_016_576  # at 224 x 224 the 1.814 G of its papers: 49 times, but the head


def test_recomputation_is_timm_s():
    model = timm_model(*parse_spec(DEIT))
    set_recompute(model, "all")
    assert model.grad_checkpointing is True


def test_explain_is_for_lsag():
    with pytest.raises(UsageError, match=r"chooses no shifts \(it is a timm model\)"):
        explain(classifier.Classifier(random_checkpoint(cifar("resnet10t"))), None)


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_a_resumed_run_has_its_running_statistics(tmp_path, preset, ema):
    preset = changed(preset, {"train.ema_decay": ema})
    run(preset, tmp_path / "whole")
    stop_after(preset, tmp_path / "parts", 22)
    run(preset, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert_equal(whole, parts)
    assert whole["bn1.num_batches_tracked"] == 44 and whole["bn1.running_mean"].any()


def test_a_skipped_step_leaves_no_statistics(tmp_path, preset, monkeypatch):
    import lsag.training.step as module

    bad = iter([False] * 4 + [True] + [False] * 10_000)
    monkeypatch.setattr(module, "failpoint", lambda name: name == "after_forward" and next(bad))
    run(changed(preset, {"train.epochs": 1}), tmp_path / "run")
    assert weights(tmp_path / "run")["bn1.num_batches_tracked"] == 21


def test_the_moving_average_averages_statistics_and_copies_indices():
    model = build_model(cifar(SWIN).model)
    model.statistic = torch.nn.Buffer(torch.zeros(1))
    average = moving_average(model, 0.9)
    average.update_parameters(model)
    model.statistic.fill_(1.0)
    average.update_parameters(model)
    assert average.module.statistic == pytest.approx(0.1)
    indices = {name: value for name, value in model.named_buffers() if not value.is_floating_point()}
    assert indices and all(torch.equal(average.module.get_buffer(name), value) for name, value in indices.items())


def test_the_throw_away_steps_leave_no_statistics(tmp_path, preset):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = build_model(preset.model).train()
        before = {name: value.clone() for name, value in model.named_buffers()}
        data_parallel(model, torch.device("cpu"), torch.float32, shape=(4, 1, 8, 8))
    finally:
        torch.distributed.destroy_process_group()
    assert_equal(before, dict(model.named_buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ranks_evaluate_with_the_same_statistics(lsag, tmp_path, ema):
    """What two ranks measure together is what the checkpoint gives alone: it holds the statistics of the first."""
    command = "train --model timm:test_resnet --device cpu --procs 2 --epochs 1 --out run --workers 0"
    settings = ("train.warmup_epochs=0", "train.lr=0.001", f"train.ema_decay={ema}")
    done = lsag(*command.split(), *[f"--set={setting}" for setting in settings])
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    alone = json.loads(lsag("eval", "run/best.pt", "--device", "cpu", "--workers", 0, "--json").stdout)
    assert alone["top1"] == together["top1"] and alone["loss"] == pytest.approx(together["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_from_training_to_a_graph(lsag, tmp_path):
    spec = "timm:test_resnet"
    settings = ["--set=train.warmup_epochs=0", "--set=model.drop_path=0.0", "--set=train.epochs=3"]
    done = lsag("train", "--model", spec, *settings, "--device", "cpu", "--workers", 0, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    trained = json.loads(done.stdout)
    assert trained["best_top1"] > 0.3
    assert json.loads((tmp_path / "run/preset.json").read_text())["name"] == "digits-nano-test_resnet"
    exported = lsag("export", "run/best.pt", "--onnx")
    assert exported.returncode == 0, exported.stderr
    for file, options in (("run/best.pt", ["--device", "cpu"]), ("run/best.onnx", ["--provider", "cpu"])):
        found = json.loads(lsag("eval", file, *options, "--workers", 0, "--json").stdout)
        assert found["top1"] == trained["best_top1"]
    measured = lsag("bench", "run/best.pt", "run/best.onnx", "--device", "cpu", "--rounds", 1, "--batch", 2, "--json")
    ours, graph = json.loads(measured.stdout)["groups"][0]["results"]
    counted = lsag("flops", "--preset", "digits-nano", "--model", spec, "--json")
    (total,) = json.loads(counted.stdout)["presets"]
    assert (ours["params"], ours["macs"]) == (graph["params"], graph["macs"]) == (total["params"], total["macs"])
    assert_refused(lsag("bench", "plain:run/best.pt", "--device", "cpu"), 2, "only LSAG has a released formulation")

    # It goes on as itself, said again or not, and as no other.
    again = ["train", "--resume", "run", "--device", "cpu", "--workers", 0]
    for model in ([], ["--model", spec]):
        done = lsag(*again, *model)
        assert done.returncode == 0 and "best top-1" in done.stdout, done.stderr
    assert json.loads((tmp_path / "run/preset.json").read_text())["name"] == "digits-nano-test_resnet"
    assert_refused(lsag(*again, "--model", "timm:test_vit,patch_size=2"), 2, "run with another", "model.timm")

    # Fine-tuning, with a new classifier.
    options = ["--init-from", "run/best.pt", "--reset-head", "--device", "cpu", "--workers", 0, "--epochs", 1]
    done = lsag("train", "--model", spec, settings[0], *options, "--out", "tuned")
    assert done.returncode == 0, done.stderr
    before, after = (load_checkpoint(tmp_path / name).model.state_dict() for name in ("run/best.pt", FIRST))
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["fc.weight", "fc.bias"]


FIRST = "tuned/step-0000000000.pt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--model", "resnet18"], ["--model resnet18 is not timm:NAME"]),
        (["train", "--model", "timm:test_resnet", "--recompute", "local", "--dry-run"], ["is for LSAG only"]),
        (["train", "--model", "timm:inception_v3", "--dry-run", "--set", "model.drop_path=0.0"], ["8 x 8 pixels"]),
        (["train", "--model", "timm:test_resnet", "--set", "model.depth=3", "--dry-run"], ["unknown key model.depth"]),
        (["flops", "--model", "timm:test_resnet"], ["--model needs a --preset"]),
    ],
)
def test_wrong_uses_of_the_option(lsag, arguments, words):
    assert_refused(lsag(*arguments), 2, *words)


def test_a_plan_is_measured(lsag):
    done = lsag("train", "--model", "timm:test_resnet", "--dry-run", "--probe", "--device", "cpu", "--json")
    plan = json.loads(done.stdout)
    assert plan["preset"]["model"]["timm"] == "test_resnet" and plan["step_seconds"] > 0
    assert plan["parameters"] == count_model(load_preset("digits-nano", timm="test_resnet").model).params


BASELINES = (ROOT / "docs/baselines.md").read_text()
COMMANDS = re.findall(r"lsag train (--preset [^`\n]*)", BASELINES)


def test_the_page_has_commands():
    assert len(COMMANDS) > 15


LARGER = re.compile("_base_|_small_|b4|regnety_080|resnet101")
"""Names of networks that differ from others of the page in size only."""


@pytest.mark.parametrize(
    "command",
    [
        COMMANDS[0],
        *(
            pytest.param(one, marks=pytest.mark.full_size if LARGER.search(one) else pytest.mark.slow)
            for one in COMMANDS[1:]
        ),
    ],
)
def test_the_commands_of_the_page_take_these_networks(command):
    """In this process: each would take seconds to start."""
    result = CliRunner().invoke(app, ["train", *shlex.split(command), "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "row", [row for table in (3, 4) for row in TABLES[table] if row.timm], ids=lambda row: row.name
)
def test_the_page_has_every_baseline_of_the_tables(row):
    lines = [line for line in BASELINES.splitlines() if f"timm:{row.timm}" in line.replace("'", "")]
    assert any(line.startswith(f"| {row.name} | {row.params_m} |") for line in lines)


def test_a_baseline_goes_through_the_folder_of_the_hub(tmp_path):
    """Swin has index tables that are in no file."""
    spec = "swin_tiny_patch4_window7_224,patch_size=2,window_size=4,embed_dim=32,depths=[2,2,2],num_heads=[2,2,4]"
    made = Classifier.of(random_checkpoint(load_preset("cifar-nano", timm=spec)))
    made.save_pretrained(tmp_path)
    found = Classifier.from_pretrained(tmp_path).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(found(pixels), made(pixels))
