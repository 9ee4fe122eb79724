import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.ops import stochastic_depth

from lsag import LSAG, ModelConfig, load_preset
from lsag.model.blocks import DropPath
from lsag.paper.released import as_released
from lsag.presets import preset_names
from tests.conftest import ABLATIONS, CIFAR_SHIFTS, IMAGENET_SHIFTS, ONE_SHIFT, images, randomise, small_config
from tests.model import oracle

STAGE = {"embed_dim": 8, "depth": 2, "num_heads": 2}
CONFIGS = {
    "multi-query and grouped heads, odd grids": small_config(),
    "full heads, 18 variants": small_config(
        image_size=8, shifts=CIFAR_SHIFTS, stages=[STAGE, STAGE | {"embed_dim": 12}]
    ),
    "one variant, one stage, grey": small_config(shifts=[[0, 0]], in_channels=1, stages=[STAGE]),
    "stride 4": small_config(image_size=16, shifts=IMAGENET_SHIFTS, patch_kernel=4, patch_stride=4, patch_padding=0),
    "kernel 9, extended": small_config(
        image_size=28, shifts=IMAGENET_SHIFTS, patch_kernel=9, patch_stride=7, patch_padding=1, shift_mode="extend"
    ),
    "kernel 9, rolled": small_config(
        image_size=28, shifts=IMAGENET_SHIFTS, patch_kernel=9, patch_stride=7, patch_padding=1
    ),
    "no padding, overlapping patches": small_config(image_size=9, patch_padding=0, stages=[STAGE]),
    "translated, shared positions": small_config(image_size=9, **ABLATIONS["c"]),
    "translated, stride 2": small_config(patch_stride=2, variants="translation"),
    "shared positions": small_config(image_size=8, **ABLATIONS["e"]),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_agrees_with_the_paper_read_literally(config):
    model = randomise(LSAG(config)).eval()
    batch = images(2, config)
    expected = oracle.logits(batch, dict(model.state_dict()), config)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("chunk", ["all", "a row", "a row of two images", "rows of all images", "on a GPU"])
def test_chunks_and_the_released_formulation_give_the_same(monkeypatch, config, chunk):
    """Also where rows or images are left over, and with the local block recomputed in the backward."""
    if chunk == "on a GPU":
        monkeypatch.setattr("lsag.model.blocks.on_gpu", lambda x: True)
    model = randomise(LSAG(config.model_copy(update={"drop_path": 0.0}))).train()
    released, batch = as_released(model), images(3, config)
    block, side = model.stages[0].blocks[0], config.grid_sizes[0]
    num_rows = {"a row": 1, "a row of two images": 2, "rows of all images": 3 * (side // 2 + 1)}
    row_bytes = 4 * side * config.num_variants * config.stages[0].embed_dim
    block.chunk_bytes = num_rows[chunk] * row_bytes if chunk in num_rows else None
    expected = released(batch)
    expected.square().sum().backward()
    largest = max(parameter.grad.abs().max() for parameter in released.parameters())
    for recompute, local_only in ((False, False), (True, True), (True, False)):
        model.set_grad_checkpointing(recompute, local_only=local_only)
        model.zero_grad()
        found = model(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), released.parameters(), strict=True):
            # Some are nothing but rounding error: of a key's bias, or of a query with a single key.
            scale = max(theirs.grad.abs().max(), largest / 1000)
            torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=0, atol=1e-4, msg=name)


LARGE = dict.fromkeys(("in1k-small", "in1k-tiny-release"), pytest.mark.slow) | dict.fromkeys(
    (
        "cifar-small",
        "cifar-base",
        "in1k-small-release",
        *(f"cifar-{size}-release" for size in ("tiny", "small", "base")),
        *(f"cifar-tiny-{name}" for name in [*ABLATIONS, "full"]),
    ),
    pytest.mark.full_size,
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=LARGE[name]) if name in LARGE else name
        for name in preset_names()
        if name != "cifar-tiny-ii"  # BatchNorm: in training, results depend on the whole batch
    ],
)
def test_presets_compute_what_the_released_formulation_computes(monkeypatch, name):
    """At full size: logits within 1e-5, as inference and as training computes them; gradients within 1e-4.

    As on either kind of processor, whatever this one is. For the gradients both pool with a mean: of two maxima that
    are almost equal, rounding decides which gets the gradient.
    """
    torch.manual_seed(0)
    config = load_preset(name).model.model_copy(update={"drop_path": 0.0})
    model = LSAG(config).train()
    released = as_released(model)
    batch = images(2, config)
    expected = released(batch)
    with torch.inference_mode():
        for mkl_is_slow in (True, False):
            monkeypatch.setattr("lsag.model.cpu.MKL_IS_SLOW", mkl_is_slow)
            torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(batch[:1]), expected[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)
    monkeypatch.setattr("torch.nn.functional.max_pool2d", torch.nn.functional.avg_pool2d)
    for each in (model, released):
        torch.nn.functional.cross_entropy(each(batch), torch.tensor([1, 0])).backward()
    for (label, ours), theirs in zip(model.named_parameters(), released.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4 * theirs.grad.abs().max(), msg=label)


