"""lsag's models where other tools expect them: timm, safetensors, Hugging Face's hub."""

import json
import random
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from packaging.version import Version
from PIL import Image
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, dispatch_clip_grad

import lsag.timm_models
from lsag import load_checkpoint, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, save_checkpoint, save_safetensors, weights_digest
from lsag.data.transforms import Normalize
from lsag.errors import InputError, UsageError
from lsag.hub import Classifier
from tests.conftest import assert_refused

SMALL = "lsag_cifar_nano"


@pytest.mark.parametrize("variant", lsag.timm_models.PRESETS)
def test_every_preset_is_a_model_of_timm(variant):
    assert variant in timm.list_models("lsag_*")
    with torch.device("meta"):
        model = timm.create_model(variant)
    config = load_preset(lsag.timm_models.PRESETS[variant]).model
    assert model.config == config and model.pretrained_cfg["input_size"] == (
        config.in_channels,
        config.image_size,
        config.image_size,
    )
    resolved = timm.data.resolve_data_config({}, model=model)
    assert resolved["mean"] == load_preset(lsag.timm_models.PRESETS[variant]).data.mean


def test_timms_arguments():
    model = timm.create_model(SMALL, num_classes=7, img_size=16, drop_path_rate=0.2, in_chans=1, drop_rate=0.0)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7) and model.config.drop_path == 0.2
    assert timm.create_model(SMALL, num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    with pytest.raises(UsageError, match="square"):
        timm.create_model(SMALL, img_size=(16, 32))
    with pytest.raises(UsageError, match=r"image_size 33 is not a multiple of patch_stride 2; use 32 or 34") as refusal:
        timm.create_model(SMALL, img_size=33)
    assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(UsageError, match="window_size"):
        timm.create_model(SMALL, window_size=7)


def test_features_are_those_of_the_stages():
    model = timm.create_model(SMALL).eval()
    x = torch.randn(2, 3, 32, 32)
    final, features = model.forward_intermediates(x, norm=True)
    assert [tuple(feature.shape) for feature in features] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(features[-1].flatten(2).transpose(1, 2), final)
    tokens = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True, stop_early=True)
    torch.testing.assert_close(tokens[0].transpose(1, 2).unflatten(2, (16, 16)), features[0])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NHWC")
    extractor = timm.create_model(SMALL, features_only=True, out_indices=(0, 1)).eval()
    assert extractor.feature_info.channels() == [32, 64] and extractor.feature_info.reduction() == [2, 4]
    extractor.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, strict=False)
    for ours, theirs in zip(extractor(x), features[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    for other in (torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 32, 24), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="img_size="):
            extractor(other)


def test_slow_libraries_are_imported_only_where_they_are_used(tmp_path):
    save_checkpoint(tmp_path / "a.pt", random_checkpoint(load_preset("digits-nano")))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    script = """
import sys, torch
from lsag import LSAG, load_preset
from lsag_cli.app import run

model = LSAG(load_preset("cifar-nano").model)
model(torch.zeros(1, 3, 32, 32)).sum().backward()
sys.argv = ["lsag", "predict", "a.pt", "a.png"]
assert run() == 0
slow = {"timm", "torchvision", "torch._dynamo", "onnx", "triton"}
assert not slow & set(sys.modules), slow & set(sys.modules)
model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=1)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


SCRIPTS = {"drop_rate": 0.0, "drop_block_rate": None, "global_pool": None, "bn_momentum": None, "bn_eps": None}
"""What timm's train.py passes to every model."""


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older timm has other scripts")
@pytest.mark.parametrize("channels", [3, 1])
def test_it_trains_as_timms_scripts_train(channels, tmp_path):
    """The calls of train.py and validate.py of timm 1.0.31, which are not in its package."""
    from timm.data import resolve_input_data_config
    from timm.models import resolve_model_input_args
    from timm.task import ClassificationTask

    asked = {"in_chans": channels, "img_size": 16, "input_size": None}
    given = resolve_model_input_args(
        SMALL, asked, num_classes=4, drop_path_rate=0.1, scriptable=False, checkpoint_path="", **SCRIPTS
    )
    model = timm.create_model(**given)
    model.get_classifier().weight.data.mul_(0.5)
    model.set_grad_checkpointing(enable=True)
    data = resolve_input_data_config(model, asked)
    assert data["input_size"] == (channels, 16, 16) and data["crop_pct"] == 1 and model.num_classes == 4
    task = ClassificationTask(model=model, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    task.setup_ema(decay=0.9)
    images, labels = torch.randn(4, *data["input_size"]), torch.tensor([0, 1, 2, 3])
    task(images, labels)["loss"].backward()
    dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), value=0.01, mode="agc")
    optimizer.step()
    task.update_ema(step=1)
    assert all(parameter.grad is not None for parameter in model.parameters())
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=tmp_path, recovery_dir=tmp_path, task=task)
    saver.save_checkpoint(0, metric=1.0)
    for use_ema, trained in ((False, model), (True, task.get_eval_model(ema=True))):
        found = timm.create_model(**resolve_model_input_args(SMALL, asked, num_classes=4))
        timm.models.load_checkpoint(found, tmp_path / "last.pth.tar", use_ema)
        torch.testing.assert_close(found.eval()(images), trained.eval()(images))


