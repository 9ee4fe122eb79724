"""What bench reports must follow from what it measured; no test asserts how fast that was."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lsag import load_preset
from lsag.bench import PEERS, bench, count_macs, open_contender, timm_contender
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.errors import UsageError
from lsag.inference.export import export_onnx
from lsag.machine import multiplies_bf16, processor
from lsag.model.flops import count
from lsag_cli.app import app
from tests.conftest import assert_refused

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(made_once, tiny_preset):
    """A checkpoint, and its graph."""

    def make(folder):
        checkpoint = random_checkpoint(tiny_preset)
        save_checkpoint(folder / "a.pt", checkpoint)
        export_onnx(checkpoint, folder / "a.onnx")

    folder = made_once("contenders", make)
    return folder / "a.pt", folder / "a.onnx"


def test_every_kind_of_contender_is_measured(files, tiny_preset):
    heard = []
    specs = [*map(str, files), f"plain:{files[0]}", "timm:test_vit,img_size=32", f"host:{files[1]}"]
    specs.append(f"openvino:{files[1]}")
    done = bench(specs, batch_size=2, device="cpu", precision="fp32", rounds=2, threads=1, on_round=heard.append)
    assert heard == [0, 1, 2] and done.threads == 1 and list(done.matrix_rates) == ["fp32"]
    ours, graph, released, *_ = done.results
    total = count(tiny_preset.model)
    assert (ours.params, ours.macs, graph.macs, released.macs) == (total.params, *[total.macs_run] * 2, total.macs)
    assert graph.peak_memory is None and ours.peak_memory > 4 * ours.params
    assert released.peak_memory > ours.peak_memory
    for result in done.results:
        assert result.ratio == pytest.approx(result.images_per_second / ours.images_per_second)
        assert result.macs_per_second == pytest.approx(result.images_per_second * result.macs)
        assert result.share == pytest.approx(result.macs_per_second / done.matrix_rates["fp32"])
        assert 0 < result.latency_p50 <= result.latency_p90


def test_training_steps_are_three_forwards_with_the_moments_in_memory(tiny_preset, files):
    done = bench([str(files[0])], mode="training", batch_size=2, device="cpu", rounds=1)
    (ours,) = done.results
    assert ours.macs_per_second == pytest.approx(3 * ours.images_per_second * ours.macs)
    assert ours.latency_p50 is None and ours.peak_memory > 3 * 4 * ours.params


@pytest.mark.parametrize("name", ["cifar-tiny", "in1k-small"])
def test_the_released_formulation_counts_as_the_release(name):
    contender = open_contender(f"plain:{name}", device=CPU)
    assert contender.macs == count(load_preset(name).model).macs


def test_a_graph_of_a_fixed_batch_is_measured_at_that_batch(tmp_path, tiny_preset):
    path = str(export_onnx(random_checkpoint(tiny_preset), tmp_path / "four.onnx", batch=4).path)
    assert bench([path], batch_size=4, device="cpu", rounds=1).results[0].latency_p50 is None
    with pytest.raises(UsageError, match="takes 4 images at a time, not 8"):
        bench([path], batch_size=8, device="cpu", rounds=1)


def test_presets_take_settings():
    shifts = "model.shifts=[[0,0],[1,0]]"
    ours, released = (
        open_contender(f"{kind}cifar-tiny,{shifts},model.image_size=16", device=CPU) for kind in ("", "plain:")
    )
    config = load_preset("cifar-tiny", {"model.shifts": [[0, 0], [1, 0]], "model.image_size": 16}).model
    assert (ours.shape, ours.macs, released.macs) == ((3, 16, 16), count(config).macs_run, count(config).macs)


def test_recomputing_saves_memory():
    none, local, every = (
        bench(["cifar-nano"], mode="training", batch_size=32, device="cpu", rounds=1, recompute=which)
        .results[0]
        .peak_memory
        for which in ("none", "local", "all")
    )
    assert every < 0.9 * local < 0.75 * none


@pytest.mark.parametrize("settings", ["img_size=(32,32)", "in_chans=1"])
def test_timms_images_have_the_shape_that_was_asked_for(settings):
    contender = open_contender(f"timm:test_vit,{settings}", device=CPU)
    assert contender.model(torch.zeros(1, *contender.shape)).shape == (1, 1000)


def test_fused_attention_is_counted():
    model = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            x = x.flatten(2).transpose(1, 2)
            query = x.unflatten(2, (2, 4)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    assert count_macs(Net(), (8, 2, 2)) == 2 * 4 * 4 * 8


def test_each_contender_has_its_own_precision(files):
    done = bench([str(files[1]), str(files[0])], batch_size=1, device="cpu", precision="bf16", rounds=1, threads=1)
    assert [result.precision for result in done.results] == ["fp32", "bf16"]
    for result in done.results:
        assert result.share == pytest.approx(result.macs_per_second / done.matrix_rates[result.precision])


def test_contenders_of_several_precisions_take_turns(files):
    specs = [f"{precision}:{prefix}{files[0]}" for precision in ("bf16", "fp32") for prefix in ("", "plain:")]
    done = bench([*specs, f"fp32:host:{files[1]}"], batch_size=1, device="cpu", rounds=1, threads=1)
    assert [(one.name, one.precision) for one in done.results[:4]] == [(spec, spec[:4]) for spec in specs]
    with pytest.raises(UsageError, match=r"a\.onnx computes in fp32, as it was exported — remove bf16:"):
        bench([f"bf16:{files[1]}"], device="cpu", rounds=1)


def test_a_precision_that_nothing_would_have_is_refused(files):
    with pytest.raises(UsageError, match="exported with"):
        bench([str(files[1])], device="cpu", precision="bf16", rounds=1, threads=1)


@pytest.mark.skipif(not multiplies_bf16(), reason="needs a processor that multiplies bf16")
def test_openvino_obeys_the_precision_that_other_graphs_keep(files):
    specs = [f"openvino:{files[1]}", str(files[1])]
    done = bench(specs, batch_size=2, device="cpu", precision="bf16", rounds=1, threads=1)
    assert [one.precision for one in done.results] == ["bf16", "fp32"] and set(done.matrix_rates) == {"bf16", "fp32"}
    with pytest.raises(UsageError, match="no provider runs an fp32 graph in fp16"):
        bench(specs[:1], device="cpu", precision="fp16", rounds=1)
    with pytest.raises(UsageError, match="runs on the CPU — --device cpu"):
        open_contender(specs[0], device=torch.device("meta"))


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("timm:no_such_model", {}, "timm has no model"),
        ("timm:resnet18,colour=blue", {}, "resnet18"),
        ("timm:resnet18,pretrained=True", {}, "random weights"),
        ("timm:test_vit,img_size=[1]", {}, "test_vit"),
        ("digits-nano,model.image_size=8,model.image_size=16", {}, "twice"),
        ("a.pt,model.image_size=8", {}, "its own settings"),
        ("cifar-tny", {}, "cifar-tiny"),
        ("a.onnx", {"mode": "training"}, "cannot be trained"),
    ],
)
def test_what_cannot_be_measured_is_refused(spec, options, words):
    with pytest.raises(UsageError, match=words):
        open_contender(spec, device=CPU, **options)


def test_the_command(lsag, tmp_path):
    command = ("bench", "digits-nano", "plain:digits-nano", "--rounds", "1", "--batch-size", "2", "--device", "cpu")
    done = lsag(*command, "--plot", "bench.png")
    assert done.returncode == 0, done.stderr
    assert "plain:digits-nano" in done.stdout and "matrix products" in done.stdout and done.stderr == ""
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(lsag(*command, "--mode", "training", "--system-allocator", "--json").stdout)
    assert [result["name"] for result in found["groups"][0]["results"]] == ["digits-nano", "plain:digits-nano"]
    assert found["mode"] == "training" and found["system_allocator"] is True


def test_the_picture_names_the_machine(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("lsag.plots.draw_bench", lambda speeds, path, *, title: titles.append(title))
    command = ["bench", "digits-nano", "--rounds", "1", "--batch-size", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "bench.png")])
    assert done.exit_code == 0, done.output
    assert [processor() in title and " thread" in title for title in titles] == [True]


def test_old_names_of_options_work_with_a_note(lsag):
    done = lsag("bench", "digits-nano", "--rounds", "1", "--device", "cpu", "--batch", "3", "--dtype", "bf16", "--json")
    found = json.loads(done.stdout)
    assert found["batch_size"] == 3 and found["groups"][0]["results"][0]["precision"] == "bf16"
    assert "--batch is now --batch-size" in done.stderr and "--dtype is now --precision" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits-nano", "digits-nano"], "named twice"),
        (["digits-nano", "--peers"], "its own contenders"),
        (["digits-nano", "--plot", "a.pdf"], ".png"),
        (["digits-nano", "--recompute", "all"], "--mode training"),
        (["digits-nano,model.imge_size=8"], "imge_size"),
        (["no-such-preset"], "no-such-preset"),
    ],
)
def test_wrong_uses_of_the_command(lsag, arguments, words):
    assert_refused(lsag("bench", *arguments), 2, words)


@pytest.mark.parametrize("spec", [spec for specs in PEERS.values() for spec in specs if spec.startswith("timm:")])
def test_timm_has_every_peer_at_its_size(spec):
    """On the meta device: shapes only."""
    with torch.device("meta"):
        model, (channels, height, width) = timm_contender(spec.removeprefix("timm:"))
        logits = model.eval()(torch.zeros(1, channels, height, width))
    assert (height, logits.shape) == ((32, (1, 10)) if "img_size=32" in spec else (height, (1, 1000)))