def test_a_recomputed_local_block_keeps_no_hidden_layer():
    model, shapes = LSAG(small_config()).train(), []
    stage, batch = model.stages[0], images(2, model.config)
    hidden = stage.blocks[0].mlp[0].out_features
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: shapes.append(saved.shape) or saved, lambda saved: saved
    ):
        for recompute, precision in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
            model.set_grad_checkpointing(recompute, local_only=True)
            shapes.clear()
            with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
                stage.blocks[0](batch, model.embed, stage.norm1, stage.norm2)
            found = any(shape[-1:] == (hidden,) and shape[:-1].numel() > hidden for shape in shapes)
            assert found is not recompute


@pytest.mark.parametrize("gpu", [False, True])
def test_variants_are_kept_in_the_type_of_autocast(monkeypatch, gpu):
    monkeypatch.setattr("lsag.model.blocks.on_gpu", lambda x: gpu)
    model, batch = randomise(LSAG(small_config(drop_path=0.0))), images(3, small_config())
    config = model.config
    variants = 3 * config.grid_sizes[0] ** 2 * config.num_variants * config.stages[0].embed_dim
    exact, found = model(batch), []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: found.append(saved) or saved, lambda saved: saved),
    ):
        logits = model(batch)
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.1 * exact.std().item())
    large = {saved.dtype for saved in found if saved.numel() == variants}
    assert large == {torch.bfloat16}


