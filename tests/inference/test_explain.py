import json
import math

import pytest
import torch
from PIL import Image

from lsag import LSAG, load_preset
from lsag.checkpoint import Checkpoint, random_checkpoint, save_checkpoint
from lsag.data.transforms import Normalize
from lsag.errors import UsageError
from lsag.inference.classifier import Classifier
from lsag.inference.explain import explain
from lsag.model.blocks import GlobalAttention, LocalAttention
from tests.conftest import ABLATIONS, assert_refused, images, randomise, small_config


@pytest.fixture
def checkpoint():
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config()})
    checkpoint = random_checkpoint(preset)
    randomise(checkpoint.model)
    return checkpoint


@pytest.fixture
def picture():
    return Image.effect_noise((20, 16), 80).convert("RGB")


def test_weights_give_the_outputs(checkpoint):
    """The weights that are shown, applied to the values by hand, are the attention that the model computes."""
    config = small_config()
    model = randomise(LSAG(config))
    for stage in model.stages:
        for block in stage.blocks:
            attention, dim = block.attn, block.attn.q.in_features
            group = attention.num_heads // attention.num_kv_heads
            if isinstance(attention, LocalAttention):
                x = torch.randn(2, 6, 5, dim)
                weights = attention.attention_weights(x)  # (B, N, H, T)
                values = attention.kv(x).unflatten(-1, (2, attention.num_kv_heads, -1))[..., 1, :, :]
                values = values.repeat_interleave(group, dim=3)  # (B, N, T, H, d)
                out = torch.einsum("bnht,bnthd->bnhd", weights, values).flatten(2)
                torch.testing.assert_close(attention.proj(out), attention(x), rtol=1e-4, atol=1e-4)
            else:
                assert isinstance(attention, GlobalAttention)
                x = torch.randn(2, 6, dim)
                weights = attention.attention_weights(x, slice(4, 6))  # (B, H, 2, N)
                values = attention.kv(x).unflatten(-1, (2, attention.num_kv_heads, -1))[:, :, 1]
                out = torch.einsum("bhqn,bnhd->bqhd", weights, values.repeat_interleave(group, dim=2)).flatten(2)
                torch.testing.assert_close(attention.proj(out), attention(x)[:, 4:6], rtol=1e-4, atol=1e-4)


def test_the_shares_are_those_of_the_variants_that_the_model_sees(checkpoint, picture):
    block, seen = checkpoint.model.stages[0].blocks[0], []
    found = explain(Classifier(checkpoint), picture)
    block.chunk_bytes = None  # all variants at once
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.from_numpy(found.pixels).permute(2, 0, 1)[None]
    with torch.inference_mode():
        checkpoint.model(Normalize(checkpoint.preset.data)(pixels))
        expected = block.attn.attention_weights(seen[0])[0]  # (N, H, T)
    torch.testing.assert_close(found.local, expected.permute(1, 2, 0).unflatten(2, (12, 12)))


def test_shares_add_up_and_the_model_is_left_as_it_was(checkpoint, picture):
    found = explain(Classifier(checkpoint), picture, point=(11, 3))
    heads, config = 2, small_config()
    assert found.local.shape == (heads, 5, 12, 12) and found.pixels.shape == (12, 12, 3)
    torch.testing.assert_close(found.local.sum(dim=1), torch.ones(heads, 12, 12))
    assert [tuple(stage.shape[1:]) for stage in found.stages] == [(12, 12), (6, 6), (3, 3)]
    for stage in found.stages:
        torch.testing.assert_close(stage.sum(dim=(1, 2)), torch.ones(len(stage)))
    assert found.entropy.min() >= 0 and found.entropy.max() <= math.log2(5) + 1e-6
    assert found.shifts == config.shifts and len(found.classes) == 3
    assert not any(module._forward_pre_hooks for module in checkpoint.model.modules())
    batch = images(2, config)
    torch.testing.assert_close(checkpoint.model(batch), checkpoint.model(batch.clone()))


def test_the_token_is_the_one_at_the_point(checkpoint, picture, monkeypatch):
    """An attention that prefers the asking token shows where that is."""
    monkeypatch.setattr(
        GlobalAttention,
        "attention_weights",
        lambda self, x, tokens: torch.eye(x.shape[1])[tokens][None, None],
    )
    found = explain(Classifier(checkpoint), picture, point=(11, 3))
    places = [tuple((stage[0] == 1).nonzero()[0].tolist()) for stage in found.stages]
    assert places == [(3, 11), (1, 5), (0, 2)]  # (row, column)
    with pytest.raises(UsageError, match="outside the 12 x 12 pixels"):
        explain(Classifier(checkpoint), picture, point=(12, 0))


def test_a_stage_of_the_local_block_alone_has_no_picture(picture):
    stages = [{"embed_dim": 8, "depth": 1, "num_heads": 2}, {"embed_dim": 8, "depth": 1, "num_heads": 2}]
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(stages=stages)})
    found = explain(Classifier(random_checkpoint(preset)), picture)
    assert found.stages[0] is None and found.stages[1] is not None


@pytest.mark.parametrize("name", ["a", "i", "ii"])
def test_a_model_without_local_attention_is_refused(picture, name):
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(**ABLATIONS[name])})
    with pytest.raises(UsageError, match=r"cifar-nano chooses no shifts \(model\.local is"):
        explain(Classifier(random_checkpoint(preset)), picture)


@pytest.mark.parametrize("name", ["c", "e"])
def test_ablations_of_the_variants_are_explained(picture, name):
    preset = load_preset("cifar-nano").model_copy(update={"model": small_config(**ABLATIONS[name])})
    assert explain(Classifier(random_checkpoint(preset)), picture).local.shape == (2, 18, 12, 12)


@pytest.mark.parametrize("name", ["cifar-nano", "digits-nano"])
def test_the_command_draws(lsag, tmp_path, picture, name):
    checkpoint = random_checkpoint(load_preset(name))
    save_checkpoint(tmp_path / "a.pt", Checkpoint(checkpoint.model, checkpoint.preset, checkpoint.classes))
    picture.save(tmp_path / "cat $x$.png")
    done = lsag("explain", "a.pt", "cat $x$.png", "--at", "5,6")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat $x$-explained.png") as drawn:
        assert drawn.width > 800
    assert_refused(lsag("explain", "a.pt", "cat $x$.png"), 6, "--force")
    found = json.loads(lsag("explain", "a.pt", "cat $x$.png", "--force", "--json").stdout)
    assert sum(share for *_, share in found["shifts"]) == pytest.approx(1)
    assert_refused(lsag("explain", "a.pt", "cat $x$.png", "--at", "5", "--out", "b.png"), 2, "for example --at 10,20")
    for at in ("1" * 5000 + ",1", "-1,1"):
        assert_refused(
            lsag("explain", "a.pt", "cat $x$.png", f"--at={at}", "--out", "b.png"), 2, "for example --at 10,20"
        )
    here = ["cat $x$.png", "--out", "cat $x$.png", "--force"]
    assert_refused(lsag("explain", "a.pt", *here), 6, "is the input file")
    (tmp_path / "a.onnx").touch()
    assert_refused(lsag("explain", "a.onnx", "cat $x$.png", "--out", "b.png"), 3, "the checkpoint it was exported from")
    assert_refused(lsag("explain", "a.pt", "absent.png", "--out", "b.png"), 3, "absent.png")