def test_each_block_is_one_layer_for_a_learning_rate_by_depth():
    model = timm.create_model(SMALL)
    depth = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(depth) == {name for name, _ in model.named_parameters()}
    blocks = {}
    for name, layer in depth.items():
        blocks.setdefault(tuple(name.split(".")[:4]) if ".blocks." in name else name, set()).add(layer)
    assert all(len(layers) == 1 for layers in blocks.values())
    in_order = [layers.pop() for name, layers in blocks.items() if isinstance(name, tuple)]
    assert in_order == list(range(1, 8)) and depth["embed.conv.weight"] == 0 and depth["head.weight"] > 7
    assert depth["stages.1.pos"] == depth["stages.1.blocks.0.attn.q.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["stages.2.pos"] == coarse["stages.2.blocks.1.mlp.0.weight"]


@pytest.fixture
def checkpoint(tiny_preset):
    made = random_checkpoint(tiny_preset)
    return Checkpoint(made.model, made.preset, tuple("abcdefghij"), epoch=3, metrics={"top1": 0.5})


def test_safetensors_hold_all_that_is_needed(checkpoint, tmp_path):
    save_safetensors(tmp_path / "a.safetensors", checkpoint)
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert (found.preset, found.classes, found.epoch, found.metrics) == (
        checkpoint.preset,
        checkpoint.classes,
        checkpoint.epoch,
        checkpoint.metrics,
    )
    for name, tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, checkpoint.model.state_dict()[name]) and torch.equal(
            tensor, found.model.state_dict()[name]
        )


@pytest.mark.parametrize(
    "share", [0.02, pytest.param(0.1, marks=pytest.mark.faults), pytest.param(1, marks=pytest.mark.full_size)]
)
def test_no_bit_of_a_safetensors_header_can_flip(checkpoint, tmp_path, share):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, checkpoint)
    good = path.read_bytes()
    bits = 8 * (8 + int.from_bytes(good[:8], "little"))
    for position in random.Random(0).sample(range(bits), int(bits * share)):
        changed = bytearray(good)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(InputError, match=r"a\.safetensors"):
            load_checkpoint(path)