def test_extending_and_rolling_differ_only_for_kernel_9():
    rolled, extended = CONFIGS["kernel 9, rolled"], CONFIGS["kernel 9, extended"]
    batch = images(2, rolled)
    for kernel, padding, same in ((9, 1, False), (7, 0, True)):
        change = {"patch_kernel": kernel, "patch_padding": padding}
        embeds = [randomise(LSAG(config.model_copy(update=change))).embed for config in (rolled, extended)]
        a, b = (embed(batch) for embed in embeds)
        differs = (a - b).abs().amax(dim=(0, 2, 3)).view(4, 4) > 1e-6
        assert not differs[:3, :3].any()
        assert bool(differs[3].any() or differs[:, 3].any()) is not same


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_images_of_a_batch_do_not_affect_each_other(config):
    model = randomise(LSAG(config)).eval()
    batch = images(3, config)
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, *ABLATIONS.values()], ids=["full", *ABLATIONS])
def test_every_parameter_gets_a_gradient(changes):
    model = randomise(LSAG(small_config(drop_path=0.0, **changes)))
    model(images(3, model.config)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_the_key_bias_of_the_local_attention_changes_nothing():
    model = randomise(LSAG(small_config())).eval()
    before = model(images(2, model.config))
    with torch.no_grad():
        bias = model.stages[0].blocks[0].attn.kv.bias
        bias[: len(bias) // 2] += 1.0
        after = model(images(2, model.config))
        bias[len(bias) // 2 :] += 1.0
        changed = model(images(2, model.config))
    torch.testing.assert_close(before, after)
    assert (changed - after).abs().max() > 0.01


def test_drop_path_acts_in_training_only():
    model = randomise(LSAG(small_config(drop_path=0.5)))
    batch = images(4, model.config)
    assert torch.equal(model.eval()(batch), model(batch))
    torch.manual_seed(0)
    first = model.train()(batch)
    assert not torch.equal(first, model(batch))
    torch.manual_seed(0)
    assert torch.equal(first, model(batch))


def test_drop_path_may_grow_with_depth():
    for rule, expected in {"constant": [0.3] * 4, "linear": [0.0, 0.1, 0.2, 0.3]}.items():
        model = LSAG(small_config(drop_path=0.3, drop_path_by_depth=rule))
        assert [block.drop_path.rate for stage in model.stages for block in stage.blocks] == pytest.approx(expected)


def test_drop_path_draws_as_torchvision_does():
    x = torch.randn(64, 3, 5)
    torch.manual_seed(0)
    expected = stochastic_depth(x, 0.3, "row")
    torch.manual_seed(0)
    assert torch.equal(DropPath(0.3)(x), expected)


def test_initialisation():
    torch.manual_seed(0)
    model = LSAG(load_preset("digits-nano").model)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.017 < parameter.std() < 0.023, name


def test_features_head_and_classifier():
    model = LSAG(small_config()).eval()
    batch = images(2, model.config)
    features = model.forward_features(batch)
    assert features.shape == (2, 9, 16) and model.num_features == 16
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)
    assert torch.equal(model.forward_head(features), model(batch))
    assert model.get_classifier() is model.head
    model.reset_classifier(3)
    assert model(batch).shape == (2, 3) and model.config.num_classes == model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(batch), features.mean(dim=1))


@pytest.mark.parametrize("shape", [(1, 3, 12, 13), (1, 1, 12, 12), (1, 3, 24, 24), (1, 3, 6, 6), (3, 12, 12)])
def test_refuses_images_of_another_shape(shape):
    model = LSAG(small_config())
    for entry in (model, model.forward_features, model.forward_intermediates, model.embed):
        with pytest.raises(ValueError, match=r"expected images of shape \(batch, 3, 12, 12\).*img_size="):
            entry(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shifts": [[1, 0]]}, "unshifted"),
        ({"shifts": [[0, 0], [-1, 0]], "shift_mode": "extend"}, "negative"),
        ({"shifts": [[0, 0], [12, 0]]}, "smaller than image_size"),
        ({"shifts": []}, "at least 1"),
        ({"patch_stride": 5}, "use 10 or 15"),
        ({"patch_kernel": 15}, "larger than the padded image"),
        ({"patch_padding": 3}, "smaller than patch_kernel"),
        ({"stages": [STAGE | {"num_heads": 3}]}, "multiple of num_heads"),
        ({"stages": [STAGE | {"num_heads": 4, "num_kv_heads": 3}]}, "multiple of num_kv_heads"),
        ({"num_classes": 0}, "greater than 0"),
        ({"drop_path": float("nan")}, "finite"),
        ({"drop_path": 1.0}, "less than 1"),
        ({"image_size": True}, "valid integer"),
        ({"image_size": "12"}, "valid integer"),
        ({"depth": 3}, "Extra inputs"),
        ({"variants": "translation", "shift_mode": "extend", "shifts": ONE_SHIFT}, r"set model\.shift_mode=roll"),
        ({"variants": "rotation"}, "'convolution' or 'translation'"),
        ({"position": "none"}, "'variant' or 'shared'"),
        ({"local": "global"}, "'shift', 'none', 'swin' or 'cvt'"),
        ({"local": "none"}, r"set model\.shifts=\[\[0,0\]\]"),
        ({"local": "swin"}, r"set model\.shifts=\[\[0,0\]\]"),
        ({"local": "cvt"}, r"set model\.shifts=\[\[0,0\]\]"),
        ({"local": "swin", "shifts": ONE_SHIFT, "stages": [STAGE | {"depth": 1}]}, "a second block in the first stage"),
        ({"local": "cvt", "shifts": ONE_SHIFT, "patch_stride": 3}, "overlapping"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        small_config(**change)


def test_configurations_are_frozen():
    with pytest.raises(ValidationError):
        small_config().num_classes = 3


def test_key_value_heads_default_to_the_query_heads():
    assert ModelConfig.model_validate(small_config().model_dump()).stages[1].num_kv_heads == 3


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_and_runs(name):
    config = load_preset(name).model
    with torch.device("meta"):
        assert LSAG(config)(torch.zeros(2, config.in_channels, config.image_size, config.image_size)).shape == (
            2,
            config.num_classes,
        )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_images_and_variants_have_the_fast_layout_in_memory(config):
    """Another layout gives the same numbers more slowly (docs/benchmarks.md, Where the time goes)."""
    embed = LSAG(config).embed
    batch = images(2, config)
    assert embed.shift(batch).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert embed(batch).is_contiguous()


@pytest.mark.parametrize("shift", [(0, 0), (2, 0), (0, 1), (-3, 0), (0, -2), (2, -1), (-1, 2)])
def test_translation_reflects_the_border(shift):
    px, py = shift
    embed = LSAG(small_config(variants="translation", patch_padding=0, shifts=((0, 0), shift))).embed
    batch = images(2, small_config())
    wide = np.pad(batch.numpy(), ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
    expected = wide[:, :, 5 - py : 17 - py, 5 - px : 17 - px]
    np.testing.assert_array_equal(embed.shift(batch)[1].numpy(), expected)


def test_sharing_equals_separate_parameters_of_the_same_values():
    shared = randomise(LSAG(small_config(shifts=CIFAR_SHIFTS, variants="translation", position="shared"))).embed
    own = LSAG(small_config(shifts=CIFAR_SHIFTS)).embed
    with torch.no_grad():
        own.conv.weight.copy_(torch.cat([shared.conv.weight] * 18))
        own.conv.bias.copy_(torch.cat([shared.conv.bias] * 18))
        own.pos.copy_(torch.cat([shared.pos] * 18, dim=1))
    assert shared.conv.weight.shape == (8, 3, 3, 3) and shared.pos.shape == (144, 1, 8)
    shifted = shared.shift(images(2, small_config()))
    torch.testing.assert_close(
        *(embed.embed_rows(shifted, embed.pos, embed.kernel_matrices()) for embed in (shared, own))
    )


def test_without_local_attention_the_first_block_is_a_global_one():
    model = randomise(LSAG(small_config(**ABLATIONS["a"]))).eval()
    batch = images(2, model.config)
    torch.testing.assert_close(
        model(batch), oracle.logits(batch, dict(model.state_dict()), model.config), rtol=1e-4, atol=1e-4
    )
    assert [name for name in model.state_dict() if name.startswith("stages.0.blocks.0")] == [
        name.replace("blocks.1", "blocks.0") for name in model.state_dict() if name.startswith("stages.0.blocks.1")
    ]


@pytest.mark.parametrize("size", [6, 12, 16], ids=["one window", "padded to 16", "four windows"])
def test_swins_block_looks_only_at_its_window(size):
    config = small_config(image_size=size, **ABLATIONS["i"])
    model = randomise(LSAG(config)).eval()
    block, window = model.stages[0].blocks[0], min(size, 8)
    assert tuple(block.window_size) == (window, window) and not any(block.shift_size)
    tokens = torch.randn(2, size**2, 8)
    changed = tokens.clone()
    changed[:, 0, 0] += 3
    differs = (block(changed, None, None) - block(tokens, None, None)).abs().amax(dim=(0, 2)).view(size, size) > 1e-6
    assert differs[:window, :window].all() and not differs[window:].any() and not differs[:, window:].any()


def test_cvts_attention_has_a_quarter_of_the_keys():
    config = small_config(image_size=9, **ABLATIONS["ii"])
    model = randomise(LSAG(config)).eval()
    attention, x = model.stages[0].blocks[0].attn, torch.randn(2, 81, 8)
    with torch.no_grad():
        for buffer in attention.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    convolved = []
    for conv, norm in attention.convs:
        maps = torch.nn.functional.conv2d(
            x.transpose(1, 2).view(2, 8, 9, 9), conv.weight, None, conv.stride, 1, groups=8
        )
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        maps = (maps - norm.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        convolved.append(maps.flatten(2).transpose(1, 2))
    assert [tokens.shape[1] for tokens in convolved] == [81, 25, 25]
    query, key, value = (
        attention.q(convolved[0]),
        attention.kv(convolved[1])[..., :4],
        attention.kv(convolved[2])[..., 4:],
    )
    heads = [(query[..., head * 4 :][..., :4] @ key.transpose(1, 2) / 2).softmax(-1) @ value for head in range(2)]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=2)), rtol=1e-4, atol=1e-4)
    # The token embedding is normalised before positions are added.
    tokens = model.embed(images(2, config))[:, :, 0] - model.embed.pos[:, 0]
    normal = (tokens - model.embed.norm.bias) / model.embed.norm.weight
    torch.testing.assert_close(normal.mean(2), torch.zeros(2, 81), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_give_features_and_recompute_as_others_do(name):
    """The same gradients, and BatchNorm counts each batch once."""
    model = randomise(LSAG(small_config(drop_path=0.0, **ABLATIONS[name]))).train()
    batch, before, results = images(3, model.config), {k: v.clone() for k, v in model.state_dict().items()}, []
    for recompute, local_only in ((False, False), (True, True), (True, False)):
        model.load_state_dict(before)
        model.zero_grad()
        model.set_grad_checkpointing(recompute, local_only=local_only)
        assert model.stages[0].blocks[0].recompute is recompute
        model(batch).square().sum().backward()
        gradients = {f"{key}.grad": p.grad.clone() for key, p in model.named_parameters()}
        results.append(gradients | {key: value.clone() for key, value in model.named_buffers()})
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-4 * max(1, value.abs().max()), msg=key)
    _, features = model.eval().forward_intermediates(batch)
    assert [tuple(feature.shape) for feature in features] == [(3, 8, 12, 12), (3, 12, 6, 6), (3, 16, 3, 3)]
    torch.testing.assert_close(as_released(model)(batch), model(batch), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(batch)[1:2], model(batch[1:2]), rtol=1e-4, atol=1e-4)
