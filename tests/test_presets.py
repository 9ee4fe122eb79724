"""From a name, a file and --set to a Preset."""

import json
import tomllib

import pytest

from lsag import load_preset
from lsag.config import DATASETS, ModelConfig, Preset, TimmConfig, parse_override
from lsag.errors import UsageError
from lsag.presets import ablations, preset_names, preset_paths
from tests.conftest import CIFAR_SHIFTS, IMAGENET_SHIFTS

TABLE_2 = {
    # image, T, kernel, stride, padding, widths, depths, heads, key/value heads
    "in1k-tiny": (224, 10, 7, 7, 0, [192] * 4, [2, 4, 4, 4], [4] * 4, [4] * 4),
    "in1k-tiny-release": (224, 10, 9, 7, 1, [192] * 4, [2, 4, 4, 4], [4] * 4, [4] * 4),
    "in1k-small": (224, 10, 4, 4, 0, [64, 192, 384], [2, 2, 10], [2, 6, 12], [2, 6, 12]),
    "cifar-tiny": (32, 18, 3, 1, 1, [192] * 4, [2, 4, 4, 4], [3] * 4, [1] * 4),
    "cifar-small": (32, 18, 3, 1, 1, [384] * 4, [2, 4, 4, 4], [6] * 4, [6] * 4),
    "cifar-base": (32, 18, 3, 1, 1, [768] * 4, [3, 3, 3, 3], [12] * 4, [12] * 4),
}
RELEASED = {
    "in1k-small-release": TABLE_2["in1k-small"],
    "cifar-tiny-release": (*TABLE_2["cifar-tiny"][:7], [4] * 4, [1] * 4),
    "cifar-small-release": (*TABLE_2["cifar-small"][:8], [1] * 4),
    "cifar-base-release": (*TABLE_2["cifar-base"][:8], [1] * 4),
}


@pytest.mark.parametrize("name", TABLE_2 | RELEASED)
def test_presets_are_table_2_or_the_release(name):
    model = load_preset(name).model
    found = (
        model.image_size,
        model.num_variants,
        model.patch_kernel,
        model.patch_stride,
        model.patch_padding,
        *([getattr(s, field) for s in model.stages] for field in ("embed_dim", "depth", "num_heads", "num_kv_heads")),
    )
    assert found == (TABLE_2 | RELEASED)[name]
    assert model.shifts == (CIFAR_SHIFTS if name.startswith("cifar") else IMAGENET_SHIFTS)
    assert model.shift_mode == ("roll" if name.startswith("cifar") else "extend")


