"""The schema: what is accepted, what is refused, and in which words."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsag import load_preset
from lsag.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    Preset,
    TimmConfig,
    TrainConfig,
    changed_keys,
    flatten,
    parse_override,
    parse_spec,
)
from lsag.errors import LsagError, UsageError

SECTIONS = {"model": ModelConfig, "data": DataConfig, "augment": AugmentConfig, "train": TrainConfig}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a=1e-3", ("a", 1e-3)),
        ("a=none", ("a", "none")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        ("a=1\nb=2", ("a", "1\nb=2")),
    ],
)
def test_override_values_are_toml_or_else_text(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.epoch": 3}, ["unknown key train.epoch", "did you mean 'train.epochs'"]),
        ({"model.stages.0.dept": 3}, ["did you mean 'model.stages.0.depth'"]),
        ({"train.epochs": "ten"}, ["train.epochs", "'ten'"]),
        ({"train.epochs": 1.5}, ["train.epochs", "1.5"]),
        ({"train.epochs": True}, ["train.epochs"]),
        ({"train.lr": float("inf")}, ["train.lr", "finite"]),
        ({"train.lr": -1, "train.seed": -1}, ["train.lr", "train.seed"]),
        ({"train.warmup_epochs": 400}, ["warmup_epochs 400 is more than epochs 300"]),
        ({"train.batch_size": 33}, ["must be even"]),
        ({"model.stages.9.depth": 3}, ["no setting 'model.stages.9.depth'"]),
        ({"model.stages.-1.depth": 3}, ["no setting 'model.stages.-1.depth'"]),
        ({"model.shifts.-1": [1, 1]}, ["no setting 'model.shifts.-1'"]),
        ({"train.epochs": 16**5000}, ["train.epochs: Input should be less than or equal to"]),
        ({"train": 3}, ["train"]),
        ({"data.dataset": "mnist"}, ["data.dataset", "cifar10"]),
        ({"data.mean": [0.5]}, ["3 values each"]),
        ({"model.in_channels": 1}, ["data.mean"]),
        ({"name": ""}, ["name"]),
        ({"name": "a/b"}, ["name"]),
        ({"name": "a\0b"}, ["name"]),
        ({"lr": 1.0}, ["unknown key lr", "did you mean 'train.lr'"]),
        ({"model.num_classes": 10**400}, ["model.num_classes"]),
        ({"model.mlp_ratio": 1e300}, ["model.mlp_ratio"]),
        ({"augment.rand_augment": "rand-m9.5"}, ["augment.rand_augment"]),
        ({"paper.params_m": float("nan")}, ["paper.params_m"]),
        ({"augment.rand_augment": "foo"}, ["augment.rand_augment", "'foo'"]),
        ({"train.epochs": 2, "train.warmup_epochs": 3}, ["--set train.warmup_epochs=0"]),
        ({"train.freeze": 5}, ["train.freeze 5 is more than the 4 stages"]),
        ({"train.layer_decay": 0}, ["train.layer_decay"]),
        ({"data.val_split": 0.2}, ["val_split is for images of your own", "--dataset folder"]),
        ({"data.val_split": 1}, ["data.val_split"]),
        ({"data.shuffle": "shards:0"}, ["data.shuffle", "'shards:0'"]),
        ({"data.shuffle": "none"}, ["data.shuffle", "full|shards:"]),
        ({"data.balance": 1.5}, ["data.balance", "less than or equal to 1"]),
        ({"data.balance": 1, "data.shuffle": "shards:8"}, ["balance 1 ", "shuffle shards:8", "data.shuffle=full"]),
        ({"train.class_weights": "x"}, ["train.class_weights", "'inverse'"]),
        (
            {"data.balance": 0.5, "train.class_weights": "inverse"},
            ["data.balance 0.5 and train.class_weights 'inverse' both", "train.class_weights=none"],
        ),
    ],
)
def test_mistakes_are_named_all_at_once(overrides, words):
    with pytest.raises(UsageError) as caught:
        load_preset("cifar-tiny", overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.drop_pat": 0.2}, "unknown key model.drop_pat, did you mean 'model.drop_path'?"),
        ({"model.mlp_ratoi": 2.0}, "unknown key model.mlp_ratoi"),
        ({"model.image_size": "x"}, "model.image_size: Input should be a valid integer (got 'x')"),
        ({"model.timm": ""}, "model.timm: "),
        ({"model.stages": []}, "unknown key model.stages"),
    ],
)
def test_mistakes_in_a_model_section_of_timm_s(overrides, message):
    with pytest.raises(UsageError) as caught:
        load_preset("cifar-tiny", overrides, timm="resnet18")
    assert f": {message}" in caught.value.what and "lsag." not in caught.value.what


@pytest.mark.parametrize("name", [".", "..", "a/b", ""])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(UsageError, match="name"):
        load_preset("cifar-nano", {"name": name})


def test_settings_of_a_spec_are_read_as_set_reads_them():
    assert parse_spec("nest_tiny") == ("nest_tiny", {})
    name, settings = parse_spec(
        "Nest,patch_size=1,embed_dims=[32,64],num_heads=(2, 4),qkv_bias=False,x=None,pool='a,b'"
    )
    assert name == "Nest" and settings == {
        "patch_size": 1, "embed_dims": [32, 64], "num_heads": [2, 4], "qkv_bias": False, "x": None, "pool": "a,b"
    }  # fmt: skip
    assert parse_spec("cifar-tiny,model.shifts=[[0,0],[1,0]],train.lr=1e-3")[1] == {
        "model.shifts": [[0, 0], [1, 0]], "train.lr": 1e-3
    }  # fmt: skip
    with pytest.raises(UsageError, match="patch_size is set twice"):
        parse_spec("Nest,patch_size=1,patch_size=2")


def test_arguments_of_timm_are_a_table():
    """The shorthand of earlier checkpoints and of --model is the same configuration."""
    sizes = {"image_size": 32, "num_classes": 10}
    config = TimmConfig(timm="Nest", arguments={"patch_size": 1, "depths": [2, 2]}, **sizes)
    assert TimmConfig(timm="Nest,patch_size=1,depths=(2,2)", **sizes) == config
    assert TimmConfig(timm="Nest,patch_size=9", arguments={"patch_size": 1, "depths": [2, 2]}, **sizes) == config
    assert TimmConfig.model_validate_json(config.model_dump_json()) == config
    spec, more = "Nest,patch_size=2", {"model.arguments.patch_size": 1, "model.arguments.depths": [2, 2]}
    assert load_preset("cifar-tiny", more, timm=spec).model.arguments == config.arguments
    with pytest.raises(UsageError, match=r"model\.arguments\.x.*finite"):
        load_preset("cifar-tiny", {"model.arguments": {"x": math.inf}}, timm="Nest")


def test_flattened_settings_can_be_set():
    preset = load_preset("cifar-tiny")
    flat = flatten(preset.model_dump(mode="json"))
    assert (flat["model.stages.1.depth"], flat["data.mean"]) == (4, list(preset.data.mean))
    assert load_preset("cifar-tiny", {key: value for key, value in flat.items() if value is not None}) == preset


def test_presets_are_compared_by_their_settings():
    tiny = load_preset("cifar-tiny")
    changes = {"name": "x", "description": "y", "train.lr": 1.0, "data.mean": [0, 0, 0], "model.stages.0.depth": 3}
    assert changed_keys(tiny, load_preset("cifar-tiny", changes)) == ["model.stages.0.depth", "data.mean", "train.lr"]
    assert set(changed_keys(None, tiny)) == {
        key for key in flatten(tiny.model_dump(mode="json")) if key.split(".")[0] in SECTIONS
    }


KEYS = [f"{section}.{name}" for section, kind in SECTIONS.items() for name in kind.model_fields]
KEYS += ["model.timm", "model.arguments", "model.arguments.patch_size"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-40, 40), st.lists(st.integers(-3, 3), max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_key_is_taken_or_refused_in_words(overrides):
    try:
        assert isinstance(load_preset("digits-nano", overrides), Preset)
    except LsagError as error:
        assert error.exit_code == 2


def test_arguments_are_toml_or_else_literals_of_python():
    """Checkpoints of before have the latter."""
    spec = "Nest,a=(192,192),b=.5,c=True,d=None,e=(True, False),f=name,g=[1,2],h=1."
    expected = {"a": [192, 192], "b": 0.5, "c": True, "d": None, "e": [True, False], "f": "name", "g": [1, 2], "h": 1.0}
    assert parse_spec(spec) == ("Nest", expected)
