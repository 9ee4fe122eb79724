import argparse
import zipfile

import pytest
import torch
from torch import Tensor

from lsag import LSAG, ModelConfig, load_checkpoint, load_preset
from lsag.checkpoint import random_checkpoint, save_checkpoint
from lsag.convert import convert_file, from_released
from lsag.errors import InputError
from tests.conftest import CIFAR_SHIFTS, IMAGENET_SHIFTS, images, quantized, randomise, shared, small_config
from tests.model import oracle


def released_layout(model: LSAG) -> dict[str, Tensor]:
    """The weights of `model` under the names of the release."""
    config, weights, released = model.config, model.state_dict(), {}
    for kind in ("weight", "bias"):
        for s, part in enumerate(weights[f"embed.conv.{kind}"].chunk(config.num_variants)):
            released[f"to_patch_embedding.projections.{s}.{kind}"] = part
        released[f"norm.{kind}"] = weights[f"norm.{kind}"]
        released[f"mlp_head.{kind}"] = weights[f"head.{kind}"]
        for i, stage in enumerate(config.stages):
            for norm in ("norm1", "norm2"):
                released[f"layers.{i}.0.{norm}.{kind}"] = weights[f"stages.{i}.{norm}.{kind}"]
            if i:
                released[f"layers.{i - 1}.1.conv.{kind}"] = weights[f"stages.{i}.down.conv.{kind}"]
                released[f"layers.{i - 1}.1.norm.{kind}"] = weights[f"stages.{i}.down.norm.{kind}"]
            for j in range(stage.depth):
                ours, theirs = f"stages.{i}.blocks.{j}", f"layers.{i}.0.layers.{j}"
                suffix = "even" if i == j == 0 else "odd"
                released[f"{theirs}.0.Wq_{suffix}.{kind}"] = weights[f"{ours}.attn.q.{kind}"]
                released[f"{theirs}.0.Wkv_{suffix}.{kind}"] = weights[f"{ours}.attn.kv.{kind}"]
                released[f"{theirs}.0.proj.{kind}"] = weights[f"{ours}.attn.proj.{kind}"]
                released[f"{theirs}.1.fc1.{kind}"] = weights[f"{ours}.mlp.0.{kind}"]
                released[f"{theirs}.1.fc2.{kind}"] = weights[f"{ours}.mlp.2.{kind}"]
    released["layers.0.0.pos_emb"] = weights["embed.pos"].transpose(0, 1)
    for i in range(1, len(config.stages)):
        released[f"layers.{i}.0.pos_emb"] = weights[f"stages.{i}.pos"]
    return released


