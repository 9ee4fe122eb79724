"""The authors' released checkpoints, converted to this project's layout."""

import argparse
import contextlib
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lsag.checkpoint import Checkpoint, check_weights, is_plain, read_torch, save_checkpoint
from lsag.config import ModelConfig, Preset
from lsag.data.sources import placeholder_classes
from lsag.errors import InputError, UsageError
from lsag.model.network import LSAG
from lsag.presets import load_preset, preset_paths

_RENAMED = {
    "Wq_even": "attn.q",
    "Wq_odd": "attn.q",
    "Wkv_even": "attn.kv",
    "Wkv_odd": "attn.kv",
    "proj": "attn.proj",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The weights of a released file: a dict with the key `model` or `state_dict`, or the weights themselves.

    Besides plain data it may hold the release's `argparse.Namespace`; InputError for a file with anything else.
    """
    contents = read_torch(Path(path), allowed=[argparse.Namespace])
    if isinstance(contents, dict) and contents.get("kind") == "lsag":
        raise InputError(f"{path} is a checkpoint of lsag already", "use it as it is")
    for key in ("model", "state_dict"):
        if isinstance(contents, dict):
            contents = contents.get(key, contents)
    if not isinstance(contents, dict) or not all(
        isinstance(key, str) and is_plain(value) for key, value in contents.items()
    ):
        raise InputError(f"{path} holds no weights under 'model' or 'state_dict'", "give a released .pth")
    return contents


def convert_file(file: str | Path, preset: Preset, out: str | Path) -> None:
    """Convert the released checkpoint `file` of the model `preset` to this project's format, and save it as `out`.

    The release does not name its classes. UsageError for a timm model, InputError if the weights do not fit.
    """
    if not isinstance(preset.model, ModelConfig):
        raise UsageError(f"{preset.name} is a timm model, but the release has only LSAG", "choose one of: lsag presets")
    weights = read_released(file)
    try:
        model = from_released(weights, preset.model)
    except InputError as error:
        raise InputError(error.what, " or ".join(_fitting(weights)) or error.fix) from error
    converted = preset.model_copy(update={"model": model.config})
    save_checkpoint(out, Checkpoint(model, converted, placeholder_classes(preset.model.num_classes)))


def _fitting(weights: Mapping[str, Tensor]) -> list[str]:
    """The options of `lsag convert` that choose a network which released `weights` fit, for each preset there is."""
    fitting = []
    for name, dataset in product(preset_paths(), (None, "cifar100")):
        config = load_preset(name, dataset=dataset).model
        assert isinstance(config, ModelConfig), "the presets of the package are LSAG's"
        with torch.device("meta"), contextlib.suppress(ValueError):
            check_weights(_renamed(weights, config), LSAG(config).state_dict())
            fitting.append(f"--preset {name}" + (f" --dataset {dataset}" if dataset else ""))
    return fitting


def from_released(state_dict: Mapping[str, Tensor], config: ModelConfig) -> LSAG:
    """A model in evaluation mode with the released weights `state_dict`, which gives the logits of the released code.

    `config.shifts` lists the variants as section 4 of the paper does, and `config.shift_mode` tells the family. The
    CIFAR code ("roll") reads each tuple of that list as (vertical, horizontal), so the config of the returned model has
    the tuples transposed; the ImageNet code ("extend") reads them as (horizontal, vertical), as the paper does.

    Raises InputError (a ValueError), which names the keys that are missing, unknown or of another shape.
    """
    if config.shift_mode == "roll":
        # Departure: the paper says (Px horizontal, Py vertical); the released CIFAR code transposes them.
        config = config.model_copy(update={"shifts": tuple((py, px) for px, py in config.shifts)})
    model, converted = LSAG(config), _renamed(state_dict, config)
    try:
        check_weights(converted, model.state_dict())
    except ValueError as error:
        raise InputError(str(error), "choose the preset of these weights: lsag presets") from error
    model.load_state_dict(converted)
    return model.eval()


def _renamed(state_dict: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released weights by our names, those of the variants' convolutions as one."""
    source = {key.removeprefix("module."): value for key, value in state_dict.items()}
    converted: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        names = [f"to_patch_embedding.projections.{s}.{kind}" for s in range(config.num_variants)]
        if all(name in source and source[name].dim() > 0 for name in names):
            converted[f"embed.conv.{kind}"] = torch.cat([source.pop(name) for name in names])
    for key, value in source.items():
        if key == "layers.0.0.pos_emb" and value.dim() == 3:
            converted["embed.pos"] = value.transpose(0, 1)
        else:
            converted[_rename(key)] = value
    return {key: value.float() for key, value in converted.items()}


def _rename(key: str) -> str:
    """Our name for a released key; an unknown key is returned unchanged, and refused later."""
    match key.split("."):
        case ["mlp_head", kind]:
            return f"head.{kind}"
        case ["layers", stage, "1", ("conv" | "norm") as name, kind] if re.fullmatch("[0-9]{1,4}", stage):
            # The release puts the downsampling at the end of a stage, we at the start of the next.
            return f"stages.{int(stage) + 1}.down.{name}.{kind}"
        case ["layers", stage, "0", "pos_emb"]:
            return f"stages.{stage}.pos"
        case ["layers", stage, "0", "layers", block, _, name, kind] if name in _RENAMED:
            return f"stages.{stage}.blocks.{block}.{_RENAMED[name]}.{kind}"
        case ["layers", stage, "0", ("norm1" | "norm2") as name, kind]:
            return f"stages.{stage}.{name}.{kind}"
    return key