@pytest.mark.parametrize("name", TABLE_2 | RELEASED)
def test_presets_follow_the_recipe_of_section_3_3_or_of_the_release(name):
    preset = load_preset(name)
    train, augment = preset.train, preset.augment
    other = name == "in1k-small-release"
    assert (train.epochs, train.weight_decay, train.lr) == (300, 0.05, 2.5e-4 if other else 5e-4)
    assert train.warmup_epochs == (5 if name.startswith("cifar") or other else 20)
    as_released = (train.clip_grad, train.decay_positions, train.lr_schedule)
    assert as_released == ((0, True, "epoch") if name.endswith("release") else (5.0, False, "step"))
    rates = (1e-6, 1e-5, "peak") if "in1k-tiny" not in name else (5e-7, 5e-6, "all")
    assert (train.warmup_lr, train.min_lr, train.lr_scaling) == rates
    assert train.batch_size == load_preset(name.removesuffix("-release")).train.batch_size
    assert preset.model.drop_path_by_depth == "constant"
    assert (augment.rand_augment, augment.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.mixup, augment.cutmix, augment.mixup_prob, augment.mixup_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (augment.label_smoothing, preset.model.drop_path, preset.data.interpolation) == (0.1, 0.1, "bicubic")
    assert (preset.data.eval_resize, preset.data.train_crop) == (
        (None, "padded") if name.startswith("cifar") else (256, "resized")
    )


@pytest.mark.parametrize("path", preset_paths().values(), ids=preset_paths())
def test_preset_files_say_what_they_are(path):
    assert_header(path)
    assert tomllib.loads(path.read_text())["description"]


def test_the_ablations_say_what_they_are():
    assert_header(preset_paths()["cifar-tiny"].with_name("ablations.toml"))
    assert all(changes["description"] and changes["model"] for changes in ablations().values())


def assert_header(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Cost:"):
        assert any(word in line for line in header), f"{path.name} has no {word}"


@pytest.mark.parametrize("name", preset_names())
def test_dumped_presets_load_as_themselves(name, tmp_path):
    preset = load_preset(name)
    path = tmp_path / "preset.json"
    path.write_text(preset.model_dump_json())
    assert load_preset(path) == preset == Preset.model_validate(json.loads(path.read_text()))


def test_overrides_and_dataset():
    preset = load_preset("cifar-tiny", {"train.epochs": 7, "model.stages.1.depth": 3}, dataset="cifar100")
    assert (preset.train.epochs, preset.model.stages[1].depth, preset.model.num_classes) == (7, 3, 100)
    assert preset.data.mean == DATASETS["cifar100"].mean
    folder = load_preset("cifar-tiny", dataset="folder")
    assert folder.data.mean == DATASETS["cifar10"].mean and folder.data.dataset == "folder"
    assert load_preset("cifar-tiny", {"model.num_classes": 3}, dataset="cifar100").model.num_classes == 3


def test_timm_in_the_place_of_the_network(tmp_path):
    ours = load_preset("cifar-tiny", dataset="cifar100")
    spec = "vit_tiny_patch16_224,patch_size=2"
    preset = load_preset("cifar-tiny", {"model.drop_path": 0.2}, dataset="cifar100", timm=spec)
    assert preset.model == TimmConfig(timm=spec, image_size=32, in_channels=3, num_classes=100, drop_path=0.2)
    assert (preset.data, preset.augment, preset.train) == (ours.data, ours.augment, ours.train)
    assert preset.name == "cifar-tiny-vit_tiny_patch16_224" and preset.paper is None
    path = tmp_path / "preset.json"
    path.write_text(preset.model_dump_json())
    assert load_preset(path) == preset == load_preset(path, timm=spec)
    with pytest.raises(UsageError, match="all training images are of one class — give images of two"):
        preset.with_classes(1)
    assert preset.with_classes(3).model == preset.model.model_copy(update={"num_classes": 3})


def test_a_preset_may_put_a_network_of_timm_into_another(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "cifar-nano"\n[model]\ntimm = "resnet10t"\n')
    preset = load_preset(tmp_path / "mine.toml")
    assert preset.model == TimmConfig(timm="resnet10t", image_size=32, num_classes=10, drop_path=0.0)
    assert preset.train == load_preset("cifar-nano").train
    with pytest.raises(UsageError, match=r"unknown key model\.patch_stride, which timm models do not have"):
        load_preset("cifar-nano", {"model.patch_stride": 4}, timm="resnet10t")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"name = ", b"[model]\nx = 1", b"a=1\na=2", b"\x00" * 99, b"x=" + b"[" * 5000, b"#" * 2_000_000],
)
def test_files_that_are_no_presets_are_refused(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine"):
        load_preset(path)


def test_names_that_cannot_be_files_and_numbers_that_are_too_long_are_refused():
    with pytest.raises(UsageError):
        load_preset("x" * 5000)
    assert parse_override("a=" + "9" * 5000) == ("a", "9" * 5000)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + preset_paths()["cifar-tiny"].read_bytes().replace(b"\n", b"\r\n"))
    assert load_preset(path).model == load_preset("cifar-tiny").model


def test_files_extend_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one.toml").write_text(
        "extends = 'cifar-tiny'\nname = 'first'\n[train]\nepochs = 7\n[[model.stages]]\n"
        "embed_dim = 8\ndepth = 1\nnum_heads = 2\n[paper]\nparams_m = 1.0"
    )
    (tmp_path / "two.json").write_text('{"extends": "deep/one.toml", "train": {"lr": 0.5}}')
    tiny, found = load_preset("cifar-tiny"), load_preset(tmp_path / "two.json")
    assert (found.name, found.description, found.paper) == ("two", "", None)
    assert (found.train.epochs, found.train.lr, found.train.batch_size) == (7, 0.5, tiny.train.batch_size)
    assert len(found.model.stages) == 1 and found.model.shifts == tiny.model.shifts
    assert load_preset(tmp_path / "deep/one.toml").name == "first"