WIDTHS = [
    {"embed_dim": 8, "depth": 3, "num_heads": 2},
    {"embed_dim": 12, "depth": 2, "num_heads": 3},
    {"embed_dim": 20, "depth": 1, "num_heads": 5},
]
CASES = {
    "cifar, full heads, other widths": small_config(image_size=8, shifts=CIFAR_SHIFTS, stages=WIDTHS, num_classes=3),
    "cifar, one key/value head": small_config(image_size=8, stages=[stage | {"num_kv_heads": 1} for stage in WIDTHS]),
    "imagenet, kernel 9": small_config(
        image_size=28,
        shifts=IMAGENET_SHIFTS,
        patch_kernel=9,
        patch_stride=7,
        patch_padding=1,
        shift_mode="extend",
        stages=WIDTHS,
    ),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_converted_weights_give_the_released_function(config):
    source = randomise(LSAG(config)).eval()
    converted = from_released(released_layout(source), config)
    # The released CIFAR code reads a tuple as (vertical, horizontal).
    shifts = [(y, x) if config.shift_mode == "roll" else (x, y) for x, y in config.shifts]
    expected_config = config.model_copy(update={"shifts": tuple(shifts)})
    batch = images(2, config)
    expected = oracle.logits(batch, dict(source.state_dict()), expected_config)
    torch.testing.assert_close(converted(batch), expected, rtol=1e-4, atol=1e-4)
    if config.shift_mode == "roll":
        assert (source(batch) - expected).abs().max() > 1e-3, "the transposition must matter"


def reference(name: str) -> tuple[dict[str, Tensor], ModelConfig, Tensor, Tensor]:
    """Weights, configuration, images and the logits that the released code gives for them."""
    contents = torch.load(shared(f"reference/{name}.pt"), weights_only=True)
    about = contents["config"]
    cifar = about["family"] == "cifar"
    config = ModelConfig(
        image_size=about["image_size"],
        num_classes=about["num_classes"],
        shifts=CIFAR_SHIFTS if cifar else IMAGENET_SHIFTS,
        patch_kernel=about["kernel"],
        patch_stride=about["stride"],
        patch_padding=about["padding"],
        shift_mode="roll" if cifar else "extend",
        stages=[
            {"embed_dim": dim, "depth": depth, "num_heads": heads}
            | ({"num_kv_heads": 1} if about["kv_heads"] == 1 else {})
            for dim, depth, heads in zip(about["dims"], about["depths"], about["heads"], strict=True)
        ],
    )
    return contents["state_dict"], config, contents["input"], contents["logits"]


@pytest.mark.parametrize("name", ["released-cifar-mqa", "released-imagenet"])
def test_released_checkpoints_give_the_released_logits(name):
    weights, config, batch, logits = reference(name)
    model = from_released(weights, config)
    assert (model(batch) - logits).abs().max() < 1e-5


def test_a_published_file_becomes_a_checkpoint(tmp_path):
    preset = load_preset("digits-nano")
    source = randomise(LSAG(preset.model)).eval()
    published = {
        "model": {f"module.{key}": value for key, value in released_layout(source).items()},
        "optimizer": {"state": {}},
        "epoch": 299,
        "args": argparse.Namespace(lr=5e-4),
    }
    torch.save(published, tmp_path / "released.pth")
    convert_file(tmp_path / "released.pth", preset, tmp_path / "ours.pt")
    checkpoint = load_checkpoint(tmp_path / "ours.pt")
    direct = from_released(published["model"], preset.model)
    batch = images(2, preset.model)
    assert torch.equal(checkpoint.model(batch), direct(batch))


def test_weights_of_another_model_are_refused():
    config = small_config()
    released = released_layout(LSAG(config))
    other = config.model_copy(update={"num_classes": 9})
    with pytest.raises(InputError, match=r"head.weight is float32 7 x 16, the model has float32 9 x 16"):
        from_released(released, other)
    del released["norm.bias"]
    released["cls_token"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"1 missing: norm.bias; 1 unknown: cls_token"):
        from_released(released, config)
    full = config.model_copy(update={"stages": small_config(stages=WIDTHS).stages})
    with pytest.raises(InputError, match=r"\.kv\.weight is .* — choose the preset of these weights: lsag presets"):
        from_released(released, full)


@pytest.mark.parametrize(
    ("given", "dataset", "fix"),
    [
        ("cifar-tiny-release", None, "--preset cifar-tiny-release"),
        ("cifar-tiny-release", "cifar100", "--preset cifar-tiny-release --dataset cifar100"),
        ("in1k-tiny-release", None, "--preset in1k-tiny-release"),
    ],
)
def test_weights_of_another_preset_name_theirs(tmp_path, given, dataset, fix):
    """With four heads, as published, where Table 2 has three."""
    released = released_layout(LSAG(load_preset(given, dataset=dataset).model))
    torch.save({"model": released}, tmp_path / "released.pth")
    with pytest.raises(InputError, match=f" — {fix}$"):
        convert_file(tmp_path / "released.pth", load_preset("cifar-tiny"), tmp_path / "out.pt")


def test_keys_of_other_projects_are_unknown_not_a_crash():
    with pytest.raises(InputError, match=r"layers\.encoder\.0\.weight"):
        from_released({"layers.encoder.0.weight": torch.zeros(1), "layers.0": torch.zeros(1)}, small_config())
    broken = released_layout(LSAG(small_config()))
    broken["norm.bias"] = torch.full((16,), float("nan"))
    with pytest.raises(InputError, match=r"1 not finite: norm\.bias"):
        from_released(broken, small_config())


@pytest.mark.parametrize("name", ["in1k-tiny", "in1k-small", "in1k-tiny-release"])
def test_imagenet_presets_keep_the_order_of_their_shifts(name):
    config = load_preset(name, {"model.image_size": 28, "model.num_classes": 5}).model
    assert from_released(released_layout(LSAG(config)), config).config.shifts == config.shifts == IMAGENET_SHIFTS


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ({"norm.bias": quantized()}, "holds no weights"),
        ({"norm.bias": torch.zeros(10, dtype=torch.complex64)}, "holds no weights"),
        ({"norm.bias": torch.zeros(1).expand(10**12)}, "holds no weights"),
        ({f"layers.{'9' * 5000}.1.conv.bias": torch.zeros(1)}, "1 unknown: layers.999"),
    ],
)
def test_what_only_looks_like_weights_is_refused(tmp_path, weights, word):
    torch.save(weights, tmp_path / "file.pth")
    with pytest.raises(InputError, match=word):
        convert_file(tmp_path / "file.pth", load_preset("digits-nano"), tmp_path / "out.pt")


def test_a_bomb_and_a_checkpoint_of_lsag_are_not_the_release(tmp_path):
    preset = load_preset("digits-nano")
    save_checkpoint(tmp_path / "ours.pt", random_checkpoint(preset))
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", bytes(10_000_000))
    for name, word in (("ours.pt", "is a checkpoint of lsag already"), ("bomb.pth", "compressed")):
        with pytest.raises(InputError, match=word):
            convert_file(tmp_path / name, preset, tmp_path / "out.pt")


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


@pytest.mark.parametrize(
    "contents", [{"model": Payload()}, {"model": 3}, {"model": {1: torch.zeros(1)}}, {"weights": 3}, [1, 2]]
)
def test_other_files_are_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"file\.pth"):
        convert_file(tmp_path / "file.pth", load_preset("cifar-tiny"), tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