def test_damaged_and_foreign_safetensors_are_refused(checkpoint, tmp_path):
    save_safetensors(tmp_path / "a.safetensors", checkpoint)
    good, weights = (tmp_path / "a.safetensors").read_bytes(), checkpoint.model.state_dict()
    for position in range(0, len(good), len(good) // 100):
        changed = bytearray(good)
        changed[position] ^= 4
        (tmp_path / "bad.safetensors").write_bytes(changed)
        with pytest.raises(InputError, match="bad"):
            load_checkpoint(tmp_path / "bad.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good[: len(good) // 2])
    halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
    safetensors.torch.save_file(halves, tmp_path / "halves.safetensors", {"lsag": "{}"})
    safetensors.torch.save_file(dict(weights), tmp_path / "foreign.safetensors")
    for name in ("cut", "halves", "foreign", "absent"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / f"{name}.safetensors")


def test_the_commands_take_safetensors(lsag, checkpoint, tmp_path):
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    done = lsag("export", "a.pt", "--safetensors")
    assert done.returncode == 0 and (tmp_path / "a.safetensors").exists(), done.stderr
    assert lsag("eval", "a.safetensors", "--dataset", "digits").returncode in (0, 3)
    before = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "link.onnx").hardlink_to(tmp_path / "a.pt")
    assert_refused(lsag("export", "link.onnx", "--onnx", "--force"), 6, "is the input file")
    assert_refused(
        lsag("export", "a.pt", "--safetensors", "--out", "a.pt", "--force"), 2, "does not end in .safetensors"
    )
    assert_refused(lsag("export", "a.pt", "--onnx", "--out", "nowhere/a.onnx"), 6, "there is no folder nowhere")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert_refused(lsag("export", "a.pt"), 2, "--onnx or --safetensors")
    assert_refused(lsag("export", "a.pt", "--safetensors", "--precision", "fp16", "--force"), 2, "are for --onnx")


def test_the_hub_gives_back_what_it_was_given(checkpoint, tmp_path):
    Classifier.of(checkpoint).save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"model.safetensors", "config.json"}
    found = Classifier.from_pretrained(tmp_path / "model")
    assert found.classes == checkpoint.classes and found.preset == checkpoint.preset and not found.training
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    expected = checkpoint.model(Normalize(checkpoint.preset.data)(pixels))
    torch.testing.assert_close(found(pixels), expected)
    assert found.checkpoint().preset == checkpoint.preset
    rounded = Classifier.from_pretrained(tmp_path / "model", precision="bf16")
    assert rounded.precision == "bf16" and rounded(pixels).argmax(1).tolist() == expected.argmax(1).tolist()
    with pytest.raises(UsageError, match="rounded to bf16"):
        rounded.save_pretrained(tmp_path / "again")


def edit_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_weights(change):
    def edit(folder):
        path = folder / "model.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights = safetensors.torch.load_file(path)
        change(weights)
        metadata["lsag_sha256"] = weights_digest(weights, metadata["lsag"])  # as if it had been saved like this
        safetensors.torch.save_file(weights, path, metadata)

    return edit


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (edit_weights(lambda weights: weights.pop("head.bias")), "1 missing: head.bias"),
        (edit_weights(lambda weights: weights.update({f"x.{k}": weights.pop(k) for k in list(weights)})), "missing"),
        (edit_weights(lambda weights: weights["head.bias"].fill_(float("nan"))), "1 not finite: head.bias"),
        (edit_weights(lambda weights: weights.update({k: v.half() for k, v in weights.items()})), "float16"),
        (edit_config(lambda config: config.update(classes=["one"])), "config.json does not describe"),
        (edit_config(lambda config: config["classes"].reverse()), "config.json does not describe"),
        (edit_config(lambda config: config["preset"]["data"].update(mean=[0.1])), "config.json does not describe"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not describe"),
        (lambda folder: (folder / "model.safetensors").unlink(), "No such file"),
    ],
)
def test_a_model_of_the_hub_is_checked_like_a_checkpoint(checkpoint, tmp_path, edit, word):
    Classifier.of(checkpoint).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model")
    with pytest.raises(InputError, match=word):
        Classifier.from_pretrained(tmp_path / "model")


def test_push_says_what_is_in_the_way(lsag_afresh, checkpoint, tmp_path):
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "hf")}
    assert_refused(lsag_afresh("push", "a.pt", "org/name", env=nowhere), 4, "org/name could not be written on the hub")
    for name in ("no name!", "", "a/b/c", "../x"):
        assert_refused(lsag_afresh("push", "a.pt", name, env=nowhere), 2, "is not a name on the hub")
    assert_refused(lsag_afresh("push", "absent.pt", "org/name", env=nowhere), 3, "absent.pt")


def test_push_uploads(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    uploaded = {}

    def upload(self, *, repo_id, folder_path, **options):
        uploaded[repo_id] = json.loads((folder_path / "config.json").read_text())
        return "https://hub/org/name"

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: type("R", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert Classifier.of(checkpoint).push_to_hub("org/name") == "https://hub/org/name"
    assert uploaded["org/name"]["classes"] == list(checkpoint.classes)