@pytest.mark.parametrize(
    ("extends", "words"),
    [
        ("'cifar-tini'", ["no preset or file 'cifar-tini'", "mine.toml extends", "did you mean 'cifar-tiny'"]),
        ("'absent.toml'", ["no preset or file 'absent.toml'"]),
        ("'mine.toml'", ["mine.toml extends mine.toml, which extends it in turn"]),
        ("'other.toml'", ["extends mine.toml, which extends it in turn"]),
        ("''", ["mine.toml"]),
        ("'\\u0000'", ["mine.toml"]),
        ("3", ["extends is 3"]),
        ("['cifar-tiny']", ["extends is ['cifar-tiny']"]),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path, extends, words):
    (tmp_path / "mine.toml").write_text(f"extends = {extends}".replace("'\\", '"\\').replace("0'", '0"'))
    (tmp_path / "other.toml").write_text("extends = 'mine.toml'")
    with pytest.raises(UsageError) as caught:
        load_preset(tmp_path / "mine.toml")
    for word in words:
        assert word in str(caught.value)


def test_a_long_chain_of_presets_is_refused(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.toml").write_text(f'extends = "{index + 1}.toml"')
    with pytest.raises(UsageError, match="16 times"):
        load_preset(tmp_path / "0.toml")


def test_a_key_of_many_parts_is_refused(tmp_path):
    """tomllib would take half a minute and gigabytes."""
    (tmp_path / "deep.toml").write_text("a." * 100_000 + "a = 1")
    with pytest.raises(UsageError, match="too large for a preset"):
        load_preset(tmp_path / "deep.toml")
    with pytest.raises(UsageError, match="too long for a setting"):
        parse_override("train.lr={" + "a." * 100_000 + "a=1}")


def test_unknown_presets_suggest_a_known_one():
    with pytest.raises(UsageError, match="did you mean 'cifar-tiny'"):
        load_preset("cifar-tini")


ABLATED = {
    "a": {"shifts", "local"},
    "b": {"shifts"},
    "c": {"variants", "position"},
    "d": {"variants"},
    "e": {"position"},
    "i": {"shifts", "local"},
    "ii": {"shifts", "local"},
    "full": set(),
}


def test_the_presets_are_these():
    full = {*TABLE_2, *RELEASED, "cifar-nano", "digits-nano"}
    assert set(preset_names()) == full | {f"cifar-tiny-{name}" for name in ABLATED}
    assert len(preset_names()) == len(full) + len(ABLATED)


@pytest.mark.parametrize("name", ABLATED)
def test_ablations_differ_from_the_model_in_what_the_paper_says(name):
    full, found = load_preset("cifar-tiny"), load_preset(f"cifar-tiny-{name}")
    different = {key for key in ModelConfig.model_fields if getattr(full.model, key) != getattr(found.model, key)}
    assert different == ABLATED[name] and found.name == f"cifar-tiny-{name}"
    assert (found.data, found.augment, found.train) == (full.data, full.augment, full.train)
    assert found.description != full.description and set(found.paper.top1) == {"cifar10"}
    assert found.model.num_variants == {"a": 1, "b": 9, "i": 1, "ii": 1}.get(name, 18)
    assert set(found.model.shifts) <= set(full.model.shifts)


@pytest.mark.parametrize("name", ABLATED)
def test_ablations_of_another_base(name, tmp_path):
    nano, tiny = load_preset("cifar-nano"), load_preset(f"cifar-tiny-{name}")
    found = load_preset(f"cifar-nano-{name}", {"train.seed": 3})
    assert (found.name, found.paper, found.train.seed) == (f"cifar-nano-{name}", None, 3)
    changed = {"shifts", "variants", "position", "local"}
    assert found.model.model_dump(include=changed) == tiny.model.model_dump(include=changed)
    assert found.model.model_dump(exclude=changed) == nano.model.model_dump(exclude=changed)
    assert (found.data, found.augment) == (nano.data, nano.augment)
    (tmp_path / "mine.toml").write_text(preset_paths()["cifar-nano"].read_text())
    (tmp_path / "more.toml").write_text(f"extends = 'mine-{name}'")
    mine = found.model_copy(update={"name": f"mine-{name}", "train": nano.train})
    for base in ("mine", "mine.toml"):
        assert load_preset(tmp_path / f"{base}-{name}") == mine
    assert load_preset(tmp_path / "more.toml").model == found.model


def test_an_ablation_needs_a_preset(tmp_path):
    with pytest.raises(
        UsageError, match=r"^no preset or file 'cifar-nan', which .* extends, did you mean 'cifar-nano'"
    ):
        load_preset("cifar-nan-a")
    with pytest.raises(UsageError, match="which extends it in turn"):
        (tmp_path / "mine.toml").write_text("extends = 'mine-a'")
        load_preset(tmp_path / "mine-a")
    with pytest.raises(UsageError, match="no preset or file"):  # not the preset of that name that lsag has
        load_preset(tmp_path / "cifar-nano-a")
    with pytest.raises(UsageError, match="no preset or file 'cifar-nano-z'"):
        load_preset("cifar-nano-z")
    with pytest.raises(UsageError, match="unknown key extends"):
        load_preset("cifar-tiny", {"extends": "cifar-nano"})


def test_presets_of_the_package_go_before_files(tmp_path, monkeypatch):
    for name in ("cifar-tiny-a", "cifar-tiny"):
        expected = load_preset(name)
        (tmp_path / f"{name}.toml").write_text("extends = 'cifar-nano'")
        monkeypatch.chdir(tmp_path)
        assert load_preset(name) == expected != load_preset(f"{name}.toml")
